import json
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from hfft.errors import ModelError
from hfft.model.checkpoint import reopen
from hfft.model.checkpoint_files import check_files, check_weights
from hfft.model.config import load_config, load_processor, load_skeleton
from hfft.recipe.spec import ModelSpec

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 346293852\n"
PAGE = b"<!DOCTYPE html><html>404</html>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("checkpoint") / "vit")


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "vit")


@pytest.fixture
def sharded(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    tiny.build("vit", 10).save_pretrained(checkpoint, max_shard_size="8KB")
    check_files(str(checkpoint))
    return checkpoint


@pytest.mark.parametrize("family", ["vit", "timm_wrapper"])
def test_nothing_is_wrong_with_a_whole_one(family, tmp_path):
    folder = str(tiny.save(tmp_path / family, family))
    check_files(folder)
    check_weights(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [(POINTER, "Git LFS"), (PAGE, "web page"), (b"", "is empty"), (b"\n", "is empty"), (bytes(4096), "is empty")],
)
def test_what_stands_in_the_place_of_a_file_is_named(name, content, problem, checkpoint):
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{re.escape(name)} .*{problem}"):
        check_files(str(checkpoint))


@pytest.mark.parametrize("bytes_left", [3, 100, 5000, 57000])
def test_cut_weights_are_refused(bytes_left, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    for refuse in (lambda: load_config(ModelSpec(checkpoint=str(checkpoint)), ("a", "b")), lambda: reopen(checkpoint)):
        with pytest.raises(ModelError, match=r"model\.safetensors is"):
            refuse()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]", "null", '{"a": 1} {', "\udcff"])
def test_settings_that_are_none_are_refused(name, content, checkpoint):
    (checkpoint / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ModelError, match=re.escape(name)):
        check_files(str(checkpoint))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors"])
def test_weights_that_are_not_read_are_named(name, checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    with pytest.raises(ModelError, match=f"has its weights as {name}"):
        check_weights(str(checkpoint))


def test_a_folder_without_weights_and_a_broken_link(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        check_weights(str(checkpoint))
    (checkpoint / "model.safetensors").symlink_to("gone")
    with pytest.raises(ModelError, match="is a link"):
        check_files(str(checkpoint))


def test_shards_are_all_there_and_whole(sharded):
    third = sorted(sharded.glob("model-*"))[2]
    content = third.read_bytes()
    third.write_bytes(content[:300])
    with pytest.raises(ModelError, match=f"{third.name} is cut"):
        check_files(str(sharded))
    save_file({"other": torch.zeros(1)}, third)
    with pytest.raises(ModelError, match=r"tensors that model.safetensors.index.json names"):
        check_files(str(sharded))
    third.unlink()
    with pytest.raises(ModelError, match=f"lacks {third.name}"):
        check_files(str(sharded))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_nan_is_found_before_weights_are_loaded(is_sharded, checkpoint, request):
    folder = request.getfixturevalue("sharded") if is_sharded else checkpoint
    path = sorted(folder.glob("model*.safetensors"))[0]
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=re.escape(name)):
        check_weights(str(folder))


def test_quantized_checkpoints_are_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized"):
        load_config(ModelSpec(checkpoint=str(checkpoint)), ("a", "b"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_whatever_the_config_says(dtype, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name != "classifier.weight")
    save_file({**weights, name: weights[name].to(dtype)}, checkpoint / "model.safetensors")
    with pytest.raises(ModelError, match="quantized"):
        load_config(ModelSpec(checkpoint=str(checkpoint)), ("a", "b"))


@pytest.mark.parametrize(
    "values",
    [
        {"id2label": ["a", "b"]},
        {"dtype": "float99"},
        {"hidden_size": "16"},
        {"num_attention_heads": 0},
        {"hidden_act": "no such"},
    ],
)
def test_values_of_a_config_that_can_not_be_are_told_in_one_line(values, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **values}))
    spec = ModelSpec(checkpoint=str(checkpoint))
    with pytest.raises(ModelError, match=r"config\.json") as error:
        load_skeleton(spec, load_config(spec, ("a", "b")))
    assert "\n" not in str(error.value)


def test_a_timm_model_without_preprocessing_is_refused(tmp_path):
    spec = ModelSpec(checkpoint=str(tiny.save(tmp_path / "timm", "timm_wrapper")))
    config = load_config(spec, ("a", "b"))
    config.pretrained_cfg = {}
    with pytest.raises(ModelError, match="pretrained_cfg"):
        load_processor(spec, config)


def test_a_file_of_a_checkpoint_is_no_checkpoint(checkpoint):
    with pytest.raises(ModelError, match=f"name the folder that it is in: {checkpoint}"):
        check_files(str(checkpoint / "model.safetensors"))


def test_a_folder_of_models_or_runs_names_them(checkpoint):
    (checkpoint.parent / "run").mkdir()
    (checkpoint.parent / "run/recipe.yaml").touch()
    with pytest.raises(ModelError, match=r"name one of them: run, vit$"):
        check_files(str(checkpoint.parent))

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants

from hfft.errors import ModelError
from hfft.inference.classifier import Classifier
from hfft.inference.opening import open_model
from hfft.model.adapters import attach, merge, save_adapter
from hfft.model.checkpoint import reopen
from hfft.recipe.spec import AdapterSpec

COMMIT, OLDER = "c" * 40, "a" * 40


def pixels():
    return torch.randn(2, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.inference_mode():
        return model(pixel_values=pixels().to(model.dtype)).logits.float()


@pytest.fixture
def hub():
    """`hub(folder, "me/cells", COMMIT, "main")`: a folder where huggingface_hub keeps what it has downloaded."""
    made = []

    def put(folder, repo_id, commit, revision):
        repository = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
        made.append(repository)
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)

    yield put
    for repository in made:
        shutil.rmtree(repository, ignore_errors=True)


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter that does something, and the logits of the model with it."""
    base = tiny.save(tmp_path / "base", "vit", classes=2)
    plain, processor = reopen(base)
    model = attach(plain, AdapterSpec())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_adapter(model, processor, tmp_path / "adapter", base=str(base), revision=None)
    return tmp_path / "adapter", logits(merge(model).eval())


def test_a_model_folder(tmp_path):
    model, _ = open_model(str(tiny.save(tmp_path / "vit", "vit")))
    assert torch.equal(logits(model), logits(tiny.build("vit", 10)))
    assert not model.training


def test_an_adapter_folder(adapter):
    folder, expected = adapter
    torch.testing.assert_close(logits(open_model(str(folder))[0]), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(tiny.build("vit", 2)), atol=0.1)  # it is not the base alone


def test_a_hub_id_and_its_revisions(tmp_path, hub):
    now, before = tiny.save(tmp_path / "now", "vit"), tiny.save(tmp_path / "before", "vit", classes=3)
    hub(now, "me/cells", COMMIT, "main")
    hub(before, "me/cells", OLDER, "v1")
    for revision, classes in ((None, 10), ("main", 10), ("v1", 3), (OLDER, 3)):
        classifier = Classifier.from_pretrained("me/cells", revision=revision)
        assert torch.equal(logits(classifier.model), logits(tiny.build("vit", classes)))


def test_an_adapter_on_the_hub(adapter, hub):
    folder, expected = adapter
    hub(folder, "me/cells-lora", COMMIT, "main")
    torch.testing.assert_close(logits(Classifier.from_pretrained("me/cells-lora").model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "revision", "reason"),
    [
        ("nobody/none", None, "nobody/none is no folder here, and it was not downloaded before, and the Hub"),
        ("nobody/none", "v2", "it was not downloaded before at revision 'v2'"),
        ("./none", None, "./none is no folder here, and it is no Hub id either"),
        ("a/b/c", None, "a/b/c is no folder here, and it is no Hub id either"),
    ],
)
def test_a_source_that_is_not_there(source, revision, reason):
    with pytest.raises(ModelError, match=reason):
        open_model(source, revision=revision)


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ModelError, match="revision, found 'v1'"):
        open_model(str(tmp_path), revision="v1")


def test_a_repository_that_is_no_model_is_called_by_its_name(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    hub(tmp_path / "empty", "me/nothing", COMMIT, "main")
    with pytest.raises(ModelError, match="me/nothing") as caught:
        open_model("me/nothing")
    assert str(constants.HF_HUB_CACHE) not in str(caught.value)


def test_adapters_that_lack_something(adapter):
    folder, _ = adapter
    (folder / "adapter_model.safetensors").rename(folder / "kept")
    with pytest.raises(ModelError, match="adapter: the adapter can't be loaded: "):
        open_model(str(folder))
    (folder / "kept").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter: the adapter has no config.json, so nobody can know its labels"):
        open_model(str(folder))


def test_an_adapter_without_its_base_says_so(adapter):
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nobody/none"}))
    with pytest.raises(ModelError, match="what the adapter sits on can't be loaded"):
        open_model(str(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_another_type_of_number(dtype, tmp_path):
    folder = tiny.save(tmp_path / "vit", "vit")
    classifier = Classifier.from_pretrained(folder, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in classifier.model.parameters()} == {torch.bfloat16}
    picture = torch.rand(40, 40, 3)
    near, exact = (one(picture, top=10).top for one in (classifier, Classifier.from_pretrained(folder)))
    assert near == pytest.approx(exact, abs=0.02)
    assert near != exact


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cud"}, "device: cud can't be used: "),
        ({"device": "meta"}, "device: meta can't be used: .*; here is: cpu"),
        ({"dtype": "float31"}, "dtype: found float31; allowed: float32, bfloat16, float16, float64"),
        ({"dtype": "int8"}, "dtype: found int8; allowed: float32"),
    ],
)
def test_devices_and_types_that_do_not_exist(options, reason, tmp_path):
    with pytest.raises(ModelError, match=reason):
        Classifier.from_pretrained(tiny.save(tmp_path / "vit", "vit"), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_an_accelerator_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="device: cuda can't"):
        Classifier.from_pretrained(tiny.save(tmp_path / "vit", "vit"), device="cuda")

import json

import pytest
import tiny
from PIL import Image

from hfft.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("checkpoints") / "vit", "vit")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path, checkpoint, photos):
    """Writes recipe.yaml: a small valid one over `photos`, with top-level keys and keys of its only phase replaced."""

    def write(*, phase=None, **keys):
        if "data" not in keys:
            photos()
        content = {
            "name": "mini",
            "model": {"checkpoint": str(checkpoint)},
            "data": {"source": "photos"},
            "phases": [{"name": "head", "num_train_epochs": 1, "learning_rate": 0.01, **(phase or {})}],
            **keys,
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return "recipe.yaml"

    return write


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that must be refused, and returns what it says."""

    def run(*arguments):
        before = everything(tmp_path)
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return check_refusal(code, captured.out, captured.err, before=before, after=everything(tmp_path))

    return run


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_refusal(code, out, err, *, before, after):
    assert code == 2, err
    assert "Traceback" not in out + err
    assert out == ""
    assert after == before  # no run folder, no partial file, nothing overwritten
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return err[err.index("error: ") :]


# What the recipe's text shows


def test_a_typo_in_a_real_process(tmp_path, recipe, hfft_command):
    name = recipe(phase={"learning_rte": 0.1}, nmae="x")
    before = everything(tmp_path)
    done = hfft_command("train", name, fresh=True)
    message = check_refusal(done.returncode, done.stdout, done.stderr, before=before, after=everything(tmp_path))
    assert message == (
        "error: recipe.yaml: 2 problems\n"
        "  phases.head.learning_rte: unknown key; did you mean 'learning_rate'?\n"
        "  nmae: unknown key; did you mean 'name'?\n"
    )


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_recipe_that_is_not_there(verb, refused):
    assert "none.yaml: the recipe can't be read" in refused(verb, "none.yaml")


def test_an_override_of_a_phase_that_is_not_there(recipe, refused):
    message = refused("train", recipe(), "phases.body.learning_rate=1")
    assert "override 'phases.body.learning_rate=1': no phase is called 'body'; the phases are: head" in message


@pytest.mark.parametrize("option", [["predict", "m", "i", "--top", "0"], ["plan", "r", "--processes", "0"]])
def test_counts_are_above_zero(option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(option)
    assert caught.value.code == 2
    assert f"argument {option[-2]}: found '0'; allowed: a whole number above 0" in capsys.readouterr().err


# What the names of the images show


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_missing_data_folder(verb, recipe, refused):
    message = refused(verb, recipe(data={"source": "./fotos"}))
    assert message.startswith("error: data.source: the folder ./fotos does not exist; looked for ")


def test_a_data_folder_that_looks_like_a_hub_name(recipe, refused):
    message = refused("train", recipe(data={"source": "fotos"}))
    assert message.startswith("error: data.source: fotos ")


def test_a_class_folder_without_images(tmp_path, recipe, refused):
    name = recipe()
    (tmp_path / "photos" / "dog").mkdir()
    message = refused("train", name)
    assert message == "error: photos/dog: the class folder holds no images; add some or remove the folder\n"


def test_an_empty_data_folder(tmp_path, recipe, refused):
    (tmp_path / "empty").mkdir()
    message = refused("train", recipe(data={"source": "empty"}))
    assert message == "error: empty: found no class folders; allowed: one folder of images per class\n"


def test_split_folders_that_are_empty(tmp_path, recipe, refused):
    for split in ("train", "test"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    assert "empty/test: the class folder holds no images" in refused("train", recipe(data={"source": "empty"}))


# What the pixels show


def test_a_file_that_is_no_image_in_a_real_process(tmp_path, recipe, hfft_command):
    name = recipe()
    (tmp_path / "photos" / "ant" / "005.png").write_text("words")
    before = everything(tmp_path)
    done = hfft_command("train", name, "data.bad_images=stop")
    message = check_refusal(done.returncode, done.stdout, done.stderr, before=before, after=everything(tmp_path))
    assert message == (
        "error: photos: 1 file is no readable image; repair or remove:\n"
        "  ant/005.png: not an image in any format that hfft reads\n"
    )


def test_truncated_images_are_listed_together(tmp_path, recipe, refused):
    name = recipe()
    for file in ("ant/005.png", "cat/000.png"):
        path = tmp_path / "photos" / file
        path.write_bytes(path.read_bytes()[:-800])
    first, *lines = refused("train", name, "data.bad_images=stop").splitlines()
    assert first == "error: photos: 2 files are no readable image; repair or remove:"
    assert sorted(line.partition(": ")[0].strip() for line in lines) == ["ant/005.png", "cat/000.png"]
    assert all("truncated" in line for line in lines)


# What the checkpoint's config shows


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize("name", ["./no-such-model", "no/such/model", "nobody/no-such-model", "no-such-model"])
def test_an_unknown_checkpoint(verb, name, recipe, refused):
    message = refused(verb, recipe(model={"checkpoint": name}))
    assert message.startswith(f"error: model.checkpoint: {name} ")
    assert len(message.splitlines()) == 1


def test_a_checkpoint_folder_that_is_none(tmp_path, recipe, refused):
    (tmp_path / "nothing").mkdir()
    message = refused("train", recipe(model={"checkpoint": "nothing"}))
    assert "model.checkpoint: nothing gave no image classifier" in message


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_more_blocks_than_the_network_has(verb, recipe, refused):
    message = refused(verb, recipe(phase={"unfreeze": {"blocks": 99}}))
    assert message.startswith("error: phases.head: ")
    assert "99" in message
    assert "4" in message  # tiny ViT's blocks


def test_a_part_that_the_network_does_not_have(recipe, refused):
    message = refused("train", recipe(phase={"unfreeze": {"parts": ["block 7"]}}))
    assert message == ("error: phases.head: no part is called 'block 7'; the parts are stem, block 0..3, norm, head\n")


# What transformers refuses


def test_an_unknown_metric(recipe, refused):
    message = refused("train", recipe(phase={"metric_for_best_model": "f1"}))
    assert message.startswith("error: phases.head.metric_for_best_model: found 'f1'; allowed: accuracy, ")


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"fp16": True, "bf16": True}, "fp16"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"logging_strategy": "steps", "dataloader_prefetch_factor": 2, "dataloader_num_workers": 0}, "prefetch"),
        ({"optim": "adamm"}, "adamm"),
        ({"lr_scheduler_type": "cosinus"}, "cosinus"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_arguments_that_transformers_refuses(phase, words, recipe, refused):
    message = refused("train", recipe(phase=phase))
    assert message.startswith("error: phases.head: ")
    assert words in message


# Run folders


def test_a_run_folder_of_another_recipe(tmp_path, recipe, refused):
    name = recipe()
    (tmp_path / "runs" / "mini").mkdir(parents=True)
    (tmp_path / "runs" / "mini" / "recipe.yaml").write_text("name: mini\nseed: 3\n")
    message = refused("train", name)
    assert message.startswith("error: runs/mini holds a run of another recipe; --overwrite replaces it, name=...")
    assert "\n  -seed: 3\n" in message


def test_a_folder_that_is_no_run(tmp_path, recipe, refused):
    (tmp_path / "runs" / "mini").mkdir(parents=True)
    (tmp_path / "runs" / "mini" / "thesis.txt").write_text("precious")
    assert "runs/mini exists and is no run folder" in refused("train", recipe())


# predict and evaluate


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 44), "red").save(tmp_path / "red.png")
    return "red.png"


def test_predict_on_a_missing_file(checkpoint, refused):
    assert refused("predict", checkpoint, "none.png") == "error: none.png: no such file or folder\n"


def test_predict_on_what_is_no_image(tmp_path, checkpoint, image, refused):
    (tmp_path / "words.png").write_text("words")
    message = refused("predict", checkpoint, image, "words.png")
    assert message == "error: words.png: not an image in any format that hfft reads\n"


def test_predict_on_a_folder_without_images(tmp_path, checkpoint, refused):
    (tmp_path / "empty").mkdir()
    assert refused("predict", checkpoint, "empty") == "error: empty: the folder holds no images\n"


def test_predict_with_a_folder_that_is_no_model_in_a_real_process(tmp_path, image, hfft_command):
    (tmp_path / "nothing").mkdir()
    before = everything(tmp_path)
    done = hfft_command("predict", "nothing", image, fresh=True)
    message = check_refusal(done.returncode, done.stdout, done.stderr, before=before, after=everything(tmp_path))
    assert message.startswith("error: ")
    assert "nothing gave no image classifier" in message


@pytest.mark.parametrize("name", ["./no-model", "nobody/no-model"])
def test_predict_with_a_model_that_is_not_there(name, image, refused):
    message = refused("predict", name, image)
    assert f"{name} " in message
    assert len(message.splitlines()) == 1


def test_predict_with_a_run_that_is_not_finished(tmp_path, image, refused):
    (tmp_path / "runs" / "mini").mkdir(parents=True)
    (tmp_path / "runs" / "mini" / "recipe.yaml").write_text("name: mini\n")
    assert "runs/mini: this run is not finished; run its `hfft train` command" in refused(
        "predict", "runs/mini", image
    )


def test_evaluate_on_classes_that_the_model_does_not_know(checkpoint, photos, refused):
    photos({"LABEL_1": 2, "yak": 2})
    message = refused("evaluate", checkpoint, "--data", "photos")
    assert message.startswith("error: photos: the model does not know the classes yak; it knows LABEL_0, LABEL_1, ")


def test_evaluate_on_a_missing_folder(checkpoint, refused):
    message = refused("evaluate", checkpoint, "--data", "./none")
    assert message.startswith("error: data.source: the folder ./none does not exist; looked for ")


def test_evaluate_on_a_split_that_is_not_there(checkpoint, photos, refused):
    photos({"LABEL_1": 2, "LABEL_2": 2})
    message = refused("evaluate", checkpoint, "--data", "photos", "--split", "test")
    assert message == "error: photos: there is no split 'test'; found: train\n"


def test_evaluate_a_model_folder_without_data(checkpoint, refused):
    assert f"{checkpoint} is no run folder" in refused("evaluate", checkpoint)


def test_evaluate_on_a_broken_image(tmp_path, checkpoint, photos, refused):
    photos({"LABEL_1": 2, "LABEL_2": 2})
    (tmp_path / "photos" / "LABEL_2" / "001.png").write_text("words")
    message = refused("evaluate", checkpoint, "--data", "photos", "--bad-images", "stop")
    assert message == (
        "error: photos: 1 file is no readable image; repair or remove:\n"
        "  LABEL_2/001.png: not an image in any format that hfft reads\n"
    )

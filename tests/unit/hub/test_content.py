import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pushable
import pytest

from hfft.errors import HubError
from hfft.hub.content import (
    File,
    check_base,
    collect,
    fill_card,
    parts,
    refuse_secret,
)
from hfft.recipe.loading import dump_recipe, load_recipe
from hfft.recipe.spec import HubSpec

MODEL = {"config.json": "{}", "model.safetensors": "w", "preprocessor_config.json": "{}"}
ADAPTER = {
    "adapter_config.json": json.dumps({"base_model_name_or_path": "google/vit", "revision": "main", "r": 8}),
    "adapter_model.safetensors": "a",
    "config.json": "{}",
    "preprocessor_config.json": "{}",
}
CARD = """# cells

```python
from transformers import pipeline

classify = pipeline("image-classification", model="this/folder")
```

```python
print("another example")
```
"""


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def make(tmp_path):
    """A run folder with the files that matter here, and its recipe."""

    def run(**changes):
        recipe = load_recipe(pushable.recipe(tmp_path, **{"checkpoint": "google/vit", **changes}))
        folder = tmp_path / "runs" / "cells"
        adapter = recipe.phases[-1].adapter
        write(folder, {"recipe.yaml": dump_recipe(recipe), "environment.json": "{}", "metrics.json": "{}"})
        write(folder, {"predictions.parquet": "rows", "data.json": "{}", "0-head/checkpoint-1/optimizer.pt": "p"})
        if adapter is None or adapter.merge:
            write(folder / "model", {**MODEL, "README.md": CARD})
        if adapter is not None:
            write(folder / "adapter", {**ADAPTER, **({} if adapter.merge else {"README.md": CARD})})
        return folder, recipe

    return run


def paths(files):
    return {file.path for file in files}


COMMON = {"README.md", "recipe.yaml", "metrics.json"}


@pytest.mark.parametrize(
    ("merge", "what", "expected"),
    [
        (True, None, {*MODEL, *COMMON}),
        (True, "model", {*MODEL, *COMMON}),
        (True, "adapter", {*ADAPTER, *COMMON}),
        (True, "both", {*MODEL, *(f"adapter/{name}" for name in ADAPTER), *COMMON}),
        (False, None, {*ADAPTER, *COMMON}),
    ],
)
def test_what_goes_where(merge, what, expected, make):
    folder, recipe = make(merge=merge)
    assert paths(collect(folder, recipe, HubSpec(what=what), "me/cells", recipe)) == expected


@pytest.mark.parametrize(
    ("phases", "what", "words"),
    [
        (slice(0, 1), "adapter", "what: found adapter, but this run ends with model and no adapter; allowed: model"),
        (slice(0, 1), "both", "and no adapter; allowed: model"),
        (slice(0, 2), "model", "this run ends with adapter and no model; allowed: adapter"),
    ],
)
def test_what_the_run_does_not_have(phases, what, words, make, tmp_path):
    entries = pushable.recipe(tmp_path, merge=False)["phases"][phases]
    _, recipe = make(phases=entries)
    with pytest.raises(HubError, match=words):
        parts(recipe, what)


def test_an_adapter_that_did_not_help_is_not_there(make):
    folder, recipe = make(merge=True)
    shutil.rmtree(folder / "adapter")
    kept = {"reason": "lora did not improve validation accuracy (0.9 after head): model/ is that of head"}
    (folder / "metrics.json").write_text(json.dumps({"kept": kept}))
    with pytest.raises(HubError, match=r"what: both: .* has no adapter/ \(lora did not improve .*\); allowed: model"):
        collect(folder, recipe, HubSpec(what="both"), "me/cells", recipe)


def test_figures_and_example_images_go_along(make):
    folder, recipe = make()
    write(folder, {"figures/confusion.png": "p", "figures/confusion.svg": "s", "model/examples/ant.jpg": "j"})
    found = {file.path: file.source for file in collect(folder, recipe, HubSpec(), "me/cells", recipe)}
    assert {"figures/confusion.png", "figures/confusion.svg", "examples/ant.jpg"} <= set(found)
    assert found["examples/ant.jpg"] == folder / "model/examples/ant.jpg"


def test_training_images_stay_here(make):
    folder, recipe = make()
    write(folder, {"figures/first_batch.png": "p", "figures/confusion.png": "p"})
    assert paths(collect(folder, recipe, HubSpec(), "me/cells", recipe)) == {*MODEL, *COMMON, "figures/confusion.png"}


def test_an_export_beside_the_weights_stays_here_as_a_whole(make, caplog):
    folder, recipe = make()
    write(folder / "model", {"onnx/model.onnx": "o", "onnx/config.json": "{}", "onnx/onnx_predict.py": "text"})
    with caplog.at_level(logging.INFO, "hfft"):
        assert paths(collect(folder, recipe, HubSpec(), "me/cells", recipe)) == {*MODEL, *COMMON}
    assert "onnx/config.json, onnx/model.onnx, onnx/onnx_predict.py" in caplog.text


def test_what_the_card_shows_goes_with_it(make):
    """The card of a merged run lies beside its model, and goes with the adapter too."""
    folder, recipe = make()
    write(folder / "model", {"figures/confusion.png": "p", "examples/ant.jpg": "j"})
    found = paths(collect(folder, recipe, HubSpec(what="adapter"), "me/cells", recipe))
    assert found == {*ADAPTER, *COMMON, "figures/confusion.png", "examples/ant.jpg"}


def test_pickles_and_hidden_files_stay_here_and_are_named(make, caplog):
    folder, recipe = make()
    pickles = ("training_args.bin", "optimizer.pt", "rng_state.pth", "deep/more.pkl")
    write(folder / "model", {**dict.fromkeys(pickles, "p"), ".cache/x.json": "{}", "LICENSE": "text"})
    with caplog.at_level(logging.INFO, "hfft"):
        found = paths(collect(folder, recipe, HubSpec(), "me/cells", recipe))
    assert found == {*MODEL, *COMMON, "LICENSE"}
    assert "deep/more.pkl, optimizer.pt, rng_state.pth, training_args.bin" in caplog.text


def test_the_recipe_is_the_one_that_others_may_see(make):
    folder, recipe = make()
    shared = dataclasses.replace(recipe, output_dir="elsewhere")
    files = {file.path: file.source for file in collect(folder, recipe, HubSpec(), "me/cells", shared)}
    assert files["recipe.yaml"] == dump_recipe(shared).encode()


def test_the_card_names_the_repository(make):
    folder, recipe = make()
    files = {file.path: file.source for file in collect(folder, recipe, HubSpec(), "me/cells", recipe)}
    assert files["README.md"].decode() == CARD.replace("this/folder", "me/cells")
    assert (folder / "model/README.md").read_text() == CARD


def test_the_card_of_an_adapter_alone_shows_what_opens_it():
    text = fill_card(CARD, "me/lora", "google/vit")
    assert "pipeline(" not in text
    assert 'hfft.Classifier.from_pretrained("me/lora")  # loads `google/vit` too' in text
    assert 'print("another example")' in text


def test_an_adapter_in_a_folder_of_its_own_is_shown_there():
    text = fill_card(CARD, "me/lora", "google/vit", inside="adapter")
    assert 'hfft.Classifier.from_pretrained("me/lora", subfolder="adapter")' in text


def test_an_adapter_on_a_folder_is_refused(make, tmp_path):
    folder, recipe = make(checkpoint=str(tmp_path / "vit"))
    local = json.dumps({"base_model_name_or_path": str(tmp_path / "vit"), "revision": None})
    write(folder / "adapter", {"adapter_config.json": local})
    with pytest.raises(HubError, match=r"adapter sits on .*/vit"):
        collect(folder, recipe, HubSpec(what="adapter"), "me/cells", recipe)
    spec = HubSpec(what="both", base_model="google/vit")
    files = {file.path: file.source for file in collect(folder, recipe, spec, "me/cells", recipe)}
    assert json.loads(files["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": "google/vit",
        "revision": None,
    }
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] != "google/vit"


def test_an_adapter_that_nobody_could_open_is_refused_before_training(make, tmp_path):
    (tmp_path / "vit").mkdir()
    _, on_folder = make(checkpoint=str(tmp_path / "vit"))
    with pytest.raises(HubError, match=r"the adapter sits on the folder .*vit, which nobody else can open"):
        check_base(on_folder, HubSpec(what="adapter"))
    check_base(on_folder, HubSpec())  # the model is whole
    check_base(on_folder, HubSpec(what="adapter", base_model="google/vit"))
    phases = pushable.recipe(tmp_path)["phases"]
    _, on_blocks = make(phases=[{**phases[0], "unfreeze": "all"}, phases[1]])
    with pytest.raises(HubError, match="the adapter sits on the weights that the phases before it trained"):
        check_base(on_blocks, HubSpec(what="both"))
    _, on_hub = make()
    check_base(on_hub, HubSpec(what="both"))


def test_the_token_is_never_sent():
    files = [File("model.safetensors", b"hf_mine"), File("recipe.yaml", b"source: https://me:hf_mine@here/")]
    with pytest.raises(HubError, match=r"recipe\.yaml holds the token") as caught:
        refuse_secret(files, "hf_mine")
    assert "hf_mine" not in str(caught.value)
    refuse_secret(files, "hf_another")


def test_a_file_s_hash_is_that_of_its_content(tmp_path):
    (tmp_path / "x").write_bytes(b"content" * 300_000)
    assert File("x", tmp_path / "x").sha256 == File("x", Path(tmp_path / "x").read_bytes()).sha256

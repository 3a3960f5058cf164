"""A checkpoint with Python code of its own: run only where a recipe or a user says so, and then everywhere."""

import json
import shutil

import hub_server
import numpy as np
import pushable
import pytest
import strange_net
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

import hfft
from hfft.__main__ import main
from hfft.data.images.decoding import decode
from hfft.errors import ModelError
from hfft.model.checkpoint import load_checkpoint, save_model
from hfft.model.remote_code import own_code
from hfft.recipe.spec import ModelSpec
from hfft.replay.split_point import split_point_at

LOUD = '''
from transformers import ViTForImageClassification


class LoudViT(ViTForImageClassification):
    """Answers that nobody can take for those of transformers' own ViT."""

    def forward(self, pixel_values=None, labels=None, **more):
        output = super().forward(pixel_values=pixel_values, **more)
        output.logits = 3 - output.logits
        return output
'''


def save_loud(folder, reference="modeling_loud.LoudViT"):
    tiny.save(folder, "vit", classes=10)
    (folder / "modeling_loud.py").write_text(LOUD)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForImageClassification": reference}, "architectures": ["LoudViT"]}
    (folder / "config.json").write_text(json.dumps(config))


def save_strange(folder):
    """A checkpoint of an architecture that transformers doesn't know."""
    torch.manual_seed(0)
    strange_net.StrangeNet(strange_net.StrangeConfig(num_labels=10)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    shutil.copy(strange_net.__file__, folder / "strange_net.py")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "StrangeConfig", "AutoModelForImageClassification": "StrangeNet"}
    config["auto_map"] = {auto: f"strange_net.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    place = tmp_path_factory.mktemp("loud")
    pushable.make_photos(place / "photos")
    save_loud(place / "vit")
    model = {"checkpoint": str(place / "vit"), "trust_remote_code": True}
    phases = [{"name": "head", "unfreeze": "head", "learning_rate": 1e-2}]
    return hfft.finetune(hfft.load_recipe(pushable.recipe(place, model=model, phases=phases))).folder


def plain_logits(folder, classifier, image):
    """What the same weights answer without the code."""
    plain = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False).eval()
    assert type(plain).__name__ == "ViTForImageClassification"
    with torch.inference_mode():
        return plain(pixel_values=classifier.transform(decode(str(image))).unsqueeze(0)).logits[0].numpy()


def test_a_run_is_scored_and_opened_with_the_code_that_it_was_trained_with(loud):
    image = next((loud.parent.parent / "photos" / "test" / "amber").iterdir())
    classifier = hfft.Classifier.from_pretrained(loud, trust_remote_code=True)
    assert type(classifier.model).__name__ == "LoudViT"
    [answer] = classifier([image], top=2)
    logits = 3 - plain_logits(loud / "model", classifier, image)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [answer.top[name] for name in classifier.classes] == pytest.approx(expected.tolist(), abs=1e-5)

    scores = hfft.evaluate(loud, trust_remote_code=True)
    told = json.loads((loud / "metrics.json").read_text())["test"]["log_loss"]["value"]
    assert scores.metrics["log_loss"]["value"] == pytest.approx(told, abs=1e-6)
    assert 'model="this/folder", trust_remote_code=True' in (loud / "model" / "README.md").read_text()


@pytest.mark.parametrize("replay", ["off", "force"])
def test_an_architecture_of_its_own_is_trained_in_phases_and_opened(replay, tmp_path):
    pushable.make_photos(tmp_path / "photos")
    save_strange(tmp_path / "strange")
    phases = [
        {"name": "head", "unfreeze": "head", "learning_rate": 1e-2},
        {"name": "last", "unfreeze": {"blocks": 1}, "learning_rate": 1e-3},
    ]
    model = {"checkpoint": str(tmp_path / "strange"), "trust_remote_code": True}
    recipe = pushable.recipe(tmp_path, model=model, phases=phases, replay={"mode": replay})
    run = hfft.finetune(hfft.load_recipe(recipe))
    before = load_file(tmp_path / "strange" / "model.safetensors")
    after = load_file(run.folder / "model" / "model.safetensors")
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in changed} == {
        *("answer", "last_norm", "levels.1.steps.1.spread", "levels.1.steps.1.norm"),
    }
    scores = hfft.evaluate(run.folder, trust_remote_code=True)
    assert scores.metrics["log_loss"]["value"] == pytest.approx(run.metrics["test"]["log_loss"]["value"], abs=1e-6)


def test_a_model_with_code_is_not_opened_without_it_and_without_trust(loud, capsys):
    with pytest.raises(ModelError, match=r"brings Python code of its own.*modeling_loud.*trust_remote_code=True"):
        hfft.Classifier.from_pretrained(loud / "model")
    trusted = hfft.Classifier.from_pretrained(loud / "model", trust_remote_code=True)
    assert type(trusted.model).__name__ == "LoudViT"

    photos = str(loud.parent.parent / "photos" / "test")
    for verb in (("predict", photos), ("evaluate", "--data", photos)):
        assert main([verb[0], str(loud / "model"), *verb[1:]]) == 2
        assert "--trust-remote-code" in capsys.readouterr().err
        assert main([verb[0], str(loud / "model"), *verb[1:], "--trust-remote-code"]) == 0


def test_code_goes_to_the_hub_and_is_trusted_there_by_a_user_alone(loud, tmp_path, monkeypatch):
    with hub_server.running() as hub:
        hub.add_user("me", "hf_mine")
        hub_server.connect(hub, monkeypatch, tmp_path / "home")
        with pytest.raises(ModelError, match="trust_remote_code=True"):
            hfft.push(loud, "me/loud")
        assert hub.asked("me/loud") == []
        hfft.push(loud, "me/loud", trust_remote_code=True)
        assert "modeling_loud.py" in hub.files("me/loud")
        with pytest.raises(ModelError, match="trust_remote_code=True"):  # the recipe there trusts it, which counts not
            hfft.Classifier.from_pretrained("me/loud")
        opened = hfft.Classifier.from_pretrained("me/loud", trust_remote_code=True)
        assert type(opened.model).__name__ == "LoudViT"


@pytest.mark.parametrize("reference", ["modeling_loud.LoudViT", "me/base--modeling_loud.LoudViT"])
def test_an_adapter_on_a_checkpoint_of_the_hub_is_opened_with_its_code(reference, tmp_path, monkeypatch):
    save_loud(tmp_path / "vit", reference)
    pushable.make_photos(tmp_path / "photos")
    with hub_server.running() as hub:
        hub.add_repository("me/base", **{path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()})
        hub_server.connect(hub, monkeypatch, tmp_path / "home")
        model = {"checkpoint": "me/base", "trust_remote_code": True}
        phases = [{"name": "lora", "adapter": {"on": "attention", "merge": False}, "learning_rate": 1e-2}]
        recipe = pushable.recipe(tmp_path, model=model, phases=phases, report=False)
        run = hfft.finetune(hfft.load_recipe(recipe))
        for source in (run.folder, run.folder / "adapter"):
            with pytest.raises(ModelError, match=r"brings Python code.*modeling_loud.*trust_remote_code=True"):
                hfft.Classifier.from_pretrained(source)
            opened = hfft.Classifier.from_pretrained(source, trust_remote_code=True)
            assert type(opened.model).__name__ == "LoudViT"


RUNS_CODE = (
    ("predict", "{run}", "{photos}"),
    ("evaluate", "{run}"),
    ("evaluate", "{run}", "--data", "{photos}"),
    ("export", "{run}", "--output", "{out}"),
    ("push", "{run}", "me/x"),
    ("demo", "{run}"),
    ("demo", "{run}", "--space", "{out}"),
)


@pytest.mark.parametrize("words", RUNS_CODE, ids=" ".join)
def test_a_run_folder_runs_its_code_for_nobody_who_does_not_say_so(words, loud, tmp_path, monkeypatch, capsys):
    """Its own recipe trusts the code; whoever made the folder wrote that."""
    monkeypatch.setattr("hfft.hub.pushing.reach", None)  # nothing is asked of the Hub before
    monkeypatch.setattr("hfft.inference.demo.require", lambda *_: None)
    ran = []
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_in_module", lambda *_, **__: ran.append(1))
    places = {"run": loud, "photos": loud.parent.parent / "photos" / "test", "out": tmp_path / "out"}
    assert main([word.format(**places) for word in words]) == 2
    assert "modeling_loud.py" in capsys.readouterr().err
    assert not ran
    assert not (tmp_path / "out").exists()


def test_a_report_of_a_run_leaves_its_code_alone(loud, monkeypatch, capsys):
    shutil.rmtree(loud / "mistakes", ignore_errors=True)
    ran = []
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_in_module", lambda *_, **__: ran.append(1))
    assert main(["report", str(loud)]) == 0
    assert not ran


@pytest.mark.parametrize("where", ["network", "processor"])
def test_a_checkpoint_with_code_is_not_trained_as_something_else(where, tmp_path, capsys):
    pushable.make_photos(tmp_path / "photos")
    save_loud(tmp_path / "vit")
    if where == "processor":
        tiny.save(tmp_path / "vit", "vit", classes=10)
        path = tmp_path / "vit" / "preprocessor_config.json"
        told = {**json.loads(path.read_text()), "auto_map": {"AutoImageProcessor": "loud.LoudProcessor"}}
        told.pop("image_processor_type")
        path.write_text(json.dumps(told))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(pushable.recipe(tmp_path, checkpoint=str(tmp_path / "vit"))))
    for verb in ("plan", "train"):
        assert main([verb, str(recipe)]) == 2
        assert "model.trust_remote_code: true" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_network_of_transformers_loses_the_reference_to_code_that_was_not_used(tmp_path):
    """Whoever opens it and trusts the checkpoint's code would get another network."""
    save_loud(tmp_path / "vit", "me/base--modeling_loud.LoudViT")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config["architectures"] = ["ViTForImageClassification"]
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    model, processor = load_checkpoint(ModelSpec(checkpoint=str(tmp_path / "vit")), ("a", "b"))
    save_model(model, processor, tmp_path / "result")
    assert "auto_map" not in json.loads((tmp_path / "result" / "config.json").read_text())
    assert own_code(config) is None


def test_activations_of_edited_code_are_others(tmp_path):
    """The same weights and config, the same class name: the code alone was changed, or what it imports."""
    spec, pixels = ModelSpec(checkpoint=str(tmp_path / "vit"), trust_remote_code=True), torch.zeros(1, 3, 32, 32)
    found = {}
    for scale, helper in ((1, 1), (2, 1), (1, 2), (1, 1)):
        save_loud(tmp_path / "vit")
        edited = LOUD.replace("pixel_values=pixel_values", f"pixel_values={scale} * SCALE * pixel_values")
        (tmp_path / "vit" / "modeling_loud.py").write_text(f"from .loud_helper import SCALE\n{edited}")
        (tmp_path / "vit" / "loud_helper.py").write_text(f"SCALE = {helper}\n")
        model, _ = load_checkpoint(spec, ("a", "b"))
        assert type(model).__name__ == "LoudViT"
        fingerprint = split_point_at(model, "classifier", pixels).fingerprint
        assert found.setdefault((scale, helper), fingerprint) == fingerprint
    assert len(set(found.values())) == 3

import json
import os
import subprocess
import sys
from pathlib import Path

import pushable
import pytest
import tiny
from safetensors.numpy import load

import hfft
from hfft.cli import main
from hfft.inference.opening import open_model

MODEL = {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def train(tmp_path):
    """`train({"repo_id": "cells"})`: the command line on a small recipe with that hub section; its exit code."""
    pushable.make_photos(tmp_path / "photos")
    tiny.save(tmp_path / "vit", "vit", classes=10)

    def run(section, *words, **changes):
        (tmp_path / "recipe.yaml").write_text(
            json.dumps(pushable.recipe(tmp_path, hub=section, **{"report": False, **changes}))
        )
        return main(["train", str(tmp_path / "recipe.yaml"), *words])

    return run


def weights(run):
    return (Path(run) / "model" / "model.safetensors").read_bytes()


def test_a_run_is_pushed_when_it_ends_and_again_only_when_it_is_made_anew(train, hub, tmp_path, capsys, monkeypatch):
    assert train({"repo_id": "cells"}, report=True) == 0
    assert f"pushed to {hub.url}/me/cells (private, commit " in capsys.readouterr().err
    assert set(hub.files("me/cells")) == MODEL | pushable.shown(tmp_path / "runs/cells")
    assert len(hub.titles("me/cells")) == 2
    assert hfft.Run(tmp_path / "runs/cells").recipe.hub.repo_id == "cells"
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert train({"repo_id": "cells"}, report=True) == 0  # all is done, and nobody needs to be asked
    assert "is finished" in capsys.readouterr().err
    assert train({"repo_id": "cells"}, "seed=1", "--overwrite") == 0
    assert len(hub.titles("me/cells")) == 3


@pytest.mark.parametrize(
    ("section", "words", "code"),
    [
        ({"repo_id": "other/cells"}, "other/cells: me has no write access there", 2),
        ({"repo_id": "me/public"}, "me/public is there and public", 2),
        ({"repo_id": "cells", "what": "adapter"}, "the adapter sits on the folder ", 2),
        ({"repo_id": "me/adapters"}, "adapter_config.json: there already, not from hfft, and would be opened", 2),
        ({"repo_id": "cells", "token": "hf_mine"}, "hub.token: a recipe never holds a secret: use `hf auth login`", 2),
    ],
)
def test_what_can_not_be_pushed_is_not_trained(section, words, code, train, hub, tmp_path, capsys):
    hub.add_repository("me/public")
    hub.add_repository("me/adapters", private=True, **{"adapter_config.json": b"{}"})
    assert train(section) == code
    said = capsys.readouterr().err
    assert words in said
    assert "hf_mine" not in said
    assert not (tmp_path / "runs").exists()


def test_a_wrong_recipe_makes_no_repository(train, hub, capsys, tmp_path):
    assert train({"repo_id": "cells"}, "data.source=/nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert hub.repositories == {}


def test_no_network_is_said_before_torch_is_imported(train, hub, tmp_path, capsys):
    train({"repo_id": "cells"}, "data.source=/nowhere")  # writes the recipe
    code = (
        "import sys; from hfft.cli import main; found = main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(found)"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = [sys.executable, "-c", code, "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "False\n")
    assert "error: the Hub can't be reached (http://127.0.0.1:9: " in done.stderr
    assert "recipe trains with hub.repo_id=null" in done.stderr


def test_a_push_that_fails_after_training_is_finished_by_the_same_command(train, hub, tmp_path, capsys):
    hub.fail("POST", "/commit/", status=500)
    assert train({"repo_id": "cells"}, report=True) == 1
    said = capsys.readouterr().err
    run = tmp_path / "runs/cells"
    assert "me/cells: uploading: the Hub answered 500 (no luck)" in said
    assert f"finished and whole: {run}" in said
    before = pushable.contents(run)
    assert "metrics.json" in before
    hub.failures.clear()
    assert train({"repo_id": "cells"}, report=True) == 0
    assert "is finished" in capsys.readouterr().err
    assert set(hub.files("me/cells")) == MODEL | pushable.shown(run)
    assert pushable.contents(run) == before


def test_the_card_of_a_finished_run_changes_with_its_recipe_and_is_pushed_again(train, hub, tmp_path, capsys):
    run = tmp_path / "runs/cells"
    assert train({"repo_id": "cells"}, license="apache-2.0") == 0
    before = pushable.contents(run)
    capsys.readouterr()
    assert train({"repo_id": "cells"}, license="MIT", widget=2) == 0
    said = capsys.readouterr().err
    assert f"{run}: new card: license mit, widget 2\n{run} is finished" in said
    after = pushable.contents(run)
    assert {path for path in before if before[path] != after[path]} >= {
        "recipe.yaml",
        "metrics.json",
        "model/README.md",
    }
    kept = [path for path in before if path.startswith(("0-", "1-", "pred")) or path.endswith(".safetensors")]
    assert len(kept) > 3
    assert [after[path] for path in kept] == [before[path] for path in kept]
    pushed = hub.files("me/cells")
    assert b"\nlicense: mit\n" in pushed["README.md"]
    assert b"\nlicense: mit\n" in pushed["recipe.yaml"]
    assert {"examples/0.jpg", "examples/1.jpg"} <= set(pushed)
    assert b"src: examples/1.jpg" in pushed["README.md"]
    assert hfft.Run(run).recipe.widget == 2
    assert train({"repo_id": "cells"}, license="MIT") == 0
    assert not (run / "model/examples").exists()
    assert [path for path in hub.files("me/cells") if path.startswith("examples/")] == []
    assert len(hub.titles("me/cells")) == 4
    (tmp_path / "photos/test/blue/000.png").unlink()
    assert train({"repo_id": "cells"}, license="MIT", widget=1) == 2
    assert "the images aren't those of this run" in capsys.readouterr().err


def test_each_save_is_pushed_and_changes_nothing_of_the_training(train, hub, tmp_path):
    """The first phase's save is sent; in the second one, an adapter is merged in a copy."""
    assert train({"repo_id": "end"}, "name=end") == 0
    assert train({"repo_id": "saves", "hub_strategy": "every_save"}) == 0
    log = hub.repositories["me/saves"].branches["main"]
    assert [commit.title for commit in log[1:]] == [
        "Training in progress: 0-head, step 2",
        *(["Training in progress: 1-lora, step 2"] if len(log) == 4 else []),  # unless the first was still on its way
        log[-1].title,
    ]
    assert "fine-tuned with hfft" in log[-1].title
    assert set(log[1].files) - {".gitattributes", "hfft_files.json"} == MODEL
    model, _ = open_model("me/saves", revision=log[1].oid)
    assert list(model.config.id2label.values()) == list(pushable.CLASSES)
    assert weights(tmp_path / "runs/cells") == weights(tmp_path / "runs/end")


@pytest.mark.parametrize("replay", ["off", "force"])
def test_the_save_of_an_adapter_phase_is_a_plain_model(replay, train, hub, tmp_path):
    """With replay, the copy is made of a network whose front part answers from recordings."""
    phases = [{"name": "lora", "adapter": {"on": "attention", "blocks": 2}, "learning_rate": 1e-2}]
    section = {"repo_id": "cells", "hub_strategy": "every_save"}
    assert train(section, phases=phases, replay={"mode": replay, "engine": "torch"}) == 0
    first, last = hub.repositories["me/cells"].branches["main"][1:]
    assert first.title == "Training in progress: 0-lora, step 2"
    ours, sent = load(last.files["model.safetensors"]), load(first.files["model.safetensors"])
    assert set(ours) == set(sent)
    assert all(abs(ours[name] - sent[name]).max() < 1e-6 for name in ours)
    assert "adapter_config.json" not in first.files


def test_a_save_that_can_not_be_sent_ends_nothing(train, hub, capsys):
    failure = hub.fail("POST", "/commit/", status=503, times=1)
    assert train({"repo_id": "cells", "hub_strategy": "every_save"}) == 0
    said = capsys.readouterr().err
    assert failure.hits > 0
    assert "Training in progress: 0-head, step 2: not pushed, and training goes on: me/cells: uploading" in said

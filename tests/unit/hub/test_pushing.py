import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pushable
import pytest
import tiny
import torch
import transformers
from huggingface_hub.utils import _http

import hfft
from hfft.cli import main
from hfft.errors import HubError, PushError, RunError
from hfft.hub.pushing import push_run
from hfft.inference.opening import open_model
from hfft.recipe.spec import HubSpec

MODEL = {"config.json", "model.safetensors", "preprocessor_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "config.json", "preprocessor_config.json"}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A finished run with a model and an adapter, whose checkpoint is a folder."""
    return pushable.make_run(tmp_path_factory.mktemp("merged"))


@pytest.fixture
def no_waits(monkeypatch):
    """huggingface_hub tries again at once, where it would wait 23 s in all; gives what it would have waited."""
    waited = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waited.append))
    return waited


def put_base(hub, run):
    """The checkpoint of the run as a repository."""
    folder = run.parent.parent / "vit"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repository("me/vit", private=True, **files)


def test_a_push_is_one_commit_that_was_read_back(merged, hub):
    before = pushable.contents(merged)
    pushed = hfft.push(merged, "cells", commit_message="The first")
    assert set(hub.files("me/cells")) == {*MODEL, *pushable.shown(merged)}
    assert hub.titles("me/cells") == ["initial commit", "The first"]
    assert hub.repositories["me/cells"].private
    assert (pushed.repo_id, pushed.url, pushed.private) == ("me/cells", f"{hub.url}/me/cells", True)
    assert pushed.commit == hub.repositories["me/cells"].branches["main"][-1].oid
    assert pushed.files == len(hub.files("me/cells"))
    assert (pushed.images, pushed.from_data, pushed.largest_difference) == (4, True, 0.0)
    assert len(hub.asked(r"^GET .*/resolve/.*/model\.safetensors")) == 1
    assert b'model="me/cells"' in hub.files("me/cells")["README.md"]
    assert all(str(merged.parent).encode() not in content for content in hub.files("me/cells").values())
    assert pushable.contents(merged) == before
    record = json.loads((merged / "hub.json").read_text())
    assert [(entry["repo_id"], entry["commit"]) for entry in record] == [("me/cells", pushed.commit)]
    assert "hf_mine" not in (merged / "hub.json").read_text()


def test_what_is_the_same_is_not_sent_again(merged, hub):
    first = hfft.push(merged, "me/again")
    hub.requests.clear()
    second = hfft.Run(merged).push_to_hub("me/again")
    assert second == first
    assert len(hub.titles("me/again")) == 2
    assert hub.asked("^PUT") == hub.asked("/commit/") == []
    assert len(hub.asked(r"^GET .*/resolve/.*/model\.safetensors")) == 1  # and yet it was read back


def test_a_branch_and_a_pull_request(merged, hub):
    hfft.push(merged, "me/cells", revision="v2")
    assert hub.titles("me/cells") == ["initial commit"]
    assert set(hub.files("me/cells", "v2")) == {*MODEL, *pushable.shown(merged)}
    hub.add_repository("other/cells")
    pushed = hfft.push(merged, "other/cells", private=False, create_pr=True, commit_message="A model")
    assert hub.titles("other/cells") == ["initial commit"]
    assert set(hub.files("other/cells", "refs/pr/1")) == {*MODEL, *pushable.shown(merged)}
    assert pushed.url == f"{hub.url}/other/cells/discussions/1"
    assert not pushed.private


def test_model_and_adapter_together_and_each_alone(merged, hub):
    put_base(hub, merged)
    expected = {"model": MODEL, "adapter": ADAPTER, "both": {*MODEL, *(f"adapter/{name}" for name in ADAPTER)}}
    for what, names in expected.items():
        pushed = push_run(merged, HubSpec(repo_id=f"me/{what}", what=what, base_model="me/vit"))
        assert set(hub.files(f"me/{what}")) == {*names, *pushable.shown(merged)}
        assert pushed.largest_difference < 1e-5
        opens = 'Classifier.from_pretrained("' if what == "adapter" else 'pipeline("image-classification", model="'
        assert f'{opens}me/{what}")' in hub.files(f"me/{what}")["README.md"].decode()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = open_model(str(merged / "model"))[0](pixel_values=images).logits
        for name in ("me/model", "me/adapter", "me/both"):
            torch.testing.assert_close(open_model(name)[0](pixel_values=images).logits, ours, rtol=0, atol=1e-5)


def test_an_adapter_beside_a_model_is_opened_by_its_subfolder(merged, hub, tmp_path, capsys):
    put_base(hub, merged)
    hfft.push(merged, "me/both", what="both", base_model="me/vit")
    photos = merged.parent.parent / "photos/test"
    said = []
    for words in (["me/both"], ["me/both", "--subfolder", "adapter"], [str(merged), "--subfolder", "adapter"]):
        assert main(["predict", words[0], str(photos), "--format", "csv", *words[1:]]) == 0
        said.append(capsys.readouterr().out)
        assert main(["evaluate", words[0], "--data", str(photos), *words[1:]]) == 0
        capsys.readouterr()
    assert len(set(hub.asked(r"^GET .*/resolve/.*/adapter/adapter_model.safetensors"))) == 1
    numbers = [[float(cell) for cell in line.split(",")[-2:]] for text in said for line in text.splitlines()[1:]]
    assert len(numbers) == 3 * pushable.SPLITS["test"]
    np.testing.assert_allclose(numbers[:6] * 2, numbers[6:], atol=1e-5)
    assert main(["predict", "me/both", str(photos), "--subfolder", "lora"]) == 2
    assert "me/both has no folder lora" in capsys.readouterr().err


def test_a_base_with_other_weights_is_found_out(merged, hub):
    put_base(hub, merged)
    files = hub.repositories["me/vit"].branches["main"][-1].files
    weights = bytearray(files["model.safetensors"])
    header = 8 + int.from_bytes(weights[:8], "little")
    weights[header:] = np.random.default_rng(0).normal(size=(len(weights) - header) // 4).astype("<f4").tobytes()
    files["model.safetensors"] = bytes(weights)
    with pytest.raises(
        PushError, match=r"its logits differ from those of .*adapter by .*; is the adapter's base another"
    ):
        push_run(merged, HubSpec(repo_id="me/lora", what="adapter", base_model="me/vit"))


def test_only_what_a_push_of_ours_has_sent_is_removed(merged, hub, tmp_path, caplog):
    put_base(hub, merged)
    mine = {"figures/paper.png": b"p", "examples/photo.jpg": b"j", "weights.bin": b"w", "NOTES.md": b"n"}
    hub.add_repository("me/cells", private=True, **mine)
    push_run(merged, HubSpec(repo_id="me/cells", what="both", base_model="me/vit"))
    assert set(hub.files("me/cells")) >= {*mine, *(f"adapter/{name}" for name in ADAPTER)}
    edited = {"adapter/config.json": b"{}", "adapter/adapter_model.safetensors": b"another"}
    hub.repositories["me/cells"].branches["main"][-1].files.update(edited)
    with caplog.at_level(logging.INFO, "hfft"):
        hfft.push(merged, "me/cells")
    assert set(hub.files("me/cells")) == {*MODEL, *pushable.shown(merged), *mine, *edited}
    assert "push left: adapter/adapter_config.json" in caplog.text
    assert len(hub.titles("me/cells")) == 3


def test_a_card_that_was_edited_on_the_hub_stays(merged, hub, caplog):
    hfft.push(merged, "me/cells")
    hub.repositories["me/cells"].branches["main"][-1].files["README.md"] = b"# My own words"
    pushed = hfft.push(merged, "me/cells", commit_message="Again")
    assert hub.files("me/cells")["README.md"] == b"# My own words"
    assert "-# My own words" in caplog.text
    assert pushed.files == len(hub.files("me/cells")) - 1


def test_an_adapter_whose_base_has_as_many_classes_does_not_answer_with_its_labels(hub, tmp_path):
    pushable.make_photos(tmp_path / "photos")
    tiny.save(tmp_path / "vit", "vit", classes=len(pushable.CLASSES))
    run = pushable.make_run(tmp_path, merge=False, report=False)
    put_base(hub, run)
    pushed = push_run(run, HubSpec(repo_id="me/lora", base_model="me/vit"))
    assert pushed.largest_difference < 1e-5
    assert {f"adapter/{name}" for name in ADAPTER} < set(hub.files("me/lora"))
    assert hfft.Classifier.from_pretrained("me/lora", subfolder="adapter").classes == pushable.CLASSES
    assert b'from_pretrained("me/lora", subfolder="adapter")' in hub.files("me/lora")["README.md"]
    with pytest.raises((OSError, ValueError)):
        transformers.pipeline("image-classification", model="me/lora")


def test_from_python_the_adapters_base_can_be_named_as_well(merged, hub):
    put_base(hub, merged)
    with pytest.raises(HubError, match="the adapter sits on"):
        hfft.push(merged, "me/lora", what="adapter")
    pushed = [
        hfft.push(merged, "me/lora", what="adapter", base_model="me/vit"),
        hfft.Run(merged).push_to_hub("me/lora", what="adapter", base_model="me/vit"),
    ]
    assert pushed[0] == pushed[1]
    assert json.loads(hub.files("me/lora")["adapter_config.json"])["base_model_name_or_path"] == "me/vit"


def test_an_unknown_word_of_a_push_is_a_mistake_of_the_program(merged, hub):
    with pytest.raises(TypeError, match="takes no 'hub_strategy'"):
        hfft.push(merged, "me/cells", hub_strategy="every_save")
    assert hub.requests == []


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors"])
def test_a_file_that_comes_back_otherwise(damaged, merged, hub):
    hub.damaged = damaged
    with pytest.raises(PushError, match=f"me/cells at [0-9a-f]{{8}}: {damaged}"):
        hfft.push(merged, "me/cells")
    hub.damaged = ""
    hfft.push(merged, "me/cells")


def test_without_its_data_a_run_is_compared_on_noise(merged, hub, tmp_path):
    run = tmp_path / "cells"
    shutil.copytree(merged, run)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("photos", "photos-that-are-gone"))
    pushed = hfft.push(run, "me/cells")
    assert (pushed.from_data, pushed.images, pushed.largest_difference) == (False, 4, 0.0)
    assert "4 images of noise (no data here)" in pushed.in_words


# Where the Hub fails -> words of the message, and the exit code.
TROUBLE = {
    "500 while uploading": ("PUT", "/storage/", {"status": 500}, "uploading: the Hub answered 500 (no luck)", 1),
    "cut while uploading": ("PUT", "/storage/", {"cut": True}, "uploading: the connection was lost (", 1),
    "401 while uploading": ("POST", "/preupload/", {"status": 401}, "it doesn't accept this token; `hf auth login", 2),
    "403 at the commit": ("POST", "/commit/", {"status": 403}, "refused; a token with write access, or another", 2),
    "409 at the commit": ("POST", "/commit/", {"status": 409}, "something else is changing this repository", 1),
    "412 at the commit": ("POST", "/commit/", {"status": 412}, "something else is changing this repository", 1),
    "429 at the commit": (
        *("POST", "/commit/", {"status": 429, "headers": {"Retry-After": "3"}}),
        *("rate limited: it asks to come back in 3 s", 1),
    ),
    "429 while uploading": (
        *("POST", "/preupload/", {"status": 429, "headers": {"Retry-After": "3"}}),
        *("rate limited: it asks to come back in 3 s", 1),
    ),
    "429 for an hour while uploading": (
        *("PUT", "/storage/", {"status": 429, "headers": {"Retry-After": "3600"}}),
        "(no luck): rate limited: it asks to come back in 60 minutes; nothing here was changed; the same command "
        "finishes the job then",
        1,
    ),
    "503 for two hours while reading back": (
        *("GET", "/resolve/.*/model", {"status": 503, "headers": {"Retry-After": "7201"}}),
        *("the Hub answered 503 (no luck): it asks to come back in 121 minutes", 1),
    ),
    "answer of the commit lost": ("POST", "/commit/", {"cut": True, "also_do": True}, "the connection was lost (", 1),
    "500 at the commit": ("POST", "/commit/", {"status": 500}, "the Hub answered 500 (no luck); nothing here was", 1),
    "500 while reading back": ("GET", "/resolve/.*/model", {"status": 500}, "the files were sent (commit ", 1),
    "cut while reading back": ("GET", "/tree/", {"cut": True}, "the files were sent (commit ", 1),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_told_leaves_the_run_alone_and_a_second_push_succeeds(name, merged, hub, no_waits, capsys):
    method, path, how, words, code = TROUBLE[name]
    before = pushable.contents(merged)
    failure = hub.fail(method, path, **how)
    assert main(["push", str(merged), "me/cells"]) == code
    said = capsys.readouterr().err
    assert failure.hits > 0
    assert f"error: me/cells: {words}" in said or words in said.partition("error: me/cells: ")[2]
    assert "Traceback" not in said
    assert "hf_mine" not in said
    assert pushable.contents(merged) == before
    if name == "429 while uploading":
        assert no_waits == [4.0] * 5  # huggingface_hub heeds Retry-After, and gives up
    if "hour" in name:
        assert no_waits == []
    hub.failures.clear()
    assert main(["push", str(merged), "me/cells"]) == 0
    count = len(MODEL | pushable.shown(merged))
    assert f"read back: {count} files equal, logits of 4 images of the run within 0" in capsys.readouterr().out
    assert set(hub.files("me/cells")) == {*MODEL, *pushable.shown(merged)}
    assert len(hub.titles("me/cells")) == 2  # one commit of ours, whatever happened before


@pytest.mark.parametrize(
    ("state", "number"), [("waits to try again", signal.SIGTERM), ("is being answered", signal.SIGINT)]
)
def test_one_signal_ends_a_push_that(state, number, merged, hub, tmp_path):
    """Several files are under way, each in a thread of huggingface_hub that no signal reaches."""
    hold = threading.Event()
    how = {"hold": hold} if state == "is being answered" else {"status": 429, "headers": {"Retry-After": "50"}}
    failure = hub.fail("PUT", "/storage/", **how)
    child = subprocess.Popen(
        [sys.executable, "-m", "hfft", "push", merged, "me/cells"],
        env={**os.environ, **hub.environment(tmp_path / "home")},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while failure.hits < 2 and child.poll() is None:
            time.sleep(0.05)
        if "try" in state:
            assert any("Rate limited. Waiting 51.0s before retry" in line for line in child.stderr)
        child.send_signal(number)
        _, said = child.communicate(timeout=12)  # less than the 50 s, and than the test Hub's patience
    finally:
        hold.set()
        child.kill()
        child.wait()
    assert child.returncode == 128 + number
    assert "interrupted; the same command finishes the push\n" in said
    assert "signed" not in said  # threads that are left behind may still log
    assert hub.titles("me/cells") == ["initial commit"]


def test_a_card_that_the_hub_refuses(merged, hub, tmp_path, capsys):
    run = tmp_path / "cells"
    shutil.copytree(merged, run)
    card = run / "model/README.md"
    card.write_text(card.read_text().replace("\nlicense: unknown\n", "\nlicense: apache2\n"))
    assert main(["push", str(run), "me/cells"]) == 2
    said = capsys.readouterr().err
    assert 'me/cells: uploading: Invalid metadata in README.md - "license" must be one of [apache-2.0, mit, ' in said
    assert " ...; nothing was sent. Change `license` or `widget` in the recipe and run its `hfft train`" in said
    assert "the same command finishes the job" not in said
    assert len(said) < 800
    assert hub.titles("me/cells") == ["initial commit"]


def test_what_arrived_before_the_connection_was_lost_is_not_sent_again(merged, hub, no_waits):
    put_base(hub, merged)
    spec = HubSpec(repo_id="me/cells", what="both", base_model="me/vit")
    adapter = pushable.contents(merged)["adapter/adapter_model.safetensors"]
    hub.fail("PUT", f"/storage/{adapter}", cut=True)
    with pytest.raises(PushError, match="the connection was lost"):
        push_run(merged, spec)
    hub.failures.clear()
    hub.requests.clear()
    push_run(merged, spec)
    assert hub.asked("^PUT") == [f"PUT /storage/{adapter}"]


def test_a_short_trouble_is_not_even_noticed(merged, hub, no_waits):
    hub.fail("PUT", "/storage/", status=500, times=2)
    hub.fail("PUT", "/storage/", cut=True, times=1)
    hfft.push(merged, "me/cells")
    assert len(no_waits) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "me/cells"], "nowhere is no run folder"),
        (["RUN", "me/cells/more"], "repo_id: found 'me/cells/more'; allowed: name or owner/name, of letters"),
        (["RUN", "me/cells", "--what", "adapter"], "the adapter sits on "),
        (["RUN", "other/cells"], "other/cells: me has no write access there"),
    ],
)
def test_bad_requests(arguments, words, merged, hub, capsys):
    assert main(["push", *(str(merged) if word == "RUN" else word for word in arguments)]) == 2
    assert f"error: {words}" in capsys.readouterr().err


def test_a_repository_in_a_folder_is_a_model_and_no_run(merged, hub, tmp_path):
    """As after `hf download`: recipe.yaml lies beside the weights there."""
    hfft.push(merged, "me/cells")
    for name, content in hub.files("me/cells").items():
        path = tmp_path / "cells" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert hfft.Classifier.from_pretrained(tmp_path / "cells").classes == pushable.CLASSES
    with pytest.raises(RunError, match="is no run folder"):
        hfft.push(tmp_path / "cells", "me/other")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("recipe.yaml", "is no run folder"),
        ("environment.json", "is no run folder"),
        ("metrics.json", "this run is not finished; run its `hfft train` command again"),
    ],
)
def test_what_is_no_finished_run(missing, words, merged, hub, tmp_path):
    run = shutil.copytree(merged, tmp_path / "cells")
    (run / missing).unlink()
    with pytest.raises(RunError, match=words):
        hfft.push(run, "me/cells")
    assert hub.requests == []


def test_a_run_that_was_moved_still_opens_the_adapter_on_weights_of_its_own(hub, tmp_path):
    """The adapter sits on what the first phase trained, and nothing in the folder holds its old place."""
    head = {"unfreeze": "all", "learning_rate": 1e-3}
    lora = {"adapter": {"on": "attention", "merge": False}, "learning_rate": 1e-2}
    run = pushable.make_run(tmp_path / "here", phases=[{"name": "all", **head}, {"name": "lora", **lora}])
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("../0-all/checkpoint-")
    photos = sorted((tmp_path / "here/photos/test").rglob("*.png"))
    before = [answer.top for answer in hfft.Classifier.from_pretrained(run)(photos)]
    moved = tmp_path / "there/cells"
    moved.parent.mkdir()
    shutil.move(run, moved)
    for source in (moved, moved / "adapter"):
        assert [answer.top for answer in hfft.Classifier.from_pretrained(source)(photos)] == before
    with pytest.raises(HubError, match=f"the adapter sits on {moved}/0-all/checkpoint-"):
        hfft.push(moved, "me/lora")
    base = moved / "0-all" / Path(config["base_model_name_or_path"]).name
    hub.add_repository("me/base", private=True, **{path.name: path.read_bytes() for path in base.iterdir()})
    assert hfft.push(moved, "me/lora", base_model="me/base").largest_difference < 1e-5

import hashlib
import json
import logging

import pytest

from hfft.errors import HubError
from hfft.hub.content import File
from hfft.hub.repository import MANIFEST, leftovers, settle

MODEL = ("config.json", "model.safetensors", "preprocessor_config.json")


class There:
    """A repository, without the Hub."""

    def __init__(self, files, listed=None):
        self.files = files
        self.paths = frozenset(files)
        self.listed = listed

    def content(self, path):
        return self.files[path]

    def unchanged(self, paths, listed):
        return [path for path in paths if listed[path] != "changed"]


def digest(content):
    return hashlib.sha256(content).hexdigest()


def pushed(*more):
    return [File(name, b"new") for name in (*MODEL, *more)]


def listing(sent):
    return json.loads(next(file.source for file in sent if file.path == MANIFEST))["files"]


@pytest.mark.parametrize(
    ("there", "gone"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("training_args.bin", True),
        ("adapter_config.json", True),
        ("processor_config.json", True),
        ("adapter/adapter_config.json", True),
        ("figures/old.png", True),
        ("examples/old.jpg", True),
        ("model.safetensors", False),
        ("NOTES.md", False),
        ("onnx/model.onnx", False),
        ("old/model.safetensors", False),
        (".gitattributes", False),
    ],
)
def test_what_an_earlier_push_left(there, gone):
    sent = [File(name, b"") for name in MODEL]
    assert leftovers([there, "config.json"], sent) == ([there] if gone else [])


@pytest.mark.parametrize(
    "path",
    ["figures/paper.png", "examples/my photo.jpg", "adapter/notes.txt", "weights.bin", "pytorch_model.bin", "a.py"],
)
def test_what_no_push_of_ours_listed_stays(path):
    for listed in (None, {}, {"config.json": "x"}):
        sent, gone = settle(There({path: b"mine", "config.json": b"old"}, listed), pushed(), {})
        assert gone == []
        assert listing(sent).keys() == set(MODEL)


def test_what_an_earlier_push_listed_goes_and_is_listed_no_more():
    there = There(dict.fromkeys(("figures/ours.png", "figures/mine.png", "LICENSE"), b"old"))
    there.listed = {"figures/ours.png": "x", "LICENSE": "x", "figures/gone.png": "x"}
    sent, gone = settle(there, pushed(), {"figures/mine.png": "x"})  # the list counts, where there is one
    assert gone == ["figures/ours.png"]
    assert listing(sent).keys() == {*MODEL, "LICENSE"}
    there.listed = None
    assert settle(there, pushed(), {"figures/ours.png": "x"})[1] == ["figures/ours.png"]


@pytest.mark.parametrize("path", ["adapter_config.json", "processor_config.json"])
def test_a_model_is_not_put_where_another_file_would_be_opened_first(path):
    with pytest.raises(HubError, match=f"{path}: there already"):
        settle(There({path: b"mine"}), pushed(), {})
    assert settle(There({path: b"ours"}, {path: "x"}), pushed(), {})[1] == [path]
    assert settle(There({f"old/{path}": b"mine"}), pushed(), {})[1] == []


def test_a_card_that_was_changed_there_is_kept_and_shown(caplog):
    card = File("README.md", b"# cells\nnew\n")
    edited = {"README.md": b"# cells\n\x1b[31mmine\n"}
    for listed in (None, {"README.md": digest(b"# cells\nold\n")}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hfft"):
            sent, gone = settle(There(edited, listed), [*pushed(), card], {})
        assert gone == []
        assert {file.path for file in sent} == {*MODEL, MANIFEST}
        assert "README.md" not in listing(sent)
        assert r"-\x1b[31mmine" in caplog.text
        assert "+new" in caplog.text


def test_a_card_that_is_ours_is_replaced():
    card, old = File("README.md", b"new"), b"old"
    for listed, known in (({"README.md": digest(old)}, {}), (None, {"README.md": digest(old)})):
        sent, _ = settle(There({"README.md": old}, listed), [*pushed(), card], known)
        assert listing(sent)["README.md"] == digest(b"new")
    assert card in settle(There({"README.md": b"new"}), [*pushed(), card], {})[0]


def test_a_listed_file_that_was_changed_there_stays():
    there = There({"figures/ours.png": b"mine now"}, {"figures/ours.png": "changed"})
    assert settle(there, pushed(), {})[1] == []

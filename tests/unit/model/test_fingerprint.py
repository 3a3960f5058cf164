import importlib
import sys
import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from hfft.model import fingerprint
from hfft.model.anatomy import dissect
from hfft.model.fingerprint import hash_code
from hfft.model.freezing import set_trainable, trainable_names
from hfft.recipe.spec import AdapterSpec, PhaseSpec
from hfft.replay.split_point import Prefix, find_split_point, split_point_at
from hfft.training.plan import prepare_phase

ONE = torch.zeros(1, 3, tiny.SIDE, tiny.SIDE)
FUSED = {  # timm's networks that read a query, key and value layer without calling it, and one that calls it
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "swinv2_tiny_window8_256": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 8,
        "num_heads": (1, 1, 2, 2),
        "depths": (1, 1, 1, 1),
    },
    "deit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
}


def present(split_point):
    """The fingerprint as it is now."""
    vars(split_point).pop("fingerprint", None)
    return split_point.fingerprint


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("unfreeze", ["head", {"blocks": 1}], ids=str)
def test_every_tensor_that_changes_what_enters_changes_the_fingerprint(architecture, unfreeze):
    model_args = FUSED[architecture]
    model = tiny.build("timm_wrapper", classes=2, architecture=architecture, model_args=model_args).eval()
    pixels = torch.randn(2, 3, model_args["img_size"], model_args["img_size"])
    set_trainable(model, trainable_names(model, dissect(model), unfreeze))
    split_point = find_split_point(model, pixels[:1])
    assert split_point is not None
    prefix, hashed = Prefix(model, [split_point]).eval(), present(split_point)
    before = prefix(pixels)
    wrong = []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            kept = tensor.clone()
            tensor.add_(torch.randn_like(tensor))
            is_same = all(map(torch.equal, before, prefix(pixels)))
            if not is_same and present(split_point) == hashed:
                wrong.append(name)
            tensor.copy_(kept)
    assert wrong == []
    assert present(split_point) == hashed
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).add_(1)
    assert present(split_point) == hashed  # what trains lies behind


@pytest.mark.parametrize(("peeks", "path"), [(True, "stem"), (False, "head")])
def test_nothing_in_front_reads_what_lies_behind(peeks, path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, pixel_values):
            hidden = self.stem(pixel_values.flatten(1)[:, :4]) + (self.head.weight.sum() if peeks else 0)
            return SimpleNamespace(logits=self.head(hidden))

    model = Net()
    set_trainable(model, {"head.weight", "head.bias"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split_point = find_split_point(model, ONE)
    assert split_point is not None
    assert split_point.path == path
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


NETWORK = """
import torch
from {helper} import SCALE

class Net(torch.nn.Module):
    def forward(self, pixel_values):
        return {factor} * SCALE * pixel_values
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of the user's beside a helper, and gives the hash of its class, as a new process would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(factor=1, scale=1):
        (tmp_path / "own_helper.py").write_text(f"SCALE = {scale}\n")
        (tmp_path / "own_net.py").write_text(NETWORK.format(helper="own_helper", factor=factor))
        for name in ("own_helper", "own_net"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("own_net").Net

    yield write
    for name in ("own_helper", "own_net"):
        sys.modules.pop(name, None)


def test_code_counts_with_what_it_imports(own_module):
    first = hash_code([own_module()])
    assert hash_code([own_module()]) == first
    hashes = {first, hash_code([own_module(factor=2)]), hash_code([own_module(scale=2)])}
    assert len(hashes) == 3


def test_code_counts_as_it_runs_where_its_file_has_changed_since(own_module, tmp_path):
    second = hash_code([own_module(factor=2)])
    loaded = own_module()
    (tmp_path / "own_net.py").write_text(NETWORK.format(helper="own_helper", factor=2))
    assert hash_code([loaded]) != second


def test_an_installed_package_counts_by_its_version(monkeypatch):
    stock = hash_code([nn.Linear])
    assert hash_code([nn.Linear]) == stock
    assert hash_code([nn.Linear, nn.Conv2d]) == stock
    monkeypatch.setattr("hfft.model.fingerprint.version", lambda _: "0.0.1")
    assert hash_code([nn.Linear]) != stock


def test_code_that_was_typed_in_serves_one_process(monkeypatch):
    typed = type("Net", (nn.Module,), {"__module__": "nowhere"})
    first = hash_code([typed])
    assert hash_code([typed]) == first
    monkeypatch.setattr(fingerprint, "_TYPED_IN", weakref.WeakKeyDictionary())  # as in another process
    assert hash_code([typed]) != first


def test_what_an_adapter_adds_does_not_count():
    plain = split_point_at(tiny.build("vit"), "vit.layers.3", ONE)
    for method in ("lora", "vera"):
        adapter = AdapterSpec(method=method, on="all", blocks=1, r=2)
        split_point = find_split_point(
            prepare_phase(tiny.build("vit"), PhaseSpec(name="p", adapter=adapter), ONE), ONE
        )
        assert split_point is not None
        assert split_point.fingerprint == plain.fingerprint
        assert split_point.architecture == plain.architecture


def test_the_architecture_is_the_same_for_other_weights_alone():
    first, second = tiny.build("vit"), tiny.build("vit", hidden_size=32)
    before = split_point_at(first, "classifier", ONE).architecture
    with torch.no_grad():
        first.vit.embeddings.cls_token.add_(1)
    assert split_point_at(first, "classifier", ONE).architecture == before
    assert split_point_at(second, "classifier", ONE).architecture != before

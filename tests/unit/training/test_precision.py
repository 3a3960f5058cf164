import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import PartialState

from hfft.recipe.spec import PhaseSpec
from hfft.training import precision

SPEC = PhaseSpec(name="p", unfreeze={"blocks": 1})
PartialState()  # which the log asks for its rank
ONE = torch.zeros(1, 3, tiny.SIDE, tiny.SIDE)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((9.0, 9.0, 1.0, 0.5, 1.0, 0.5), "bfloat16"),
        ((9.0, 9.0, 1.0, 0.95, 1.0, 0.95), "float32"),
        ((9.0, 9.0, 5.0, 1.0, 1.0, 1.0), "float32"),  # busy with other work during one step
    ],
    ids=str,
)
def test_the_faster_one_by_a_margin(monkeypatch, seconds, expected):
    clock, asked, times = [0.0], [], iter(seconds)

    def step(*_):
        asked.append(torch.is_autocast_enabled("cpu"))
        clock[0] += next(times)

    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "_step", step)
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert precision.fastest_precision(tiny.build("vit"), SPEC, ONE, replays=True) == expected
    assert asked == [False, True] * 3


def test_float32_without_native_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: False)
    assert precision.fastest_precision(tiny.build("vit"), SPEC, ONE, replays=True) == "float32"


@pytest.mark.parametrize("replays", [True, False])
def test_the_model_is_not_changed(monkeypatch, replays):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    model = tiny.build("mobilenet_v2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert precision.fastest_precision(model, SPEC, ONE, replays=replays) in ("float32", "bfloat16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_an_answer_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    times = iter([{"float32": 1.0, "bfloat16": 0.5}])
    monkeypatch.setattr(precision, "_seconds", lambda *_: next(times))  # and no second one
    options = {"replays": True, "memory": tmp_path / "runs/precision.json"}
    assert [precision.fastest_precision(tiny.build("vit"), SPEC, ONE, **options) for _ in range(2)] == ["bfloat16"] * 2


@pytest.mark.parametrize("content", ["", "[]", '{"PLACE": "float64"}', '{"PLACE": null}'])
def test_an_answer_that_is_none_is_asked_for_again(monkeypatch, tmp_path, content):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "_seconds", lambda *_: {"float32": 1.0, "bfloat16": 0.5})
    memory = tmp_path / "precision.json"
    precision.fastest_precision(tiny.build("vit"), SPEC, ONE, replays=True, memory=memory)
    (place,) = json.loads(memory.read_text())
    memory.write_text(content.replace("PLACE", place))
    assert precision.fastest_precision(tiny.build("vit"), SPEC, ONE, replays=True, memory=memory) == "bfloat16"
    assert json.loads(memory.read_text()) == {place: "bfloat16"}


CHANGES = {
    "network": lambda: {"model": tiny.build("vit", hidden_size=32)},  # both without a name
    "released": lambda: {"spec": PhaseSpec(name="p", unfreeze={"blocks": 2})},
    "statistics": lambda: {"spec": PhaseSpec(name="p", unfreeze={"blocks": 1}, batchnorm="train")},
    "images": lambda: {"pixels": torch.zeros(1, 3, 64, 64)},
    "replay": lambda: {"replays": False},
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_answer_is_for_what_it_was_measured_with(monkeypatch, what):
    asked = {"model": tiny.build("vit"), "spec": SPEC, "pixels": ONE, "replays": True}
    before = precision._circumstances(**asked)
    assert precision._circumstances(**asked) == before
    assert precision._circumstances(**{**asked, **CHANGES[what]()}) != before
    for name, other in (("hardware", lambda _: "another processor"), ("torch.get_num_threads", lambda: 64)):
        with monkeypatch.context() as patch:
            patch.setattr(f"hfft.training.precision.{name}", other)
            assert precision._circumstances(**asked) != before

"""The engine of the frozen pass: equal to eager torch, refused where it is not, measured once."""

import json
import logging
import sys
import warnings

import pytest
import tiny
import torch
from accelerate import PartialState
from torch import nn

from hfft.errors import ModelError
from hfft.replay import engine
from hfft.replay.engine import choose_engine

MANY = 10**9  # images, so that a measurement is worth its time
BATCH = 6
SPLITS = {
    "vit": "vit.layers.3",
    "convnext": "convnext.encoder.stages.3",
    "resnet": "resnet.encoder.stages.3",
    "efficientnet": "efficientnet.encoder.blocks.6",
    "timm_wrapper": "timm_model.layer4",
}


class Stop(Exception):
    pass


class Prefix(nn.Module):
    """The network up to the entry of a module: stops with an exception, as the frozen pass does."""

    def __init__(self, model, cut):
        super().__init__()
        self.model = model
        self.kept = ()
        model.get_submodule(cut).register_forward_pre_hook(self.stop, with_kwargs=True)

    def stop(self, _, args, kwargs):
        self.kept = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        raise Stop

    def forward(self, pixels):
        try:
            self.model(pixel_values=pixels)
        except Stop:
            return self.kept


@pytest.fixture(autouse=True)
def _launched():
    PartialState()


def prefix(family="resnet", layout=torch.contiguous_format):
    return Prefix(tiny.build(family).to(memory_format=layout), SPLITS[family]).eval()


def photos(seed=1):
    return torch.randn(BATCH, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))


def choose(network, pixels=None, **changes):
    options = {"asked": "auto", "autocast": None, "images": MANY, "memory": None, **changes}
    return choose_engine(network, photos() if pixels is None else pixels, **options)


def plainly(network, pixels, *, bfloat16=False):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        return network(pixels)


def favour(monkeypatch, name):
    """Let one engine seem the fastest, whatever the machine does."""
    speed = {"torch": 1e3, "onnxruntime": 1e3, "setup": 0.0, name: 1e9}
    monkeypatch.setattr(engine, "_measure", lambda *_: engine._Speed(**speed))


def offer(monkeypatch, build):
    """A program of our own in the place of onnxruntime's."""
    monkeypatch.setattr(engine, "_onnxruntime", lambda network, pixels: torch.no_grad()(build(network, pixels)))


def same(network, pixels):
    """A program that is eager torch."""
    return network


def relative(left, right):
    pairs = [(a.float(), b.float()) for a, b in zip(left, right, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.fixture
def report(monkeypatch):
    """The lines that were logged."""
    lines = []
    monkeypatch.setattr(engine._LOG, "info", lines.append)
    return lines


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_torch_is_bit_equal_to_the_plain_forward_pass(layout, bfloat16):
    network, others = prefix(layout=layout), photos(2)
    chosen = choose(network, asked="torch", autocast=torch.bfloat16 if bfloat16 else None)
    expected = plainly(network, others.contiguous(memory_format=layout), bfloat16=bfloat16)
    found = chosen.run(others)
    assert (chosen.name, chosen.images_per_second) == ("torch", None)
    assert len(found) == len(expected) == 1
    assert found[0].dtype == expected[0].dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert torch.equal(found[0], expected[0])
    assert not found[0].requires_grad


@pytest.mark.parametrize("changes", [{"asked": "torch"}, {"autocast": torch.float16}], ids=["torch", "float16"])
def test_torch_measures_and_checks_nothing(changes):
    network, calls = prefix(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    assert choose(network, **changes).name == "torch"
    assert calls == []


@pytest.mark.parametrize("family", SPLITS)
def test_onnxruntime_computes_what_torch_does_on_images_it_has_not_seen(monkeypatch, family):
    favour(monkeypatch, "onnxruntime")
    network, others = prefix(family), photos(2)
    chosen = choose(network)
    assert (chosen.name, chosen.images_per_second) == ("onnxruntime", 1e9)
    assert 0 < relative(chosen.run(others), plainly(network, others)) < 1e-5


def test_channels_last_weights():
    network = prefix(layout=torch.channels_last)
    chosen = choose(network, asked="onnxruntime")
    assert relative(chosen.run(photos(2)), plainly(network, photos(2))) < 1e-5


@pytest.mark.parametrize("family", ["vit", "convnext", "resnet", "timm_wrapper"])
def test_bfloat16_gives_the_types_of_eager_torch_and_is_about_as_near_to_float32(family):
    network, others = prefix(family), photos(2)
    chosen = choose(network, asked="onnxruntime", autocast=torch.bfloat16)
    found, eager = chosen.run(others), plainly(network, others, bfloat16=True)
    exact = plainly(network, others)
    assert [output.dtype for output in found] == [output.dtype for output in eager]
    assert relative(eager, exact) > 0
    assert relative(found, exact) < 4 * relative(eager, exact)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_program_with_wrong_outputs_is_refused(monkeypatch, report, autocast):
    offer(monkeypatch, lambda network, _: lambda pixels: tuple(output * 1.2 for output in network(pixels)))
    assert choose(prefix("resnet"), autocast=autocast).name == "torch"
    assert "onnxruntime refused: output 0 differs from torch by up to" in report[0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda output: (output * torch.nan,), "differs from torch by up to nan"),
        (lambda output: (output[:3],), "output 0 is (3, 16, 2, 2), in torch (6, 16, 2, 2)"),
        (lambda output: (output, output), "zip() argument"),
        (lambda output: (output.roll(1, 0),), "differs from torch"),
        (lambda output: (output.view(7),), "shape '[7]' is invalid"),
    ],
    ids=["nan", "a part of the batch", "one output more", "other order", "raises"],
)
def test_other_ways_of_being_wrong(monkeypatch, report, spoil, reason):
    offer(monkeypatch, lambda network, _: lambda pixels: spoil(network(pixels)[0]))
    assert choose(prefix("resnet")).name == "torch"
    assert reason in report[0]


class Brightness(nn.Module):
    """Decides by the pixels in Python, which a trace keeps for ever."""

    def forward(self, pixels):
        return (pixels + 1 if float(pixels.abs().sum()) > 1 else pixels - 1,)


def test_a_trace_that_took_the_pixels_for_constants_is_refused(report):
    assert choose(Brightness().eval()).name == "torch"
    assert "differs from torch" in report[0]
    with pytest.raises(ModelError, match="onnxruntime can't be used: output 0 differs from torch by up to 2;"):
        choose(Brightness().eval(), asked="onnxruntime")


def test_the_faster_is_taken_and_the_time_to_prepare_it_counts(monkeypatch):
    offer(monkeypatch, same)
    monkeypatch.setattr(engine, "_measure", lambda *_: engine._Speed(torch=10.0, onnxruntime=40.0, setup=6.0))
    monkeypatch.setattr(engine, "_is_short", lambda *_: False)
    chosen = [choose(prefix(), images=images) for images in (10, 100)]  # 1 or 6.25 s; 10 or 8.5 s
    assert [(one.name, one.images_per_second) for one in chosen] == [("torch", 10.0), ("onnxruntime", 40.0)]


def test_a_short_pass_is_not_worth_a_measurement(monkeypatch, report):
    offer(monkeypatch, lambda *_: pytest.fail("built"))
    assert choose(prefix(), images=100).images_per_second is None
    assert report == ["frozen pass: torch; 100 images are too few to try onnxruntime"]


def test_timing_takes_turns_and_leaves_out_who_is_far_behind(monkeypatch, report):
    clock, order = [0.0], []
    monkeypatch.setattr(engine.time, "perf_counter", lambda: clock[0])

    def program(name, *seconds):
        left = iter(seconds)

        def run(_):
            order.append(name)
            clock[0] += next(left)

        return run

    speed = engine._measure(program("a", 3.0, 2.0, 4.0), program("b", 4.0, 2.5, 3.0), photos(), 0.5)
    assert "".join(order) == "ababab"
    assert (speed.torch, speed.onnxruntime, speed.setup) == (3.0, 2.4, 0.5)
    assert report == ["frozen pass: torch 3 images/s, onnxruntime 2 images/s (ready in 0.5 s)"]
    order.clear()
    engine._measure(program("a", 3.0, 2.0, 4.0), program("b", 9.0), photos(), 0.5)
    assert "".join(order) == "abaa"


def test_a_remembered_choice_is_checked_but_not_measured_again(tmp_path, monkeypatch):
    offer(monkeypatch, same)
    file = tmp_path / "new folder" / "engines.json"
    favour(monkeypatch, "onnxruntime")
    first = choose(prefix(), memory=file, key="a network")
    monkeypatch.setattr(engine, "_measure", lambda *_: pytest.fail("measured again"))
    again = choose(prefix(), memory=file, key="a network")
    assert (again.name, again.images_per_second) == (first.name, first.images_per_second) == ("onnxruntime", 1e9)
    (place,) = json.loads(file.read_text())
    assert f"torch {torch.__version__}" in place
    assert place.startswith("a network, batch 6x3x32x32, float32, ")
    offer(monkeypatch, lambda network, _: lambda pixels: tuple(output + 1 for output in network(pixels)))
    assert choose(prefix(), memory=file, key="a network").name == "torch"  # wrong by now


def test_a_remembered_slow_engine_is_not_built_again(tmp_path, monkeypatch):
    favour(monkeypatch, "torch")
    offer(monkeypatch, same)
    choose(prefix(), memory=tmp_path / "engines.json", key="a network")
    offer(monkeypatch, lambda *_: pytest.fail("built again"))
    assert choose(prefix(), memory=tmp_path / "engines.json", key="a network").images_per_second == 1e9


@pytest.mark.parametrize(
    "change",
    [{"key": "other"}, {"autocast": torch.bfloat16}, {"pixels": photos()[:4]}],
    ids=["key", "precision", "batch"],
)
def test_other_circumstances_are_measured_and_remembered_apart(tmp_path, monkeypatch, change):
    offer(monkeypatch, same)
    file = tmp_path / "engines.json"
    choose(prefix(), memory=file, key="a network")
    choose(prefix(), memory=file, **{"key": "a network", **change})
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", '{"PLACE": 3}', '{"PLACE": {}}'),
        '{"PLACE": {"torch": {"images_per_second": 1, "setup": 0}}}',
    ],
)
def test_a_memory_that_cannot_be_read_is_written_anew(tmp_path, monkeypatch, content):
    offer(monkeypatch, same)
    file = tmp_path / "engines.json"
    choose(prefix(), memory=file, key="a network")
    (place,) = json.loads(file.read_text())
    file.write_text(content.replace("PLACE", place))
    choose(prefix(), memory=file, key="a network")
    assert set(json.loads(file.read_text())[place]) == {"torch", "onnxruntime", "setup"}


def test_a_memory_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    offer(monkeypatch, same)
    (tmp_path / "file").write_text("no folder")
    assert choose(prefix(), memory=tmp_path / "file" / "engines.json", key="a network").images_per_second


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx"])
def test_without_onnxruntime(monkeypatch, report, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert choose(prefix()).name == "torch"
    assert 'onnxruntime refused: it is not installed: pip install "hfft[fast]"' in report[0]
    with pytest.raises(ModelError, match=r'replay\.engine: onnxruntime .*pip install "hfft\[fast\]"'):
        choose(prefix(), asked="onnxruntime")


def test_onnxruntime_on_request_is_not_timed(monkeypatch):
    monkeypatch.setattr(engine, "_measure", lambda *_: pytest.fail("measured"))
    chosen = choose(prefix("efficientnet"), asked="onnxruntime")
    assert (chosen.name, chosen.images_per_second) == ("onnxruntime", None)


class Smooth(nn.Module):
    """Has an operation that can't be exported; the exporter prints the whole network then."""

    def forward(self, pixels):
        return (nn.functional.interpolate(pixels, scale_factor=2.0, mode="bicubic", antialias=True),)


def test_an_export_that_fails_is_an_error_with_the_reason_and_prints_nothing(capfd):
    with pytest.raises(ModelError, match="UnsupportedOperatorError: Exporting the operator"):
        choose(Smooth().eval(), asked="onnxruntime")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", ["vit", "timm_wrapper"])
def test_nothing_correct_warns(family, caplog):
    network = prefix(family)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        choose(network, asked="onnxruntime")
    assert caplog.records == []
    assert not network.training

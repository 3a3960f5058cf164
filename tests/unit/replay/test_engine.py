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
from hfft.replay import engine, programs
from hfft.replay.engine import choose_engine

MANY = 10**9  # images, so that a measurement is worth its time
BATCH = 6
CUTS = {
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
    return Prefix(tiny.build(family).to(memory_format=layout), CUTS[family]).eval()


def photos(seed=1):
    return torch.randn(BATCH, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))


def choose(network, pixels=None, **changes):
    asked = {"asked": "auto", "bfloat16": False, "images": MANY, "memory": None, "key": "a network"}
    return choose_engine(network, photos() if pixels is None else pixels, **{**asked, **changes})


def plainly(network, pixels, *, bfloat16=False):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        return network(pixels)


def favour(monkeypatch, name):
    """Let one engine seem the fastest, whatever the machine does."""
    measure = engine._measure

    def measured(candidates, pixels):
        known = measure(candidates, pixels)
        assert name in known, f"{name} was refused"
        return known | {name: {"images_per_second": 1e9, "setup": 0.0}}

    monkeypatch.setattr(engine, "_measure", measured)


def offer(monkeypatch, build):
    """A candidate of our own beside eager torch, the only one."""
    monkeypatch.setattr(engine, "BUILDERS", {"torch traced": build})


def same(job):
    """A candidate that is eager torch."""
    return job.prefix


def relative(left, right):
    pairs = [(a.float(), b.float()) for a, b in zip(left, right, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.fixture
def report(monkeypatch):
    """The lines that were logged."""
    lines = []
    monkeypatch.setattr(engine._LOG, "info", lambda text, *values: lines.append(text % values))
    return lines


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_torch_is_bit_equal_to_the_plain_forward_pass(layout, bfloat16):
    network, others = prefix(layout=layout), photos(2)
    chosen = choose(network, asked="torch", bfloat16=bfloat16)
    expected = plainly(network, others.contiguous(memory_format=layout), bfloat16=bfloat16)
    found = chosen.run(others)
    assert (chosen.name, chosen.images_per_second, chosen.difference) == ("torch", None, 0.0)
    assert len(found) == len(expected) == 1
    assert found[0].dtype == expected[0].dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert torch.equal(found[0], expected[0])
    assert not found[0].requires_grad


def test_torch_measures_and_checks_nothing(monkeypatch):
    network, calls = prefix(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(engine, "BUILDERS", {})
    choose(network, asked="torch")
    assert calls == []


@pytest.mark.parametrize("family", CUTS)
@pytest.mark.parametrize("name", ["torch traced", "onnxruntime"])
def test_an_engine_computes_what_torch_does_on_images_it_has_not_seen(monkeypatch, family, name):
    favour(monkeypatch, name)
    network, others = prefix(family), photos(2)
    chosen = choose(network)
    assert chosen.name == name
    assert chosen.images_per_second == 1e9
    assert chosen.difference < 1e-5
    assert relative(chosen.run(others), plainly(network, others)) < 1e-5


@pytest.mark.parametrize("name", ["torch traced", "onnxruntime"])
def test_channels_last_weights(monkeypatch, name):
    favour(monkeypatch, name)
    network = prefix(layout=torch.channels_last)
    assert relative(choose(network).run(photos(2)), plainly(network, photos(2))) < 1e-5


@pytest.mark.parametrize("family", ["vit", "convnext", "resnet", "timm_wrapper"])
@pytest.mark.parametrize("name", ["torch traced", "onnxruntime"])
def test_bfloat16_gives_the_types_of_eager_torch_and_is_about_as_near_to_float32(monkeypatch, family, name):
    favour(monkeypatch, name)
    network, others = prefix(family), photos(2)
    chosen = choose(network, bfloat16=True)
    assert chosen.name == name
    found, eager = chosen.run(others), plainly(network, others, bfloat16=True)
    exact = plainly(network, others)
    assert [output.dtype for output in found] == [output.dtype for output in eager]
    assert relative(eager, exact) > 0
    assert relative(found, exact) < 4 * relative(eager, exact)


def test_batchnorm_is_folded_into_the_convolutions(monkeypatch):
    frozen = []
    freeze = torch.jit.freeze
    monkeypatch.setattr(torch.jit, "freeze", lambda program: frozen.append(freeze(program)) or frozen[-1])
    favour(monkeypatch, "torch traced")
    network = prefix("resnet")
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    choose(network)
    operations = {node.kind() for node in frozen[0].inlined_graph.nodes()}
    assert "aten::_convolution" in operations or "aten::conv2d" in operations
    assert "aten::batch_norm" not in operations


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_candidate_with_wrong_outputs_is_refused(monkeypatch, report, bfloat16):
    def build(job):
        return lambda pixels: tuple(output * 1.2 for output in job.prefix(pixels))

    offer(monkeypatch, build)
    assert choose(prefix("resnet"), bfloat16=bfloat16).name == "torch"
    assert "torch traced refused: output 0 differs from torch by up to" in report[0]


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
    offer(monkeypatch, lambda job: lambda pixels: spoil(job.prefix(pixels)[0]))
    assert choose(prefix("resnet")).name == "torch"
    assert reason in report[0]


def test_a_program_that_optimizes_itself_in_its_second_run_is_checked_and_timed_after_it(monkeypatch, report):
    runs = []

    def build(job):
        def run(pixels):
            runs.append(1)
            return tuple(output * (1 if len(runs) == 1 else 2) for output in job.prefix(pixels))

        return run

    offer(monkeypatch, build)
    choose(prefix())
    assert "torch traced refused: output 0 differs" in report[0]
    assert len(runs) == 2


class Brightness(nn.Module):
    """Decides by the pixels in Python, which a trace keeps for ever."""

    def forward(self, pixels):
        return (pixels + 1 if float(pixels.abs().sum()) > 1 else pixels - 1,)


def test_a_trace_that_took_the_pixels_for_constants_is_refused(report):
    assert choose(Brightness().eval()).name == "torch"
    assert report[0].count("differs from torch") == 2


def test_the_log_names_each_rate_and_each_reason(monkeypatch, report):
    def build(job):
        raise ValueError("no such operation\nand a long explanation")

    monkeypatch.setattr(engine, "BUILDERS", {"torch traced": programs._traced, "onnxruntime": build})
    choose(prefix())
    assert len(report) == 1
    assert "torch traced " in report[0]
    assert report[0].endswith("onnxruntime refused: ValueError: no such operation")


def test_the_fastest_is_taken_and_the_time_to_prepare_it_counts(monkeypatch):
    monkeypatch.setattr(engine, "BUILDERS", {"torch traced": same, "onnxruntime": same})
    rates = {
        "torch": {"images_per_second": 10.0, "setup": 0.0},
        "torch traced": {"images_per_second": 20.0, "setup": 2.0},
        "onnxruntime": {"images_per_second": 40.0, "setup": 6.0},
    }
    monkeypatch.setattr(engine, "_measure", lambda *_: rates)
    monkeypatch.setattr(engine, "_is_short", lambda *_: False)
    # 10 images: 1, 2.5, 6.25 s; 100: 10, 7, 8.5 s; 1000: 100, 52, 31 s
    chosen = {images: choose(prefix(), images=images) for images in (10, 100, 1000)}
    assert [one.name for one in chosen.values()] == ["torch", "torch traced", "onnxruntime"]
    assert [one.images_per_second for one in chosen.values()] == [10.0, 20.0, 40.0]


def test_a_short_pass_is_not_worth_a_measurement(monkeypatch):
    monkeypatch.setattr(engine, "_prepare", lambda job: pytest.fail("measured"))
    assert choose(prefix(), images=100).images_per_second is None


def test_the_cold_first_pass_of_an_accelerator_does_not_count(monkeypatch):
    """It loads kernels for seconds; images on the meta device stand for those on an accelerator."""
    clock, seconds = [0.0], iter([60.0, 0.01])
    monkeypatch.setattr(engine.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)

    def run(_):
        clock[0] += next(seconds)

    assert engine._is_short(run, torch.zeros(32, 3, 4, 4, device="meta"), 1000)


def test_timing_goes_round_and_leaves_out_who_is_far_behind(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(engine.time, "perf_counter", lambda: clock[0])

    def candidate(name, first, *seconds):
        left = iter(seconds)

        def run(_):
            order.append(name)
            clock[0] += next(left)

        return engine._Candidate(run, 0.0, 0.5, first)

    seconds = {"fast": (3.0, 2.0, 4.0), "near": (4.0, 2.5, 3.0), "slow": (9.0,)}
    known = engine._measure({name: candidate(name, *each) for name, each in seconds.items()}, photos())
    assert order == ["fast", "near", "fast", "near"]
    rates = {name: rate["images_per_second"] for name, rate in known.items()}
    assert rates == {"fast": 3.0, "near": 2.4, "slow": 6 / 9}
    assert {rate["setup"] for rate in known.values()} == {0.5}


def test_a_remembered_choice_is_checked_but_not_measured_again(tmp_path, monkeypatch):
    offer(monkeypatch, same)
    memory = tmp_path / "new folder" / "engines.json"
    favour(monkeypatch, "torch traced")
    first = choose(prefix(), memory=memory)
    monkeypatch.setattr(engine, "_measure", lambda *_: pytest.fail("measured again"))
    again = choose(prefix(), memory=memory)
    assert (again.name, again.images_per_second) == (first.name, first.images_per_second) == ("torch traced", 1e9)
    assert torch.equal(again.run(photos(2))[0], first.run(photos(2))[0])
    (place,) = json.loads(memory.read_text())
    assert f"torch {torch.__version__.partition('+')[0]}" in place
    assert place.startswith("a network, batch 6x3x32x32, float32, ")


@pytest.mark.parametrize(
    "change", [{"key": "other"}, {"bfloat16": True}, {"pixels": photos()[:4]}], ids=["key", "precision", "batch"]
)
def test_other_circumstances_are_measured_and_remembered_beside(tmp_path, monkeypatch, change):
    offer(monkeypatch, same)
    memory = tmp_path / "engines.json"
    choose(prefix(), memory=memory)
    choose(prefix(), memory=memory, **change)
    assert len(json.loads(memory.read_text())) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"PLACE": 3}',
        '{"PLACE": {}}',
        '{"PLACE": {"torch": {}}}',
        '{"PLACE": {"torch": {"images_per_second": 0, "setup": 0}}}',
        '{"PLACE": {"torch": {"images_per_second": "x", "setup": 0}}}',
        '{"PLACE": {"torch": {"images_per_second": 1, "setup": 0}, "new": {"images_per_second": 2, "setup": 0}}}',
    ],
)
def test_a_memory_that_cannot_be_read_is_written_anew(tmp_path, monkeypatch, content):
    offer(monkeypatch, same)
    memory = tmp_path / "engines.json"
    choose(prefix(), memory=memory)
    (place,) = good = json.loads(memory.read_text())
    memory.write_text(content.replace("PLACE", place))
    choose(prefix(), memory=memory)
    assert {name: set(rate) for name, rate in json.loads(memory.read_text())[place].items()} == {
        name: set(rate) for name, rate in good[place].items()
    }


def test_a_memory_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, report):
    offer(monkeypatch, same)
    (tmp_path / "file").write_text("no folder")
    choose(prefix(), memory=tmp_path / "file" / "engines.json")
    assert "can't be kept" in report[-1]


def test_a_remembered_engine_that_has_become_wrong_is_measured_anew(tmp_path, monkeypatch):
    offer(monkeypatch, same)
    memory = tmp_path / "engines.json"
    favour(monkeypatch, "torch traced")
    choose(prefix(), memory=memory)
    monkeypatch.undo()
    offer(monkeypatch, lambda job: lambda pixels: tuple(output + 1 for output in job.prefix(pixels)))
    assert choose(prefix(), memory=memory).name == "torch"
    (rates,) = json.loads(memory.read_text()).values()
    assert set(rates) == {"torch"}


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx"])
def test_without_onnxruntime(monkeypatch, report, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert choose(prefix()).name in {"torch", "torch traced"}
    assert 'onnxruntime refused: it is not installed: pip install "hfft[fast]"' in report[0]
    with pytest.raises(ModelError, match=r'replay\.engine: onnxruntime .*pip install "hfft\[fast\]"'):
        choose(prefix(), asked="onnxruntime")


def test_onnxruntime_on_request_is_not_timed(monkeypatch):
    monkeypatch.setattr(engine, "_measure", lambda *_: pytest.fail("measured"))
    chosen = choose(prefix("efficientnet"), asked="onnxruntime")
    assert (chosen.name, chosen.images_per_second) == ("onnxruntime", None)
    assert 0 < chosen.difference < 1e-5


def test_onnxruntime_on_request_that_computes_something_else_is_an_error():
    with pytest.raises(ModelError, match="onnxruntime can't be used: output 0 differs from torch by up to 2;"):
        choose(Brightness().eval(), asked="onnxruntime")


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
        choose(network)
    assert caplog.records == []
    assert not network.training

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from torch import nn

from hfft.errors import TrainingError
from hfft.runs.record import Group
from hfft.training.callbacks import FirstSteps

PartialState()  # which loggers ask
ARGUMENTS = SimpleNamespace(device="cpu", world_size=1)


class Network(nn.Module):
    """A body and a head; the body's part in the output is cut off as asked."""

    def __init__(self, cut="not at all"):
        super().__init__()
        self.body, self.head, self.cut = nn.Linear(4, 4), nn.Linear(4, 2), cut

    def forward(self, x):
        inner = self.body(x)
        if self.cut == "off":
            inner = inner.detach()
        return self.head(inner * 0 if self.cut == "to zero" else inner)


class LowRank(nn.Module):
    """An update A @ B of which B begins at zero, and so A gets no gradient at first."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(self.body(x))[:, :2]


def train(network, *, steps=16, rates=None, optimizer=None, before_step=None):
    """A training loop that calls what the Trainer would."""
    torch.manual_seed(0)
    names = [name for name, _ in network.named_parameters()]
    groups = [Group(part, tuple(n for n in names if n.startswith(part)), 0.1, 0.0) for part in ("body", "head")]
    watch = FirstSteps("phase", groups)
    optimizer = optimizer or torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0)
    given = {"model": network, "optimizer": optimizer}
    watch.on_train_begin(ARGUMENTS, None, None, **given)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if rates is None else rates(step)
        loss = network(torch.randn(8, 4)).logsumexp(1).sum()
        loss.backward()
        if before_step is not None:
            before_step(optimizer, step)
        optimizer.step()
        watch.on_optimizer_step(ARGUMENTS, None, None, **given)
        network.zero_grad()
    watch.on_train_end(ARGUMENTS, None, None, **given)


def messages(caplog, level=logging.INFO):
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


@pytest.mark.parametrize("steps", [4, 16])
def test_tensors_without_a_gradient_end_the_phase(steps):
    with pytest.raises(TrainingError, match=r"2 of 4 tensors .* body\.weight"):
        train(Network("off"), steps=steps)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Network(), {}),
        (Network(), {"rates": lambda step: 0.01 * step}),
        (LowRank(), {"rates": lambda step: 0.01 * step}),
        (Network("off"), {"steps": 3}),  # too few to tell
        (Network("off"), {"rates": lambda step: 0.0}),
    ],
)
def test_what_begins_late_or_rests_at_rate_0_passes_in_silence(network, options, caplog):
    with caplog.at_level(logging.INFO):
        train(network, **options)
    assert messages(caplog) == []


def test_steps_that_loss_scaling_skips_do_not_count(caplog):
    class Scaled(torch.optim.SGD):
        step_was_skipped = False

        def step(self, closure=None):
            if not self.step_was_skipped:
                super().step(closure)

    def overflow(optimizer, step):
        optimizer.step_was_skipped = step < 9

    network = Network()
    with caplog.at_level(logging.INFO):
        train(network, optimizer=Scaled(network.parameters(), lr=0.1), before_step=overflow, steps=30)
    assert messages(caplog) == []


def test_an_optimizer_that_takes_the_gradients_away_passes():
    network = Network()
    train(network, before_step=lambda optimizer, step: [optimizer.step(), network.zero_grad()])


def test_what_a_callback_froze_passes():
    network = Network()
    network.body.requires_grad_(False)
    train(network)


def test_so_does_what_a_callback_freezes_while_it_is_looked_at():
    network = Network("to zero")

    def freeze(optimizer, step):
        network.body.requires_grad_(step < 9)

    train(network, before_step=freeze)


def test_a_rate_below_the_numbers_resolution_warns(caplog):
    train(Network(), rates=lambda step: 1e-12)
    assert any("lost in the rounding of torch.float32" in text for text in messages(caplog, logging.WARNING))


def test_a_part_whose_gradients_are_zero_warns(caplog):
    train(Network("to zero"))
    (warning,) = messages(caplog, logging.WARNING)
    assert "body: nothing is trained there" in warning


def test_single_tensors_whose_gradients_are_zero_are_named(caplog):
    network = Network()
    with torch.no_grad():
        network.head.weight.copy_(torch.tensor([[1.0, 2, 3, 4]] * 2))
    network.forward = lambda x: network.head(network.body(x) - network.body.bias)  # as a key's bias behind a softmax
    with caplog.at_level(logging.INFO):
        train(network, before_step=lambda optimizer, step: network.body.bias.grad.zero_())
    assert messages(caplog, logging.WARNING) == []
    assert any("body.bias" in text for text in messages(caplog))

"""Every field of TrainingArguments with a value other than its default: the same result, another, or a refusal."""

import dataclasses
import os
import runpy
from pathlib import Path

import pytest
import tiny
import torch
import toy
from argument_values import TRIALS
from transformers import TrainingArguments
from transformers.utils import logging

from hfft.errors import HfftError
from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import PhaseSpec, ReplaySpec
from hfft.training.settings import try_arguments

REPOSITORY = Path(__file__).parents[2]
BASE = {"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "dataloader_num_workers": 0}
FIELDS = {spec.name: spec for spec in dataclasses.fields(TrainingArguments)}
TRAINED = [
    pytest.param(name, replays, id=f"{name}-{'replay' if replays else 'no replay'}")
    for name, trial in sorted(TRIALS.items())
    if trial.outcome != "refused"
    for replays in ([True, False] if trial.replays else [False])
]


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What fields change for the whole process."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    torch.use_deterministic_algorithms(False)


def phase_of(arguments):
    """The phase of a recipe with these arguments, as `hfft plan` tries it."""
    content = {"name": "x", "model": {"checkpoint": "c"}, "data": {"source": "d"}, "training": {**BASE, **arguments}}
    phase = load_recipe({**content, "phases": [{"name": "p", "unfreeze": {"blocks": 2}}]}).phases[0]
    try_arguments(phase, seed=0, validate=True)
    return phase


def weights_after(arguments, folder, data, *, replays):
    replay = ReplaySpec(mode="force", engine="torch") if replays else None
    model = tiny.build("vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    spec: PhaseSpec = phase_of(arguments)
    trained, _ = toy.run(model, folder, data=data, replay=replay, unfreeze=spec.unfreeze, arguments=spec.arguments)
    return {name: value.clone() for name, value in trained.state_dict().items()}


@pytest.fixture(scope="module")
def data():
    return toy.phase_data(train=10, validation=6, eight_bit=True)


@pytest.fixture(scope="module")
def plain(request, data, tmp_path_factory):
    """Whether phases replay, and the weights without the field."""
    return request.param, weights_after({}, tmp_path_factory.mktemp("plain") / "p", data, replays=request.param)


def test_no_field_is_left_out():
    assert set(FIELDS) == set(TRIALS)


def test_the_page_is_the_scripts():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "arguments_table.py"))
    assert script["page"]() == (REPOSITORY / "docs" / "arguments.md").read_text()


@pytest.mark.parametrize("name", sorted(TRIALS))
def test_the_value_is_not_the_default(name):
    assert TRIALS[name].value != FIELDS[name].default


@pytest.mark.parametrize("name", sorted(name for name, trial in TRIALS.items() if trial.outcome == "refused"))
def test_a_field_that_would_do_nothing_or_harm_is_refused(name):
    with pytest.raises(HfftError) as caught:
        phase_of({name: TRIALS[name].value, **TRIALS[name].beside})
    assert name in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("name", "plain"), TRAINED, indirect=["plain"])
def test_a_phase_ends_with_the_weights_that_the_field_asks_for(name, plain, data, tmp_path):
    trial = TRIALS[name]
    replays, before = plain
    after = weights_after({name: trial.value, **trial.beside}, tmp_path / "p", data, replays=replays)
    beside = weights_after(trial.beside, tmp_path / "beside", data, replays=replays) if trial.beside else before
    is_same = all(torch.equal(beside[key], after[key]) for key in beside)
    assert is_same == (trial.outcome == "same")

import json
import shutil

import finished
import pytest

from hfft.errors import RunError
from hfft.runs.facts import most_confused, read_facts

ADAPTER = {"phases": [{"name": "head"}, {"name": "lora", "adapter": {"merge": False}}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished.make_run(tmp_path_factory.mktemp("facts") / "run")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_facts_are_those_of_the_files(folder):
    facts = read_facts(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    test = facts.splits["test"]
    assert facts.judged is test
    assert vars(test.metrics["accuracy"]) == metrics["test"]["accuracy"]
    assert (test.images, test.counts, test.is_carved) == (8, {"ant": 4, "bee": 4}, True)
    assert test.confusion == {"ant": {"ant": 3, "bee": 1}, "bee": {"ant": 1, "bee": 3}}
    assert test.by_class["ant"].recall.value == 0.75
    train = facts.splits["train"]
    assert (train.images, train.metrics, train.confusion, train.bins) == (16, {}, {}, ())
    assert (train.is_carved, train.calibration_error) == (False, None)
    assert [phase.spec.name for phase in facts.phases] == ["head", "last"]
    assert facts.phases[0].plan.groups[1].learning_rate == 1e-3
    assert [entry["step"] for entry in facts.phases[1].history] == [5, 10, 20]
    assert (facts.checkpoint.hub_id, facts.data.hub_id) == ("somewhere/base", "somewhere/photos")
    assert not facts.is_adapter
    assert not facts.has_own_base
    assert facts.seconds["total"] == 3.0


def test_a_run_without_a_test_split_is_judged_by_validation(tmp_path):
    both = {"train": 8, "validation": 4}
    assert read_facts(finished.make_run(tmp_path / "a", counts=both)).judged.name == "validation"
    assert read_facts(finished.make_run(tmp_path / "b", counts={"train": 8})).judged is None


def test_an_adapter_sits_on_its_checkpoint_or_on_weights_of_the_run(tmp_path):
    on_hub = read_facts(finished.make_run(tmp_path / "a", **ADAPTER))
    assert (on_hub.is_adapter, on_hub.has_own_base) == (True, False)
    own = read_facts(finished.make_run(tmp_path / "b", base=str(tmp_path / "b/0-head/checkpoint-10"), **ADAPTER))
    assert own.has_own_base
    checkpoint = tmp_path / "vit"
    checkpoint.mkdir()
    local = finished.make_run(tmp_path / "c", base=str(checkpoint), model={"checkpoint": str(checkpoint)}, **ADAPTER)
    assert not read_facts(local).has_own_base


def test_the_most_confused_come_first(tmp_path):
    split = read_facts(finished.make_run(tmp_path / "run", ("a", "b", "c"))).splits["test"]
    confusion = {"a": {"a": 9, "b": 2}, "b": {"c": 5}, "c": {"a": 2, "b": 1}}
    pairs = most_confused(type(split)(**{**vars(split), "confusion": confusion}), 3)
    assert pairs == [("b", "c", 5), ("a", "b", 2), ("c", "a", 2)]


def test_what_is_no_finished_run_is_refused(folder, tmp_path):
    with pytest.raises(RunError, match="is no run folder"):
        read_facts(tmp_path)
    (folder / "metrics.json").unlink()
    with pytest.raises(RunError, match="not finished; run its `hfft train` command again"):
        read_facts(folder)


@pytest.mark.parametrize("name", ["data.json", "environment.json", "0-head/plan.json", "1-last/result.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(RunError, match=f"the run's {name} is missing"):
        read_facts(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "{", "can't be read: Expecting"),
        ("metrics.json", "{}", "files lack 'seconds'|files lack 'calibration'|written by another version"),
        ("metrics.json", "[]", "can't be read"),
        ("data.json", '{"labels": ["a"]}', "files lack 'splits'"),
        ("0-head/plan.json", '{"groups": []}', "can't be read: .*missing"),
        ("1-last/result.json", '{"steps": 1}', "can't be read: .*missing"),
        ("1-last/history.jsonl", "{\n", "can't be read"),
        ("model/config.json", "{}", "files lack 'model_type'"),
    ],
)
def test_a_damaged_file_is_an_error_and_not_a_traceback(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(RunError, match=message):
        read_facts(folder)


def test_a_file_of_another_version_is_an_error(folder):
    change(folder / "environment.json", origin={"checkpoint": {"kind": "hub"}, "data": {}})
    with pytest.raises(RunError, match="can't be read"):
        read_facts(folder)


def test_the_phase_that_was_kept_is_a_value_and_not_read_out_of_a_sentence(tmp_path):
    phases = [{"name": f"all-{number}", "unfreeze": "all"} for number in range(12)]
    kept = {"phase": "all-11", "reason": "model/ is that of all-11"}
    assert read_facts(finished.make_run(tmp_path / "run", phases=phases, more={"kept": kept})).kept_phase == "all-11"
    early = read_facts(finished.make_run(tmp_path / "early", phases=phases))
    assert (early.kept, early.kept_phase) == ("", "all-11")

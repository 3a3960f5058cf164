import gc
import json
import subprocess
import sys

import pytest
import tiny

from hfft.cli import main
from hfft.system.lazy_imports import quick_imports

RUN = """
import json, sys
from hfft.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
json.dump([code, [*sys.modules]], open("imported.json", "w"))
"""
HEAVY = {"torch", "transformers", "datasets", "pandas", "numpy", "accelerate", "huggingface_hub", "peft", "evaluate"}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def imported(tmp_path):
    """Runs a verb in a fresh process, and returns its exit code and the names of the modules it imported."""

    def run(*arguments):
        subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, capture_output=True)
        code, modules = json.loads((tmp_path / "imported.json").read_text())
        return code, set(modules)

    return run


@pytest.fixture
def checkpoint(tmp_path):
    return tiny.save(tmp_path / "vit", "vit")


@pytest.fixture
def recipe(tmp_path, checkpoint, photos):
    photos()
    phase = {"name": "head", "learning_rate": 0.01}
    content = {"name": "mini", "model": {"checkpoint": "vit"}, "data": {"source": "photos"}, "phases": [phase]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    return "recipe.yaml"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["predict"]])
def test_nothing_heavy_is_imported_for_what_the_parser_answers(arguments, imported):
    code, modules = imported(*arguments)
    assert code == (2 if arguments == ["predict"] else 0)
    assert not modules & HEAVY


def test_nothing_heavy_is_imported_for_a_recipe_with_a_mistake_in_its_text(recipe, imported):
    code, modules = imported("train", recipe, "training.lerning_rate=1")
    assert code == 2
    assert "hfft.recipe.loading" in modules
    assert not modules & HEAVY


def test_a_plan_imports_nothing_that_scores_predicts_or_reports(recipe, imported):
    code, modules = imported("plan", recipe)
    assert code == 0
    assert {"torch", "hfft.commands.plan", "hfft.metrics.metrics"} <= modules
    assert not modules & {
        "evaluate",
        "sklearn",
        "hfft.metrics.scoring",
        "hfft.inference",
        "hfft.report",
        "hfft.commands.finetune",
    }


def test_a_prediction_imports_nothing_that_trains(checkpoint, photos, imported):
    code, modules = imported("predict", str(checkpoint), str(photos()))
    assert code == 0
    assert "torch" in modules
    assert not modules & {"evaluate", "sklearn", "peft", "pandas", "datasets", "transformers.trainer", "hfft.training"}


def test_scores_need_no_scikit_learn(checkpoint, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["evaluate", str(checkpoint), "--data", str(photos({"LABEL_0": 1, "LABEL_1": 1}))]) == 0


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    gc.unfreeze()
    yield
    gc.freeze()  # as conftest.py has it


def test_imports_are_not_collected(without_torch):
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_the_collector_is_back_after_an_import_that_fails(without_torch):
    with pytest.raises(ModuleNotFoundError), quick_imports():
        raise ModuleNotFoundError
    assert gc.isenabled()


def test_a_process_with_torch_keeps_collecting():
    before = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() <= before


def test_a_collector_that_was_off_stays_off(without_torch):
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

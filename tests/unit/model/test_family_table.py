import importlib.util
from pathlib import Path

import pytest
import tiny
from torch import nn

from hfft.model import adapters
from hfft.model.freezing import Freeze

SCRIPT = Path(__file__).parents[3] / "scripts" / "family_table.py"
NO_ADAPTER = {"bit", "mobilenet_v1", "mobilenet_v2"}


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("family_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "family_table", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_unfreeze_adapter_and_proof_are_ok(table, family):
    row = table.row(family)
    assert (row.unfreeze, row.proof) == ("ok", "ok")
    assert (row.adapter == "ok") == (family not in NO_ADAPTER)


def test_a_wrong_merge_is_not_ok(table, monkeypatch):
    monkeypatch.setattr(adapters, "_obstacle", lambda layer, config: None if isinstance(layer, nn.Conv2d) else "")
    assert table.row("bit").adapter.startswith("merged logits differ by")


def test_statistics_that_drift_are_not_ok(table, monkeypatch):
    monkeypatch.setattr(Freeze, "hold", lambda self: None)
    row = table.row("resnet")
    assert row.unfreeze.startswith("changed: ")
    assert "frozen tensors changed during the phase" in row.proof


def test_the_table_shows_a_no_with_its_reason_and_the_refused_families(table):
    rows = [table.Row("vit", 4, "classifier", 0, "ok", "ok", "ok"), table.Row("bit", 5, "fc", 0, "ok", "why", "ok")]
    text = table.markdown(rows)
    assert "| vit | 4 | classifier | 0 | ok | ok | ok |" in text
    assert "| bit | 5 | fc | 0 | ok | no | ok |" in text
    assert "- bit, adapter: why" in text
    assert "2 families in 2 classes; 5 families are refused" in text
    assert "- imagegpt: it reads colour clusters" in text

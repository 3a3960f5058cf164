"""Promise 6: killed while saving, recording or at any time, a run of three phases ends bit-equal."""

import subprocess
import sys
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import kill_and_continue


@pytest.mark.parametrize(
    ("kills", "kinds"),
    [
        pytest.param(1, ["time"], marks=pytest.mark.slow),
        pytest.param(12, ["time", "saving", "recording"], marks=[pytest.mark.nightly, pytest.mark.timeout(1800)]),
    ],
)
def test_kills(kills, kinds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", warm.Popen)
    monkeypatch.setattr(sys, "argv", ["kills", "--kills", str(kills), "--replay", "on", "--folder", str(tmp_path)])
    code, said = kill_and_continue.main(), capsys.readouterr().out
    assert code == 0, said
    assert f"{kills} of {kills} ended bit-equal" in said
    for kind in kinds:
        assert f"replay on, {kind}: killed " in said

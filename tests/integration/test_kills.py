"""Promise 6, shortly: killed while saving, recording or at any time, a run of three phases ends bit-equal."""

import subprocess
import sys
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import kill_and_continue


@pytest.mark.slow
def test_three_kills(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", warm.Popen)
    monkeypatch.setattr(sys, "argv", ["kills", "--kills", "3", "--replay", "on", "--folder", str(tmp_path)])
    code, said = kill_and_continue.main(), capsys.readouterr().out
    assert code == 0, said
    assert "3 of 3 ended bit-equal" in said
    for kind in ("time", "saving", "recording"):
        assert f"replay on, {kind}: killed " in said

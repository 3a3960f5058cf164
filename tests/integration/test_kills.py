"""Promise 6, shortly: killed while saving, recording or at any time, a run of three phases ends bit-equal."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/kill_and_continue.py"


@pytest.mark.slow
def test_three_kills(tmp_path):
    command = [sys.executable, SCRIPT, "--kills", "3", "--replay", "on", "--folder", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 ended bit-equal" in done.stdout
    for kind in ("time", "saving", "recording"):
        assert f"replay on, {kind}: killed " in done.stdout

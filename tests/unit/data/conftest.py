"""Shared by the tests of images: empty files, and what was logged."""

import logging

import pytest


@pytest.fixture
def touch(tmp_path):
    """Makes empty files: finding and splitting images must not need their pixels."""

    def make(*paths):
        for path in paths:
            file = tmp_path / "source" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return tmp_path / "source"

    return make


@pytest.fixture
def log(caplog, monkeypatch):
    """What was logged so far, without the rank that Accelerate puts in front."""
    monkeypatch.setattr(logging.getLogger("hfft"), "propagate", True)  # the command line takes it away
    caplog.set_level(logging.INFO, "hfft")
    return lambda: [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]

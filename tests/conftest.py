"""Shared by all tests: no network, one thread, and two makers: a folder of photos and a run of the command line."""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

_HF_HOME = tempfile.mkdtemp(prefix="hfft-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ |= {  # read by the libraries when they are imported, so before any of them is
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": _HF_HOME,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, Path(__file__).parents[1::-1]), os.getenv("PYTHONPATH")])),
    "TOKENIZERS_PARALLELISM": "false",
}

gc.disable()  # until all is imported, as `hfft.system.lazy_imports` has it

import pytest  # noqa: E402
import tiny  # noqa: E402
import warm  # noqa: E402
from pictures import THREE_CLASSES, make_photos  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for what no machine without a GPU can run, and one for any other skipped test."""
    skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ())]
    for reason, count in Counter(skipped).items():
        terminalreporter.write_line(f"{count} tests were skipped: {reason}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported is not walked over again: Trainer collects garbage at each phase's begin."""
    if "hfft.commands.finetune" in sys.modules and len(session.items) > 1:
        import_module("hfft.report.page")  # as runs do at their end
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def columns_are_read_whole() -> None:
    """hfft reads a column of a data set by `[:]`: value by value takes 200 times as long."""
    from datasets.arrow_dataset import Column

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(column: Column, *key: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            assert not caller.startswith("hfft.") or (key and not isinstance(key[0], int)), f"{caller} walks a column"
            return method(column, *key)

        return call

    Column.__iter__ = guarded(Column.__iter__)
    Column.__getitem__ = guarded(Column.__getitem__)


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """`photos({"train/ant": 8, "train/bee": 8})`: a folder of noisy PNGs, 40 wide and 44 high, one hue per class."""

    def make(counts: Mapping[str, int] = THREE_CLASSES, name: str = "photos") -> Path:
        return make_photos(tmp_path / name, counts)

    return make


@pytest.fixture
def work_with(tmp_path: Path, photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`work_with(RECIPE, {"train/ant": 8})`: recipe, photos and a ViT in the folder that tests then run in."""

    def prepare(recipe: str, counts: Mapping[str, int], **config: float) -> Path:
        photos(counts)
        tiny.save(tmp_path / "vit", "vit", **config)
        (tmp_path / "recipe.yaml").write_text(recipe)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return prepare


@pytest.fixture
def hfft_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`hfft_command("train", "recipe.yaml")`: the real command line in a process of its own, in `tmp_path`.

    Forked from one that has imported everything, unless it shall be `fresh`.
    """

    def run(*arguments: str | Path, fresh: bool = False) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hfft", *map(str, arguments)]
        if not fresh:
            return warm.run(command, cwd=tmp_path)
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run

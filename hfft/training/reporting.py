"""`report_to`: the logs of all phases go to TensorBoard, Weights & Biases and the like as one experiment.

The Trainer of a phase would begin an experiment of its own, at step 0. Here transformers' own callbacks live as long
as the run, and see steps that go on from phase to phase.
"""

import copy
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import patch_environment
from ruamel.yaml import YAML
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from hfft.errors import MissingPackageError, RecipeError, TrainingError, first_line, nearest
from hfft.recipe.loading import dump_recipe
from hfft.recipe.spec import Recipe
from hfft.runs.record import BOARD, REPORTING
from hfft.system.files import read_json, write_json

_LOG = get_logger(__name__)


def integrations(report_to: Any) -> list[str]:
    """The integrations that a recipe's `training.report_to` asks for: a name, a list of names, `all`, `none` or None.

    Raises:
        RecipeError: If transformers doesn't know one.
        MissingPackageError: If its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if names == ["all"]:
        return get_available_reporting_integrations()
    names = [] if names == ["none"] else list(dict.fromkeys(names))
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            meant = nearest(name, INTEGRATION_TO_CALLBACK)
            hint = f"; did you mean {meant!r}?" if meant else ""
            allowed = f"allowed: none, all, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise RecipeError(f"training.report_to: found {name!r}{hint}; {allowed}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # whatever the integration's package raises
            raise MissingPackageError(f"training.report_to: {name}: {first_line(error)}; or leave it out") from error
    return names


def check_reporting(recipe: Recipe) -> None:
    """Check what a recipe reports to, as `integrations` does, and that no phase reports elsewhere."""
    shared = recipe.training.get("report_to")
    for phase in recipe.phases:
        if phase.arguments.get("report_to") != shared:
            where = f"phases.{phase.name}.report_to"
            raise RecipeError(f"{where}: all phases are one experiment; set training.report_to instead")
    integrations(shared)


def open_reporting(recipe: Recipe, folder: Path) -> list["Reporting"]:
    """One callback if the resolved recipe reports to anything, else none."""
    names = integrations(recipe.training.get("report_to"))
    return [Reporting(names, folder, YAML(typ="safe", pure=True).load(dump_recipe(recipe)))] if names else []


def finish_reporting(reporting: Sequence["Reporting"], metrics: Mapping[str, Any]) -> None:
    """End in the main process what `open_reporting` has opened, with the content of metrics.json."""
    values = {
        f"{split}/{name}": found["value"]
        for split in ("validation", "test")
        for name, found in metrics.get(split, {}).items()
    }
    for one in reporting if PartialState().is_main_process else ():
        one.finish(values)


class Reporting(TrainerCallback):
    """Hands what the phases of a run log to integrations, as one experiment with steps that go on.

    TensorBoard's files are in the run folder, a folder per phase, and are written anew from the Trainer's own log
    where a phase is continued. What was sent elsewhere is noted, and not sent again.
    """

    def __init__(self, names: Sequence[str], folder: Path, recipe: Mapping[str, Any]) -> None:
        """Take the names of integrations, the run folder, and the content of the resolved recipe."""
        self._folder = folder
        self._recipe = recipe
        self._has_board = BOARD in names
        self._board: Any = None  # of the phase
        self._others = {name: INTEGRATION_TO_CALLBACK[name]() for name in names if name != BOARD}
        self._offset = 0  # steps of the phases before
        self._number = 0
        self._seen: tuple[Any, Any, Any] | None = None  # arguments, state and control of the last phase that began

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Go on with the experiment, or begin it."""
        if not state.is_world_process_zero:
            return
        phase = Path(args.output_dir).name
        self._number = int(phase.partition("-")[0])
        self._offset = self._steps_before(self._number)
        args = copy.copy(args)
        args.run_name = args.run_name or self._folder.name
        is_first, self._seen = self._seen is None, (args, state, control)
        if self._has_board:
            folder = self._folder / BOARD / phase
            shutil.rmtree(folder, ignore_errors=True)
            self._board = INTEGRATION_TO_CALLBACK[BOARD](tb_writer=_board_package()[0](str(folder)))
            self._board.on_train_begin(args, state, control, model=model)
            for entry in state.log_history:  # of processes before this one
                self._log(self._board, self._offset + entry["step"], {k: v for k, v in entry.items() if k != "step"})
        for name in list(self._others) if is_first else ():
            self._begin(name, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Send on what was logged, unless a process before this one has."""
        if not state.is_world_process_zero or not logs:
            return
        step = self._offset + state.global_step
        if self._board is not None:
            self._log(self._board, step, logs)
        entry = [self._number, len(state.log_history)]
        if self._others and entry > self._note.get("sent", []):
            self._send({**logs, "phase": self._number + 1}, step)
            self._keep(sent=entry)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the phase's curves; the experiment goes on."""
        if self._board is not None:
            self._board.on_train_end(args, state, control)
            self._board = None

    def finish(self, metrics: Mapping[str, float]) -> None:
        """End the experiment with the metrics of the result, named as `test/accuracy`."""
        steps = self._steps_before(None)
        if self._has_board:
            folder = self._folder / BOARD
            for path in folder.glob("events.*"):
                path.unlink()
            kind, hparams = _board_package()
            with kind(str(folder)) as writer:  # whose add_hparams would write a second file
                for summary in hparams(dict(flat(self._recipe)), dict(metrics)):
                    writer.file_writer.add_summary(summary)
                for name, value in metrics.items():
                    writer.add_scalar(name, value, steps)
        if self._seen is None:  # all phases had ended before
            return
        sections = {"validation": "eval_result", "test": "test"}  # as transformers sorts names into sections
        parts = [(*name.split("/"), value) for name, value in metrics.items()]
        self._send({f"{sections[split]}_{name}": value for split, name, value in parts}, steps)
        for name, callback in list(self._others.items()):
            with self._tolerated(name):
                callback.on_train_end(*self._seen)
                if name == "wandb":
                    callback._wandb.finish()

    def _steps_before(self, number: int | None) -> int:
        """Steps that the phases before one took, or all of them; early stopping may have ended them."""
        results = {int(path.parent.name.partition("-")[0]): path for path in self._folder.glob("*-*/result.json")}
        return sum(read_json(path)["steps"] for n, path in results.items() if number is None or n < number)

    def _log(self, callback: Any, step: int, logs: Mapping[str, Any]) -> None:
        """Hand on what was logged at a step, counted over the run."""
        assert self._seen is not None
        args, state, control = self._seen
        state = copy.copy(state)
        state.global_step = step
        callback.on_log(args, state, control, logs=dict(logs))

    def _send(self, logs: Mapping[str, Any], step: int) -> None:
        for name, callback in list(self._others.items()):
            with self._tolerated(name):
                self._log(callback, step, logs)

    def _begin(self, name: str, model: Any) -> None:
        """Begin an experiment; with W&B, the same one when a run is continued, unless variables say otherwise."""
        assert self._seen is not None
        callback, variables = self._others[name], {}
        if name == "wandb" and "WANDB_RUN_ID" not in os.environ:
            run_id = self._note.get("wandb") or uuid.uuid4().hex[:8]
            self._keep(wandb=run_id)
            variables = {"WANDB_RUN_ID": run_id, "WANDB_RESUME": os.environ.get("WANDB_RESUME", "allow")}
        try:
            with patch_environment(**variables):
                callback.on_train_begin(*self._seen, model=model)
        except Exception as error:  # whatever the integration's package raises: no account, no network
            what = f"training.report_to: {name}: {first_line(error)}"
            raise TrainingError(f"{what}; leave it out, or use its offline mode") from error
        if name in ("wandb", "trackio"):
            with self._tolerated(name):
                package = getattr(callback, f"_{name}")
                package.config.update({"recipe": dict(self._recipe)}, allow_val_change=True)

    @contextmanager
    def _tolerated(self, name: str) -> Iterator[None]:
        """Leave out an integration that fails once the run is under way."""
        try:
            yield
        except Exception as error:  # whatever the integration's package raises
            _LOG.warning(f"training.report_to: {name} fails and gets nothing more: {first_line(error)}")
            self._others.pop(name, None)

    @property
    def _note(self) -> dict[str, Any]:
        path = self._folder / REPORTING
        return read_json(path) if path.is_file() else {}

    def _keep(self, **found: Any) -> None:
        write_json(self._folder / REPORTING, {**self._note, **found})


def flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Nested values as `section.key`; a phase is called by its name, and what is no single value is text."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        elif isinstance(value, list) and all(isinstance(entry, Mapping) and "name" in entry for entry in value):
            for entry in value:
                rest = {name: part for name, part in entry.items() if name != "name"}
                yield from flat(rest, f"{above}{key}.{entry['name']}.")
        else:
            yield f"{above}{key}", value if isinstance(value, bool | int | float | str) else str(value)


def _board_package() -> tuple[Any, Any]:
    """The class that writes, and the function that puts hyperparameters into words; of either package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
    except ImportError:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        from tensorboardX.summary import hparams  # pyright: ignore[reportMissingImports]
    return SummaryWriter, hparams

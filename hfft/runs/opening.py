"""May this recipe run in that folder: anew, going on, or not, as it is finished or another run's."""

import dataclasses
import difflib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfft.errors import RecipeError, RunError
from hfft.recipe.loading import RECIPE, dump_recipe, load_recipe, without_neutral_keys
from hfft.recipe.spec import Recipe
from hfft.runs.locating import files_fingerprint
from hfft.runs.record import RunRecord, write_start
from hfft.system.distributed import meet, on_main
from hfft.system.files import expanded, is_same_place
from hfft.system.launch import spread_by
from hfft.system.machine import describe_environment

_LOG = get_logger(__name__)


def is_done(folder: Path, recipe: Recipe, *, overwrite: bool = False) -> bool:
    """Whether this very recipe has been run, and is not to be run again.

    Raises:
        RunError: If the folder can't be made, is no run folder, or holds a run of another recipe.
    """
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunError(f"output_dir: no folder can be made in {parent}")
    record = RunRecord(folder)
    # A run that was killed while it wrote its first file leaves that alone.
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= {f".{RECIPE}.partial"}):
        return False
    if not record.is_run:
        raise RunError(f"{folder} exists and is no run folder; choose another name or output_dir, or remove it")
    if overwrite:
        return False
    before, now = _trained_before(record, recipe), dump_recipe(without_neutral_keys(recipe))
    if before != now:
        lines = difflib.unified_diff(before.splitlines(), now.splitlines(), "there", "asked", lineterm="", n=0)
        shown = "\n".join(f"  {line}" for line in lines if not line.startswith("@@"))
        raise RunError(
            f"{folder} holds a run of another recipe; --overwrite replaces it, name=... makes a new one:\n{shown}"
        )
    return record.is_finished


def _trained_before(record: RunRecord, now: Recipe) -> str:
    """The recipe of a run, with the new name of a checkpoint or data that is the same or is compared later."""
    try:
        before = _recipe_before(record)
    except RecipeError:  # of another version of hfft
        return (record.folder / RECIPE).read_text(encoding="utf-8")
    model, data, environment = before.model, before.data, record.environment
    files = environment.get("checkpoint_files")
    same_files = files is not None and files == files_fingerprint(now.model.checkpoint)
    if same_files or is_same_place(model.checkpoint, now.model.checkpoint):
        model = dataclasses.replace(model, checkpoint=now.model.checkpoint)
    is_local = _origin(now.data.source, None, given=False)["kind"] == "local"
    was_local = environment.get("origin", {}).get("data", {}).get("kind") == "local"
    if is_same_place(data.source, now.data.source) or (is_local and was_local):  # images are compared by content
        data = dataclasses.replace(data, source=now.data.source, image_folder=now.data.image_folder)
    return dump_recipe(without_neutral_keys(dataclasses.replace(before, model=model, data=data)))


def _recipe_before(record: RunRecord) -> Recipe:
    """A run's recipe; without its license, where that is none of the Hub's (earlier versions took any word)."""
    path = record.folder / RECIPE
    try:
        return load_recipe(path)
    except RecipeError:
        return load_recipe(path, ["license=null"])


def has_other_source(record: RunRecord, recipe: Recipe) -> bool:
    """Whether a recipe takes a run's images from another place than the run did."""
    before = _recipe_before(record).data
    return not is_same_place(before.source, recipe.data.source) or before.image_folder != recipe.data.image_folder


def card_changes(record: RunRecord, recipe: Recipe) -> list[str]:
    """Keys for the card alone that a finished run's recipe has otherwise."""
    before = _recipe_before(record)
    return [key for key in ("license", "widget") if getattr(before, key) != getattr(recipe, key)]


def check_same_images(record: RunRecord, fingerprints: Mapping[str, str]) -> None:
    """Refuse other images than a finished run's, by the hashes of their splits."""
    if {name: split["fingerprint"] for name, split in record.data["splits"].items()} != dict(fingerprints):
        raise RunError(
            f"{record.folder}: the images aren't those of this run; --overwrite runs it on them, name=... anew"
        )


def describe_start(
    recipe: Recipe, *, precision: str, model_given: dict[str, str] | None = None, data_given: bool = False
) -> dict[str, Any]:
    """Content of environment.json.

    `origin` of checkpoint and data: `kind`, one of `hub`, `local` and `memory`; `name`, of what is on this disk the
    last part of its path; `revision` of a Hub id. On other machines, nobody can tell a Hub id from a relative path.
    """
    return {
        **describe_environment(),
        "precision": precision,
        "model_given": model_given,
        "spread_by": spread_by(),
        "origin": {
            "checkpoint": _origin(recipe.model.checkpoint, recipe.model.revision, given=model_given is not None),
            "data": _origin(recipe.data.source, recipe.data.revision, given=data_given),
        },
        "may_differ": _may_differ(recipe, str(PartialState().device)),
        "checkpoint_files": on_main(lambda: files_fingerprint(recipe.model.checkpoint)),
    }


def _origin(name: str, revision: str | None, *, given: bool) -> dict[str, str | None]:
    path = Path(expanded(name))
    is_path = path.exists()
    try:
        validate_repo_id(name)
    except HFValidationError:
        is_path = True
    kind = "memory" if given else "local" if is_path else "hub"
    shown = path.resolve().name if is_path else name
    return {"kind": kind, "name": shown, "revision": revision if kind == "hub" else None}


def _may_differ(recipe: Recipe, device: str) -> list[str]:
    """What can make another run with the same seed, on the same kind of machine, differ in the last bits."""
    found = []
    if device != "cpu" and not all(phase.arguments.get("full_determinism") for phase in recipe.phases):
        found.append(
            "kernels of the GPU that are chosen by their speed or add in no fixed order (convolutions, matrix "
            "products, attention, the gradient of interpolation); training.full_determinism makes torch use others, "
            "or refuse"
        )
    if recipe.replay.mode != "off" and recipe.replay.engine == "auto":
        found.append(
            "the engine that was fastest when the recordings were made, which replay.json of the phase names; "
            "replay.engine=torch is the same everywhere"
        )
    if recipe.precision == "auto":
        found.append("the precision that was faster here; precision=float32 is the same everywhere")
    return found


def open_folder(
    folder: Path,
    recipe: Recipe,
    environment: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    overwrite: bool,
    comments: Mapping[str, str] | None = None,
) -> None:
    """Make the run folder, or check that the run there began with the same images and model on as many processes.

    `environment` is from `describe_start`, `data` the content of data.json, `comments` are those of recipe.yaml.

    Raises:
        RunError: If the run that is there is of other images, another model, precision or number of processes.
    """
    record = RunRecord(folder)
    on_main(lambda: is_done(folder, recipe, overwrite=overwrite))  # another launch may have been here until now
    if overwrite:
        on_main(lambda: _remove(folder))
    problem = _other_images(record, data) or _other_start(record.environment, environment)
    if problem is not None:
        raise RunError(f"{folder}: {problem}; --overwrite starts the run anew")
    meet()  # all have looked
    on_main(lambda: write_start(folder, recipe, environment, data, comments))


def _remove(folder: Path) -> None:
    """Make a folder empty at once: what a kill would leave of a run could seem whole."""
    place = Path(os.path.realpath(folder))
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
    if place.exists():
        os.rename(place, old)
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def _other_images(record: RunRecord, now: Mapping[str, Any]) -> str | None:
    try:
        before = record.data
    except FileNotFoundError:  # the run was killed before it wrote that
        return None
    # Other versions may find other things; the images are the same all the same.
    is_same = all(before[key] == now[key] for key in ("labels", "splits"))
    return None if is_same else "the images have changed since this run began"


def _other_start(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a run can't go on; `before` is empty where it was killed before it noted anything."""
    if not before:
        return None
    if before.get("checkpoint_files", now["checkpoint_files"]) != now["checkpoint_files"]:
        return "the files of the checkpoint have changed since this run began"
    if before["processes"] != now["processes"]:
        return f"this run began on {before['processes']} processes and can't go on with {now['processes']}"
    problem = other_model(before.get("model_given"), now["model_given"])
    if problem is None and before["precision"] != now["precision"]:
        return f"this run began in {before['precision']} and can't go on in {now['precision']}"
    return problem


def other_model(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> str | None:
    """Why a run that began with one model object can't go on with another, by their fingerprints, if so.

    None as an argument stands for the recipe's checkpoint.
    """
    if before is None or now is None:
        kinds = ["the checkpoint of its recipe" if one is None else "a model object" for one in (before, now)]
        return None if before is now else f"this run began with {kinds[0]} and can't go on with {kinds[1]}"
    if before["weights"] != now["weights"]:
        return (
            "this run began with a model object of other weights; give it as it was then (training changes an object "
            "in place)"
        )
    if before["config"] != now["config"]:
        _LOG.warning("model: its config isn't that of the object that this run began with, such as its dropout")
    return None

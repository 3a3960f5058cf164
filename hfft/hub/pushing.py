"""A finished run -> one commit on the Hub, read back and compared; torch is imported for the comparison only."""

import dataclasses
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from pydantic import ValidationError

from hfft._version import __version__
from hfft.errors import HubError, RunError
from hfft.hub.access import connection, hub_errors, reach
from hfft.hub.content import check_base, collect, parts, shared_config
from hfft.hub.repository import check_room, send
from hfft.model.remote_code import check_code
from hfft.recipe.spec import HubSpec, Recipe
from hfft.runs.facts import read_facts
from hfft.runs.record import ADAPTER, RunRecord, write_pushes
from hfft.system.files import expanded
from hfft.system.lazy_imports import quick_imports

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LOG = logging.getLogger(__name__)  # not accelerate's, which imports torch; one process alone pushes


@dataclass(frozen=True)
class Pushed:
    """A push that was read back, and found equal.

    Attributes:
        repo_id: With its owner.
        url: Of the repository's page, or of the pull request.
        commit: Its 40 digits.
        private: Whether only its owner can see it.
        files: How many were compared by their hash.
        images: How many the logits were compared on.
        from_data: Whether these were the run's own images, or noise, where its data is gone.
        largest_difference: Of the logits.
    """

    repo_id: str
    url: str
    commit: str
    private: bool
    files: int
    images: int
    from_data: bool
    largest_difference: float

    @property
    def in_words(self) -> str:
        """One line: where it is, and what was compared."""
        kind = "private" if self.private else "public"
        images = (
            f"{self.images} images of the run" if self.from_data else f"{self.images} images of noise (no data here)"
        )
        return (
            f"pushed to {self.url} ({kind}, commit {self.commit[:8]}); read back: {self.files} files equal, logits of "
            f"{images} within {self.largest_difference:.1g}"
        )


class Pushing(TypedDict, total=False):
    """Options of `push`, with the defaults of HubSpec."""

    what: Literal["model", "adapter", "both"] | None
    private: bool
    revision: str | None
    create_pr: bool
    commit_message: str | None
    base_model: str | None


def push(
    run: str | os.PathLike[str], repo_id: str, *, trust_remote_code: bool = False, **pushing: "Unpack[Pushing]"
) -> Pushed:
    """Push a finished run in one commit, download it into an empty cache, and compare hashes and logits.

    Args:
        run: Its folder.
        repo_id: `owner/name`, or `name` for an own repository; made if it isn't there.
        trust_remote_code: Runs the Python code that the model brings, where it brings some, to compare the logits.
        **pushing: `what`: `model`, `adapter` or `both`; default: what the run ends with. `private`: whether only its
            owner sees a new repository, the default; false also allows a push to a public one. `revision`: a branch,
            made if it isn't there; default: `main`. `create_pr`: open a pull request instead of changing the branch.
            `commit_message`: title of the commit. `base_model`: Hub id of what the adapter sits on, if it was trained
            on a folder.

    Raises:
        RunError: If it is no finished run.
        HubError: If it can't be pushed as asked.
        ModelError: If the model brings code that isn't trusted.
        PushError: If the push failed; the run is as it was, and the same push finishes the job.
    """
    unknown = [key for key in pushing if key not in Pushing.__annotations__]
    if unknown:
        raise TypeError(f"push takes no {unknown[0]!r}; allowed: {', '.join(Pushing.__annotations__)}")
    try:
        spec = HubSpec(repo_id=repo_id, **pushing)
    except ValidationError as error:
        raise HubError("\n".join(map(_described, error.errors()))) from error
    return push_run(Path(expanded(run)), spec, trust_remote_code=trust_remote_code)


def _described(problem: Any) -> str:
    """What is wrong with a key of a HubSpec that isn't from a recipe."""
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("allowed: ")
    return f"{'.'.join(map(str, problem['loc']))}: found {problem['input']!r}; allowed: {message}"


def push_run(run: Path, spec: HubSpec, *, trust_remote_code: bool = False) -> Pushed:
    """Push a finished run as a recipe's `hub` section has it, and note the push in its folder; raises as `push`."""
    record = RunRecord(run)
    record.check_finished()
    if not record.environment:
        raise RunError(f"{run} is no run folder, but what was pushed of one; allowed: such as runs/NAME")
    recipe = record.recipe
    folders = parts(recipe, spec.what)
    if ADAPTER in folders:
        shared_config(run / ADAPTER, spec.base_model)
    for name in folders:
        check_code(run / name, trust_remote_code=trust_remote_code)
    destination = reach(spec)
    api = connection()
    with quick_imports():
        from hfft.hub.checking import has_labels_of_base, read_back
        from hfft.report.words import shared_recipe

    if folders == {ADAPTER: "."} and has_labels_of_base(run / ADAPTER, spec.base_model):
        # At the root, transformers' pipeline would take it for one that gives the base's labels.
        folders = {ADAPTER: ADAPTER}
    shared = shared_recipe(read_facts(run))
    files = collect(run, recipe, spec, destination.repo_id, shared, folders=folders)
    message = spec.commit_message or f"{recipe.name}: image classifier, fine-tuned with hfft {__version__}"
    earlier = _earlier(run, destination.repo_id, spec)
    done, files = send(api, destination, files, message, create_pr=spec.create_pr, earlier=earlier)
    places = {run / name: folders[name] for name in folders}
    images, from_data, difference = read_back(
        destination.repo_id, done.oid, files, places, run, trust_remote_code=trust_remote_code
    )
    pushed = Pushed(
        repo_id=destination.repo_id,
        url=done.pr_url or f"{api.endpoint}/{destination.repo_id}",
        commit=done.oid,
        private=destination.private,
        files=len(files),
        images=images,
        from_data=from_data,
        largest_difference=difference,
    )
    # A later push of the same replaces the note.
    before = [entry for entry in record.pushes if entry["asked"] != _asked(spec)]
    hashes = {file.path: file.sha256 for file in files}
    entry = {"asked": _asked(spec), "card": _card(recipe), **dataclasses.asdict(pushed), "sha256": hashes}
    write_pushes(record.folder, [*before, entry])
    return pushed


def check_ahead(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Before anything is trained: whether the recipe's result will find its place on the Hub; makes nothing there.

    `overwrite` makes the run anew, so that what was pushed before is another one.

    Raises:
        HubError: If it won't.
        PushError: If the Hub isn't reached, which is known within two seconds.
    """
    if wants_push(recipe) or (overwrite and recipe.hub.repo_id is not None):
        check_base(recipe, recipe.hub)
        destination = reach(recipe.hub, make=False)
        api, repo_id = connection(), destination.repo_id
        earlier = _earlier(Path(recipe.output_dir) / recipe.name, repo_id, recipe.hub)
        absent = (RepositoryNotFoundError, RevisionNotFoundError)
        with hub_errors(f"{repo_id}: checking its files"), suppress(*absent):
            there = api.model_info(repo_id, revision=destination.revision)
            check_room(api, there, parts(recipe, recipe.hub.what), earlier)


def wants_push(recipe: Recipe) -> bool:
    """Whether the recipe's result goes to the Hub and isn't there yet."""
    if recipe.hub.repo_id is None:
        return False
    asked, card = _asked(recipe.hub), _card(recipe)
    pushes = RunRecord(Path(recipe.output_dir) / recipe.name).pushes
    return not any(entry["asked"] == asked and entry.get("card", card) == card for entry in pushes)


def _earlier(run: Path, repo_id: str, spec: HubSpec) -> dict[str, str]:
    """What this run's own pushes to the same branch have sent, path to sha256."""
    branch, pushes = {"revision": spec.revision, "create_pr": False}, RunRecord(run).pushes
    ours = [entry for entry in pushes if entry["repo_id"] == repo_id and branch.items() <= entry["asked"].items()]
    return {path: digest for entry in ours for path, digest in entry["sha256"].items()}


def _asked(spec: HubSpec) -> dict[str, Any]:
    return {"repo_id": spec.repo_id, "what": spec.what, "revision": spec.revision, "create_pr": spec.create_pr}


def _card(recipe: Recipe) -> dict[str, Any]:
    """What may change of a finished run, and then makes its card on the Hub an old one."""
    return {"license": recipe.license, "widget": recipe.widget}

"""Run: a view of the folder that a run leaves."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hfft.errors import RunError
from hfft.hub.pushing import Pushed, Pushing, push
from hfft.recipe.loading import read_recipe
from hfft.recipe.spec import Recipe
from hfft.runs.facts import result_name
from hfft.system.files import expanded, read_json

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Run:
    """A view of a run folder; changes nothing there but the note of what was pushed."""

    def __init__(self, folder: str | Path) -> None:
        """Open a run folder.

        Raises:
            RunError: If it isn't one.
        """
        self.folder = Path(expanded(folder))
        if not (self.folder / "recipe.yaml").is_file():
            raise RunError(f"{self.folder} is no run folder: it has no recipe.yaml")

    def __fspath__(self) -> str:
        """The folder, wherever a path is asked for."""
        return str(self.folder)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return read_recipe(self.folder)

    @property
    def model_dir(self) -> Path:
        """The result: a plain transformers model folder, or an adapter folder where nothing was merged."""
        return self.folder / result_name(self.recipe)

    @property
    def is_finished(self) -> bool:
        """Whether all phases ran and the result was measured."""
        return (self.folder / "metrics.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of metrics.json: split to metric to value and interval, and what else was measured.

        `by_class`, `confusion` and `calibration` are by split, `seconds` by stage; `examples` lie beside the model.
        """
        if not self.is_finished:
            raise RunError(f"{self.folder}: this run is not finished; run its command again to continue it")
        return read_json(self.folder / "metrics.json")

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that were left out as they can't be read: file, label and reason."""
        return read_json(self.folder / "data.json").get("skipped", [])

    @property
    def predictions(self) -> pd.DataFrame:
        """One row per validation and test image."""
        return pd.read_parquet(self.folder / "predictions.parquet")

    def phase_dir(self, number: int) -> Path:
        """Folder of a phase, counted from 0."""
        return self.folder / f"{number}-{self.recipe.phases[number].name}"

    def push_to_hub(self, repo_id: str, *, trust_remote_code: bool = False, **pushing: "Unpack[Pushing]") -> Pushed:
        """Push the run as `hfft.push` does."""
        return push(self, repo_id, trust_remote_code=trust_remote_code, **pushing)

"""Tables that the library `datasets` reads: Parquet files, what `save_to_disk` wrote, the Hub, and data in memory."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from hfft.data.sources.advice import looked_for, missing_source, refuse_unused
from hfft.data.sources.layout import files_by_split
from hfft.data.sources.table import RawRows, Table, make_table
from hfft.data.sources.text_tables import TEXT_TABLES, read_text_table
from hfft.errors import DataError, first_line
from hfft.recipe.spec import DataSpec
from hfft.system.files import expanded
from hfft.system.hub_lookup import hub_problem

TABLES = (*TEXT_TABLES, ".parquet")
SAVED = ("dataset_dict.json", "state.json")  # files of `save_to_disk`


def read_memory(data: DatasetDict, spec: DataSpec) -> Table:
    """Data in memory, without its format or transform."""
    return _table(data, spec, name="data")


def read_hub(spec: DataSpec) -> Table:
    """A data set of the Hub.

    Raises:
        DataError: If `spec.source` is none.
    """
    missing = missing_source(spec.source)
    if missing is not None:
        raise DataError(f"data.source: {missing}")
    looked = f"{spec.source} is no folder or file here ({looked_for(Path(expanded(spec.source)))})"
    problem = hub_problem(spec.source, "dataset", spec.revision)
    if problem is not None:
        raise DataError(f"data.source: {looked}, and {problem}")
    try:
        loaded = _load(spec.source, spec.source, spec.config, revision=spec.revision)
    except DataError as error:
        raise DataError(f"{error}; {looked}") from error
    return _table(loaded, spec)


def read_saved(folder: Path, spec: DataSpec) -> Table:
    """What `save_to_disk` wrote."""
    refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a saved data set")
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # pyarrow, JSON and the file system raise their own
        raise DataError(f"data.source: {spec.source} can't be loaded as a saved data set: {_reason(error)}") from error
    return _table(loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded}), spec)


def read_parquet_folder(folder: Path, files: Sequence[Path], spec: DataSpec) -> Table:
    """Parquet files as the folder's card describes them, else in splits that their names tell."""
    card = folder / "README.md"
    if not (
        card.is_file() and re.search(r"^(configs|dataset_info):", card.read_text("utf-8", "replace"), re.MULTILINE)
    ):
        return replace(_table(_load_parquet(spec.source, files_by_split(folder, files)), spec), shards=len(files))
    if spec.config is None:
        _check_numbering(spec.source, files)
    return _table(_load(spec.source, str(folder), spec.config), spec)


def read_table(file: Path) -> Dataset:
    """A table of any kind.

    Raises:
        DataError: If it can't be read.
    """
    if file.suffix.lower() in TEXT_TABLES:
        return read_text_table(file)
    return _load_parquet(str(file), {"train": [file]})["train"]


def _table(splits: Mapping[Any, Dataset], spec: DataSpec, name: str | None = None) -> Table:
    return make_table({str(split): RawRows(rows.with_format(None)) for split, rows in splits.items()}, spec, name=name)


def _load(
    where: str,
    path: str,
    config: str | None = None,
    *,
    revision: str | None = None,
    data_files: dict[str, list[str]] | None = None,
) -> DatasetDict:
    """A data set of a folder, of the Hub, or of files by split."""
    try:
        loaded = load_dataset(path, config, revision=revision, data_files=data_files)
    except Exception as error:  # datasets 5.2 wraps errors in rows alone; YAML, tar, HDF5, ... raise their own before
        raise DataError(f"data.source: {where} can't be loaded as a data set: {_reason(error)}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _load_parquet(where: str, files: Mapping[str, Sequence[Path]]) -> DatasetDict:
    """Parquet files by split; of which datasets would read all with the class numbers of the first."""
    kinds = [kind for paths in files.values() if (kind := _check_numbering(where, paths))]
    named = {split: [glob.escape(str(file)) for file in paths] for split, paths in files.items()}
    if all(kind == kinds[0] for kind in kinds):
        return _load(where, "parquet", data_files=named)
    return DatasetDict({split: _load(where, "parquet", data_files={split: named[split]})[split] for split in named})


def _check_numbering(where: str, files: Sequence[Path]) -> dict[str, Any]:
    """Class numbers of Parquet files that are read as one: the columns that hold them, with the names of the classes.

    Raises:
        DataError: If they mean other classes in one file than in another.
    """
    kinds = {file: kind for file in files if (kind := _numbering(file))}
    odd = next((file for file in kinds if kinds[file] != kinds[next(iter(kinds))]), None)
    if odd is not None:
        raise DataError(
            f"data.source: {where}: {next(iter(kinds)).name} and {odd.name} number their classes differently; write "
            "both with one list of names"
        )
    return next(iter(kinds.values()), {})


def _numbering(file: Path) -> dict[str, Any]:
    """The columns of a Parquet file whose numbers are classes, with the names of these."""
    try:
        features = Features.from_arrow_schema(pq.read_schema(file))
    except (OSError, ValueError, TypeError, NotImplementedError):  # which loading reports
        return {}
    return {name: kind for name, kind in features.items() if isinstance(getattr(kind, "feature", kind), ClassLabel)}


def _reason(error: Exception) -> str:
    """The first line that says anything; the first of a DatasetGenerationError doesn't, but the rest and its cause."""
    if isinstance(error, DatasetGenerationError):
        error = DatasetGenerationError("\n".join([*str(error).splitlines()[1:], str(error.__cause__ or "")]))
    return first_line(error)

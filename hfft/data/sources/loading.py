"""Tables and data sets on disk or on the Hub, loaded by the library `datasets`; its errors become ours."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_dataset
from datasets.exceptions import DatasetGenerationError

from hfft.data.sources.text_tables import TEXT_TABLES, read_text_table
from hfft.errors import DataError, first_line


def load(
    where: str,
    path: str,
    config: str | None = None,
    *,
    revision: str | None = None,
    data_files: dict[str, list[str]] | None = None,
) -> DatasetDict:
    """A data set of a folder, of the Hub, or of files by split.

    Raises:
        DataError: If it can't be loaded.
    """
    try:
        loaded = load_dataset(path, config, revision=revision, data_files=data_files)
    except Exception as error:  # datasets 5.2 wraps errors in rows alone; YAML, tar, HDF5, ... raise their own before
        raise DataError(f"data.source: {where} can't be loaded as a data set: {reason_of(error)}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def load_parquet(where: str, files: Mapping[str, Sequence[Path]]) -> DatasetDict:
    """Parquet files by split; of which datasets would read all with the class numbers of the first.

    Raises:
        DataError: If they can't be loaded, or files of one split number their classes differently.
    """
    kinds = [kind for paths in files.values() if (kind := check_numbering(where, paths))]
    named = {split: [glob.escape(str(file)) for file in paths] for split, paths in files.items()}
    if all(kind == kinds[0] for kind in kinds):
        return load(where, "parquet", data_files=named)
    return DatasetDict({split: load(where, "parquet", data_files={split: named[split]})[split] for split in named})


def check_numbering(where: str, files: Sequence[Path]) -> dict[str, Any]:
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
    except (OSError, ValueError, TypeError, NotImplementedError):  # which loading tells of
        return {}
    return {name: kind for name, kind in features.items() if isinstance(getattr(kind, "feature", kind), ClassLabel)}


def read_table(file: Path) -> Dataset:
    """A table of any kind.

    Raises:
        DataError: If it can't be read.
    """
    if file.suffix.lower() in TEXT_TABLES:
        return read_text_table(file)
    return load_parquet(str(file), {"train": [file]})["train"]


def reason_of(error: Exception) -> str:
    """The first line that says anything; the first of a DatasetGenerationError doesn't, but the rest and its cause."""
    if isinstance(error, DatasetGenerationError):
        error = DatasetGenerationError("\n".join([*str(error).splitlines()[1:], str(error.__cause__ or "")]))
    return first_line(error)

import ast
import csv
import importlib
import io
import json
import os
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from hfft.errors import DataError
from hfft.inference.classifier import Prediction
from hfft.inference.outputs import (
    Columns,
    SkippedError,
    WithoutSkipped,
    WritingError,
    check_output_file,
    choose_format,
    save_predictions,
    source_without_hfft,
    write_lines,
)
from hfft.inference.reading import Skipped


@pytest.mark.parametrize("module", ["hfft.inference.onnx_predict", "hfft.inference.demo_page"])
def test_a_program_without_hfft_holds_each_name_once(module):
    body = ast.parse(source_without_hfft(importlib.import_module(module))).body
    imported = {node.module for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.ImportFrom)}
    assert "PIL" in imported
    assert not [name for name in imported if name is not None and name.startswith("hfft")]
    targets = [
        one for node in body if isinstance(node, ast.Assign) for target in node.targets for one in ast.walk(target)
    ]
    names = Counter(one.id for one in targets if isinstance(one, ast.Name))
    names += Counter(node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert {"open_picture", "check_image"} <= set(names)
    assert [name for name, count in names.items() if count > 1] == []


def test_a_file_has_a_folder_and_an_allowed_ending(tmp_path):
    check_output_file(tmp_path / "p.PARQUET", endings=(".parquet",))
    check_output_file(tmp_path / "p.csv")
    with pytest.raises(DataError, match=r"--html .*p.csv: allowed: a name that ends in .html or .htm"):
        check_output_file(tmp_path / "p.csv", "--html", (".html", ".htm"))
    with pytest.raises(DataError, match="there is no folder"):
        check_output_file(tmp_path / "none" / "p.parquet")
    with pytest.raises(DataError, match="is a folder"):
        check_output_file(tmp_path)


CLASSES = ("ant", 'b"e,e\n', "çat")
COLUMNS = Columns(CLASSES)
SHARES = np.random.default_rng(0).dirichlet([1, 1, 1], 3000).astype(np.float32)


def prediction(number):
    shares = {name: float(share) for name, share in zip(CLASSES, SHARES[number], strict=True)}
    best = sorted(shares, key=shares.__getitem__, reverse=True)
    return Prediction(f"photos/{number}, é.png", best[0], shares[best[0]], {name: shares[name] for name in best})


PREDICTIONS = [prediction(number) for number in range(len(SHARES))]


def test_json_lines_have_the_fields_of_a_prediction(tmp_path):
    save_predictions(PREDICTIONS, tmp_path / "p.jsonl", "jsonl", COLUMNS)
    lines = (tmp_path / "p.jsonl").read_text("utf-8").splitlines()
    assert [Prediction(**json.loads(line)) for line in lines] == PREDICTIONS
    assert list(json.loads(lines[0])["top"]) == list(PREDICTIONS[0].top)  # best first


def test_csv_has_a_column_per_class_and_every_digit(tmp_path):
    save_predictions(PREDICTIONS, tmp_path / "p.csv", "csv", COLUMNS)
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["file", "prediction", "probability", *(f"probability {name}" for name in CLASSES)]
    assert [(row[0], row[1]) for row in rows] == [(p.file, p.label) for p in PREDICTIONS]
    assert np.array_equal(np.array([row[3:] for row in rows], dtype=np.float32), SHARES)
    assert np.array_equal(pd.read_csv(tmp_path / "p.csv")["probability"].astype(np.float32), SHARES.max(axis=1))


def test_parquet_has_the_types_of_a_run(tmp_path):
    save_predictions(iter(PREDICTIONS), tmp_path / "p.parquet", "parquet", COLUMNS)
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet")
    assert table.column_names == ["file", "prediction", "probability", *(f"probability {name}" for name in CLASSES)]
    assert [str(kind) for kind in table.schema.types] == ["string"] * 2 + ["float"] * 4
    frame = table.to_pandas()
    assert frame["file"].tolist() == [p.file for p in PREDICTIONS]
    assert np.array_equal(frame.iloc[:, 3:].to_numpy(), SHARES)
    assert np.array_equal(frame["probability"], SHARES.max(axis=1))


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_no_predictions_give_a_file_without_rows(form, tmp_path):
    save_predictions([], tmp_path / "p", form, COLUMNS)
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "jsonl": lambda path: path.read_text().splitlines()}
    assert len(read[form](tmp_path / "p")) == 0


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_file_is_whole_or_absent(form, tmp_path):
    def breaking():
        yield from PREDICTIONS[:2000]
        raise DataError("broken")

    (tmp_path / "p").write_text("before")
    with pytest.raises(DataError, match="broken"):
        save_predictions(breaking(), tmp_path / "p", form, COLUMNS)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p", "before")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_disk_that_is_full(tmp_path):
    (tmp_path / ".p.partial").symlink_to("/dev/full")
    with pytest.raises(WritingError, match=r"p: can't be written: .*No space left on device") as caught:
        save_predictions(PREDICTIONS, tmp_path / "p", "csv", COLUMNS)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_lines_appear_as_they_come(form):
    stream = io.StringIO()
    seen = []

    def watched():
        for one in PREDICTIONS[:3]:
            seen.append(len(list(csv.reader(io.StringIO(stream.getvalue())))))
            yield one

    write_lines(watched(), stream, form, Columns(CLASSES[:1]))
    header = 1 if form == "csv" else 0
    assert seen == [header, header + 1, header + 2]


@pytest.mark.parametrize(
    ("asked", "file", "chosen"),
    [
        (None, None, "table"),
        ("csv", None, "csv"),
        (None, "p.CSV", "csv"),
        (None, "p.jsonl", "jsonl"),
        (None, "p.parquet", "parquet"),
        ("csv", "p.txt", "csv"),
    ],
)
def test_the_format_is_asked_for_or_told_by_the_ending(asked, file, chosen, tmp_path):
    assert choose_format(asked, file and tmp_path / file) == chosen


@pytest.mark.parametrize(
    ("asked", "file", "reason"),
    [
        ("parquet", None, "--format parquet: needs a file; add --output FILE"),
        (None, "p.txt", "the ending tells no format; allowed: .jsonl, .csv, .parquet, or --format"),
        ("table", "p.csv", "--format table: is for the screen; allowed in a file: jsonl, csv, parquet"),
        ("csv", "", "is a folder; give the name of a file"),
        ("csv", "none/p.csv", "there is no folder .*none"),
    ],
)
def test_output_that_cannot_be(asked, file, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        choose_format(asked, None if file is None else tmp_path / file)


def test_what_was_skipped_is_listed_at_the_end():
    kept = WithoutSkipped([PREDICTIONS[0], Skipped("a.png", "no such file"), PREDICTIONS[1], Skipped("b.png", "cut")])
    assert list(kept) == PREDICTIONS[:2]
    with pytest.raises(SkippedError) as caught:
        kept.raise_for_skipped()
    assert str(caught.value) == ("skipped 2 of 4 images, which can't be read:\n  a.png: no such file\n  b.png: cut")
    assert caught.value.exit_code == 1
    whole = WithoutSkipped(PREDICTIONS[:2])
    assert list(whole) == PREDICTIONS[:2]
    whole.raise_for_skipped()

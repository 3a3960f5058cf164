import json
import logging

import numpy as np
import pytest
import toy
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PillowImage

from hfft.data.audit.filtering import check_images, fingerprint_of
from hfft.data.sources.label_values import SEPARATORS
from hfft.data.sources.labels import label_array, label_keys, targets_of
from hfft.data.sources.reading import choose_splits, load_data, load_rows, read_source
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec

NAMES = ("ant", "bee", "cat")
SETS = [[0, 1], [2], [], [1, 2], [0], [0, 1, 2]]  # of the images in order
PICTURE = toy.png(PillowImage.new("RGB", (8, 8)))
ALL = SplitSpec(validation=None, test=None)


@pytest.fixture
def folder(tmp_path):
    for number in range(len(SETS)):
        (tmp_path / f"{number}.png").write_bytes(PICTURE)
    return tmp_path


def write(folder, header, rows, name="table.csv"):
    def cell(value):
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if set(text) & set(',"') else text

    lines = [",".join(["file_name", *header]), *(f"{k}.png,{','.join(map(cell, row))}" for k, row in enumerate(rows))]
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def flags(row):
    return [int(k in row) for k in range(3)]


def load(source, **spec):
    return load_data(DataSpec(source=source, splits=ALL, **spec), 0)


def in_memory(column, feature, **spec):
    images = [{"bytes": PICTURE, "path": None}] * len(column)
    rows = Dataset.from_dict({"image": images, "y": column}, features=Features({"image": Image(), "y": feature}))
    data = {"label_column": "y", **spec}
    return load_data(DataSpec(source="x", splits=ALL, **data), 0, DatasetDict(train=rows))


def found(data):
    assert data.is_multi_label
    return data.labels, [set(row) for row in data.splits["train"]["label"][:]]


EXPECTED = (NAMES, [set(row) for row in SETS])


def named(row):
    return [NAMES[k] for k in row]


# One meaning, however it is written


def test_columns_of_0_and_1(folder):
    source = write(folder, NAMES, map(flags, SETS))
    assert found(load(source)) == EXPECTED
    assert found(load(source, label_column=NAMES)) == EXPECTED
    assert found(load(source, task="multi_label")) == EXPECTED


@pytest.mark.parametrize("words", [("0", "1"), ("0.0", "1.0"), ("false", "true"), ("False", "TRUE")])
def test_0_and_1_in_other_words(folder, words):
    rows = [[words[flag] for flag in flags(row)] for row in SETS]
    assert found(load(write(folder, NAMES, rows))) == EXPECTED


@pytest.mark.parametrize("dump", [json.dumps, str], ids=["JSON", "Python"])
def test_lists_in_csv(folder, dump):
    source = write(folder, ["labels"], [[dump(named(row))] for row in SETS])
    assert found(load(source)) == EXPECTED


@pytest.mark.parametrize("mark", SEPARATORS)
def test_labels_between_separators(folder, mark):
    rows = [[mark.join(named(row)) or "[]"] for row in SETS]
    assert found(load(write(folder, ["labels"], rows), task="multi_label")) == EXPECTED


def test_lists_in_json_lines(folder):
    lines = [json.dumps({"file_name": f"{k}.png", "labels": named(row)}) for k, row in enumerate(SETS)]
    (folder / "table.jsonl").write_text("\n".join(lines))
    assert found(load(str(folder / "table.jsonl"))) == EXPECTED


def test_the_type_that_datasets_has_for_it():
    declared = List(ClassLabel(names=list(NAMES)))
    assert found(in_memory(SETS, declared)) == EXPECTED
    assert found(in_memory(SETS, declared, label_column=None)) == EXPECTED  # found by its type


@pytest.mark.parametrize("kind", ["int64", "bool", "uint8", "float32"])
def test_lists_of_0_and_1(kind):
    labels, rows = found(in_memory([flags(row) for row in SETS], List(Value(kind))))
    assert (labels, rows) == (("0", "1", "2"), EXPECTED[1])


def test_lists_of_class_numbers():
    labels, rows = found(in_memory([[0, 10], [2], []], List(Value("int64"))))
    assert labels == ("0", "2", "10")
    assert rows == [{0, 2}, {1}, set()]


# What rows are then


def test_what_training_and_evaluation_see(folder):
    data = load(write(folder, NAMES, map(flags, SETS)))
    rows = data.splits["train"]
    expected = np.asarray([flags(row) for row in SETS])
    assert np.array_equal(label_array(rows), expected)
    assert np.array_equal(targets_of(rows, 3), expected)
    assert data.counts("train") == {"ant": 3, "bee": 3, "cat": 3}
    assert label_keys(rows).tolist() == [tuple(row) for row in SETS]
    assert data.task == "multi_label"


def test_one_1_in_each_row_is_one_label(folder):
    source = write(folder, NAMES, [flags([k % 3]) for k in range(6)])
    assert not load(source, label_column=NAMES).is_multi_label
    assert load(source, label_column=NAMES, task="multi_label").is_multi_label


def test_class_folders_come_before_columns_of_0_and_1(tmp_path):
    for folder in ("ant", "bee"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(PICTURE)
    (tmp_path / "t.csv").write_text("file_name,blurred,night\nant/1.png,0,1\nbee/1.png,1,1\n")
    data = load(str(tmp_path / "t.csv"))
    assert (data.is_multi_label, data.labels) == (False, ("ant", "bee"))


def test_the_row_that_decided_is_named(folder, caplog):
    with caplog.at_level(logging.INFO):
        load(write(folder, NAMES, map(flags, [[0], [1, 2], [2], [], [0], [1]])))
    assert "takes the labels as multi-label, as row 1 (1.png) has 2 of the 3 classes" in caplog.text


def test_a_separator_in_a_label_is_warned_of(folder, caplog):
    source = write(folder, ["label"], [["ant"], ["ant|bee"], ["bee"]] * 2)
    assert load(source).labels == ("ant", "ant|bee", "bee")
    assert "the label 'ant|bee' is taken for one class; if it is several, say data.task=multi_label" in caplog.text
    caplog.clear()
    load(source, task="single_label")
    assert not caplog.text


def test_an_unlabelled_row_is_none_without_labels(folder):
    source = write(folder, ["labels"], [["ant|bee"], [""], ["[]"], ["bee"], ["ant"], ["bee"]])
    with pytest.raises(DataError, match=r"no label in 1 of 6 rows, the first is row 1 \(1.png\)"):
        load(source, task="multi_label")
    assert read_source(DataSpec(source=source, task="multi_label")).splits["train"]["label"][:3] == [[0, 1], None, []]


# The first row that is wrong

WRONG = [
    (
        NAMES,
        [[1, 1, 0], [0, 2, 1]],
        {"label_column": NAMES},
        r"row 1 \(1.png\) holds \['0', '2', '1'\]; allowed: 0 or 1 for each class",
    ),
    (NAMES, [[1, 1, 0], [0, 2, 1]], {"task": "multi_label", "label_column": NAMES}, r"row 1 .*'2'.*0 or 1 for"),
    (NAMES, [[1, 1, 0], [0, "", 1]], {"task": "multi_label", "label_column": NAMES}, r"row 1 \(1.png\) .*None"),
    (NAMES, [[1, 0, 0], [0, 1, 1]], {"task": "single_label", "label_column": NAMES}, r"row 1 .*which sum to 1"),
    (["labels"], [['["ant"]'], ["[ant]"]], {}, r"row 1 \(1.png\) holds '\[ant\]'; allowed: a list such as"),
    (["labels"], [["ant|"], ["bee"]], {"task": "multi_label"}, r"row 0 \(0.png\) holds 'ant\|'; allowed for"),
]


@pytest.mark.parametrize(("header", "rows", "spec", "message"), WRONG)
def test_the_first_wrong_row_is_named(folder, header, rows, spec, message):
    with pytest.raises(DataError, match=message):
        load(write(folder, header, rows), **spec)


def test_a_row_of_0_and_1_that_is_too_short():
    """Not: class numbers, of which there are two."""
    with pytest.raises(
        DataError, match=r"row 2 \(train/2\) holds \[0, 1\]; allowed .*: 0 or 1 for each of the 3 classes"
    ):
        in_memory([[0, 1, 1], [1, 0, 0], [0, 1], [1, 1, 1]], List(Value("int64")))


@pytest.mark.parametrize("row", [["ant", "ant"], ["ant", ""], [None]])
def test_a_list_that_is_no_set_of_names(row):
    with pytest.raises(
        DataError, match=r"row 1 \(train/1\) holds .*a list of names or of class numbers from 0, each once"
    ):
        in_memory([["ant", "bee"], row], List(Value("string")))


def test_lists_in_some_rows_of_csv(folder):
    source = write(folder, ["labels"], [['["ant", "bee"]'], ["bee"], ['["ant"]']])
    with pytest.raises(DataError, match=r"1 \(1.png\) holds 'bee'"):
        load(source)
    assert load(source, task="single_label").labels == ('["ant", "bee"]', '["ant"]', "bee")
    assert found(load(source, task="multi_label")) == (("ant", "bee"), [{0, 1}, {1}, {0}])


def test_a_column_that_would_be_left_out_for_one_wrong_value(folder):
    source = write(folder, NAMES, [[1, 1, 0], [0, 2, 1], *map(flags, SETS[2:])])
    with pytest.raises(
        DataError, match=r"row 1 holds '2' in the column 'bee', which holds mostly 0 and 1, as ant, cat do"
    ):
        load(source)


def test_columns_of_other_numbers_are_no_labels(folder):
    source = write(folder, [*NAMES, "width"], [[*flags(row), 640 + k] for k, row in enumerate(SETS)])
    assert found(load(source)) == EXPECTED


def test_several_labels_where_one_is_asked_for(folder):
    lines = [{"file_name": f"{k}.png", "labels": named(row)} for k, row in enumerate([[1], [0, 2]])]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"row 1 \(1.png\) holds \['ant', 'cat'\]; allowed for data.task single_label"):
        load(str(folder / "t.jsonl"), task="single_label")


def test_one_label_where_several_are_asked_for():
    feature = ClassLabel(names=list(NAMES))
    with pytest.raises(DataError, match=r"row 0 \(train/0\) holds 2; allowed for data.task multi_label: a list"):
        in_memory([2, 1, 0], feature, task="multi_label")


def test_a_class_number_that_is_none():
    with pytest.raises(DataError, match=r"row 1 \(train/1\) holds \[-1\]; allowed for data.task multi_label"):
        in_memory([[0], [-1]], List(Value("int64")))


def test_class_folders_hold_one_label(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "1.png").write_bytes(PICTURE)
    with pytest.raises(DataError, match=r"data.task: .* is a folder of class folders, where an image has one label"):
        load(str(tmp_path), task="multi_label")


def test_images_of_a_class_are_not_counted_out(folder):
    source = write(folder, NAMES, map(flags, SETS))
    with pytest.raises(DataError, match=r"data.max_per_class: an image"):
        load(source, max_per_class=2)


# For a model that exists


def test_rows_for_a_model_are_numbered_as_its_classes(folder):
    source = write(folder, ["labels"], [[json.dumps(named(row))] for row in SETS])
    rows = load_rows(DataSpec(source=source, task="multi_label"), ("cat", "bee", "dog", "ant"))
    assert [sorted(row) for row in rows["label"][:]] == [[1, 3], [0], [], [0, 1], [3], [0, 1, 3]]
    with pytest.raises(DataError, match="bee; it knows cat, ant"):
        load_rows(DataSpec(source=source, task="multi_label"), ("cat", "ant"))


# The audit


def test_an_image_that_can_not_be_read_is_left_out_with_all_its_labels(folder):
    source = write(folder, NAMES, map(flags, SETS))
    (folder / "3.png").write_bytes(PICTURE[:30])
    spec = DataSpec(source=source, splits=ALL)
    images = read_source(spec)
    checked = check_images(images, choose_splits(images, spec, 0), spec, 0)
    assert [(skip.file, skip.label) for skip in checked.skipped] == [("3.png", "bee + cat")]
    assert checked.images.counts("train") == {"ant": 3, "bee": 2, "cat": 2}


def test_most_images_of_a_label_must_be_readable(folder):
    source = write(folder, NAMES, map(flags, SETS))
    for number in (1, 3):  # two of three images of cat, one of three of bee
        (folder / f"{number}.png").write_bytes(PICTURE[:30])
    spec = DataSpec(source=source, splits=ALL)
    images = read_source(spec)
    with pytest.raises(DataError, match=r"\(2 of 3\)"):
        check_images(images, choose_splits(images, spec, 0), spec, 0)


def test_a_fingerprint_knows_the_labels(folder):
    first = load(write(folder, NAMES, map(flags, SETS)))
    same = load(write(folder, ["labels"], [[json.dumps(named(row))] for row in SETS], "lists.csv"))
    other = load(write(folder, NAMES, map(flags, [*SETS[:-1], [0, 1]]), "other.csv"))
    prints = [fingerprint_of(data.splits["train"]) for data in (first, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_one_label_comes_before_lists_where_both_are_declared():
    images = [{"bytes": PICTURE, "path": None}] * 4
    content = {"image": images, "kind": [0, 1, 0, 1], "tags": [[0], [], [1], [0, 1]]}
    two = ClassLabel(names=["x", "y"])
    rows = Dataset.from_dict(content, features=Features({"image": Image(), "kind": two, "tags": List(two)}))
    data = DatasetDict(train=rows)
    assert not load_data(DataSpec(source="x", splits=ALL), 0, data).is_multi_label
    assert load_data(DataSpec(source="x", splits=ALL, task="multi_label"), 0, data).is_multi_label


def test_tables_of_other_types_in_their_splits(folder):
    """Text in the one and lists in the other: no name is taken apart by letters."""
    lines = {"test": [["ant", "bee"], ["ant"], ["bee"]], "train": ["ant", "bee", "ant"]}
    for split, column in lines.items():
        rows = [
            json.dumps({"file_name": f"{k + 3 * (split == 'train')}.png", "labels": y}) for k, y in enumerate(column)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    for image in folder.glob("*.png"):
        image.rename(folder.parent / image.name)
    with pytest.raises(DataError, match=r"row 0 \(.*3.png\) holds 'ant'; allowed for data.task multi_label: a list"):
        load(str(folder), image_folder=str(folder.parent))

"""What is no label is no class, and one class has one name, in every kind of source."""

import json
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from hfft.data.sources.labels import alike_classes, label_array, label_text, same_class, targets_of
from hfft.data.sources.reading import load_data, load_rows
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec

ALL = SplitSpec(validation=None, test=None)
NAN = float("nan")
NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))


def load(source, splits=ALL, **fields):
    return load_data(DataSpec(source=str(source), splits=splits, **fields), 0)


def in_memory(splits=ALL, feature=None, **columns):
    parts = {}
    for split, labels in columns.items():
        kinds = {"image": Image(), "label": feature} if feature else {"image": Image()}
        content = {"image": [{"bytes": b"x", "path": None}] * len(labels), "label": labels}
        parts[split] = Dataset.from_dict(content, features=Features(kinds) if feature else None)
        if not feature:
            parts[split] = parts[split].cast_column("image", Image())
    return load_data(DataSpec(source="x", splits=splits), 0, DatasetDict(parts))


def write(folder, name, labels):
    """A table of paths in the form that its ending tells, CSV unquoted."""
    file = folder / name
    paths = [f"{name}{n}.png" for n in range(len(labels))]
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"path": paths, "label": labels}), file)
    elif name.endswith(".jsonl"):
        file.write_text(
            "".join(json.dumps({"path": p, "label": v}) + "\n" for p, v in zip(paths, labels, strict=True))
        )
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        file.write_text("".join(f"{p}{mark}{v}\n" for p, v in [("path", "label"), *zip(paths, labels, strict=True)]))
    return file


NO_LABELS = [
    *[(name, ["a", value, "b", "a"]) for name in ("t.csv", "t.tsv") for value in ("", " ", "\u00a0", "\u200b", '""')],
    *[("t.jsonl", ["a", value, "b", "a"]) for value in (None, "", "  ", "\n", "\u00a0")],
    *[("t.parquet", ["a", value, "b", "a"]) for value in (None, "", " ")],
    *[(name, [0.0, NAN, 1.0, 0.0]) for name in ("t.jsonl", "t.parquet")],
    *[(name, [0, None, 1, 0]) for name in ("t.jsonl", "t.parquet")],
    ("t.parquet", np.array([0, NAN, 1, 0], np.float16)),
    ("t.parquet", pa.array(["a", " ", "b", "a"], pa.large_string())),
    ("t.parquet", pa.array(["a", "", "b", "a"], pa.string_view())),
    ("t.parquet", pa.array(["a", " ", "b", "a"]).dictionary_encode()),
]


@pytest.mark.parametrize(("name", "labels"), NO_LABELS, ids=lambda value: str(value)[:30])
def test_a_value_that_is_no_label(name, labels, tmp_path):
    with pytest.raises(DataError, match=rf"no label in 1 of 4 rows, the first is row 1 \({name}1.png\)"):
        load(write(tmp_path, name, labels))


@pytest.mark.parametrize("labels", [["a", "", "b"], ["a", " ", "b"], [0.0, NAN, 1.0], [True, None, False]], ids=str)
def test_a_value_that_is_no_label_in_memory(labels):
    with pytest.raises(DataError, match="no label in 1 of 3 rows, the first is row 1"):
        in_memory(train=labels)


def test_a_declared_name_that_is_none():
    feature = ClassLabel(names=["", "ant", "bee "])
    assert in_memory(train=[1, 2, 1], feature=feature).labels == ("ant", "bee")
    with pytest.raises(DataError, match="no label in 1 of 3 rows, the first is row 2"):
        in_memory(train=[1, 2, 0], feature=feature)


def test_blanks_among_texts_of_several_labels(tmp_path):
    file = write(tmp_path, "t.csv", ["a|b", " ", "[]", "b"])
    with pytest.raises(DataError, match="no label in 1 of 4 rows, the first is row 1"):
        load(file, task="multi_label")


ONE_CLASS = [
    ([0, 1, 0], [0.0, 1.0]),
    (["0", "1", "0"], [0, 1]),
    (["0", "1", "0"], ["0.0", "1.0"]),
    ([0.0, 1.0, 0.0], ["0", "1"]),
    ([False, True, True], [0, 1]),
    ([False, True, True], ["false", "TRUE"]),
    ([0.0, 1.0, 1.0], [False, True]),
    ([NFC, "b", "b"], [NFD, "b"]),
    ([NFD, "b", "b"], [NFC, "b"]),
    (["a", "b ", " b"], ["a\u00a0", "b"]),
    (["-0.0", "1.0", "1"], ["0", "1.00"]),
]


@pytest.mark.parametrize(("train", "test"), ONE_CLASS, ids=ascii)
def test_one_class_across_splits_of_other_types(train, test):
    data = in_memory(SplitSpec(validation=None), train=train, test=test)
    assert len(data.labels) == 2
    assert label_array(data.splits["test"]).tolist() == [0, 1]


def test_one_class_across_files(tmp_path, log):
    write(tmp_path, "train.csv", ["0", "1", "0", "1"])
    write(tmp_path, "test.jsonl", [0.0, 1.0])
    data = load(tmp_path, SplitSpec(validation=None))
    assert (data.labels, data.counts("test")) == (("0", "1"), {"0": 1, "1": 1})
    assert any("'0', '0.0' are taken for one class, '0'" in line for line in log())


def test_one_class_of_class_folders(touch, log):
    files = [f"train/{NFC}/1.png", "train/bee/1.png", f"test/{NFD}/1.png", "test/bee /1.png"]
    data = load(touch(*files), SplitSpec(validation=None))
    assert (data.labels, data.counts("test")) == ((NFC, "bee"), {NFC: 1, "bee": 1})
    assert any(ascii(NFD) in line and ascii(NFC) in line for line in log())


def test_one_class_of_several_labels():
    data = in_memory(train=[["ant", NFC], [NFD, "bee "], ["bee"]], feature=List(Value("string")))
    assert data.labels == (NFC, "ant", "bee")
    assert label_array(data.splits["train"]).tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 1]]


def test_splits_that_number_several_labels_differently():
    kinds = {
        split: List(ClassLabel(names=names)) for split, names in {"train": ["a", "b"], "test": ["b", "a"]}.items()
    }
    images = [{"bytes": b"x", "path": None}] * 2
    parts = {
        split: Dataset.from_dict(
            {"image": images, "label": [[0], [0, 1]]}, Features({"image": Image(), "label": kind})
        )
        for split, kind in kinds.items()
    }
    data = load_data(DataSpec(source="x", splits=SplitSpec(validation=None)), 0, DatasetDict(parts))
    assert data.labels == ("a", "b")
    assert [label_array(data.splits[split]).tolist() for split in parts] == [[[1, 0], [1, 1]], [[0, 1], [1, 1]]]


def test_one_spelling_alone_stays_as_it_is(tmp_path, log):
    for labels in (["0.0", "1.0"], ["007", "7"], ["1.0", "1.5"], ["3.1", "3.10"], [NFD, "b"], ["true", "false"]):
        assert set(load(write(tmp_path, "t.csv", labels * 2)).labels) == set(labels)
    assert log() == []


def test_spaces_go_with_a_word(tmp_path, log):
    assert load(write(tmp_path, "t.csv", ["a", " b", "a ", "b"])).labels == ("a", "b")
    (line,) = log()
    assert "2 of 4 labels are taken without spaces" in line
    assert "t.csv1.png: ' b' as 'b'" in line


def test_a_word_for_nothing_is_said(tmp_path, log):
    assert load(write(tmp_path, "t.csv", ["NA", "b", "nan", "b"])).labels == ("NA", "b", "nan")
    (line,) = log()
    assert "'NA', 'nan' is taken for the name of a class" in line


def test_classes_that_were_named_with_such_a_word(touch, log):
    assert in_memory(train=[0, 1, 0], feature=ClassLabel(names=["None", "ant"])).labels == ("None", "ant")
    assert load(touch("NA/1.png", "ant/1.png")).labels == ("NA", "ant")
    assert log() == []


@pytest.mark.parametrize("other", ["cat", "CAT", "C at", "Ca\u00adt", "\uff23at"])
def test_names_that_are_almost_alike_are_shown(other, tmp_path, log):
    data = load(write(tmp_path, "t.csv", ["Cat", other, "dog", "Cat"]))
    assert len(data.labels) == 3
    found = [line for line in log() if "called almost alike" in line]
    assert len(found) == (other != "C at")
    assert all("'Cat'" in line and repr(other) in line for line in found)


@pytest.mark.parametrize("word", ["-", "?", "na", "Null"])
def test_other_words_for_nothing(word, tmp_path, log):
    load(write(tmp_path, "t.csv", [word, "b", "c", "b"]))
    assert [repr(word) in line for line in log()] == [True]


def test_minus_one_is_said(log):
    assert in_memory(train=[0, 1, -1, -1]).labels == ("0", "1", "-1")
    (line,) = log()
    assert "-1 is taken for the name of a class" in line


def test_a_label_that_is_several_by_its_spaces(tmp_path, log):
    labels = ["scab", "rust", "scab rust", "great dane"]
    assert len(load(write(tmp_path, "t.csv", labels)).labels) == 4
    (line,) = log()
    assert "the label 'scab rust' is taken for one class" in line


def test_parquet_files_that_number_their_classes_differently(tmp_path):
    """Classes are in the order of train, whatever the order of the files' names."""
    for split, names, labels in (("train", ["b", "a"], [0, 0, 1]), ("test", ["a", "b"], [1, 1])):
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        content = {"image": [{"bytes": b"x", "path": None}] * len(labels), "label": labels}
        Dataset.from_dict(content, features=features).to_parquet(tmp_path / f"{split}.parquet")
    data = load(tmp_path, SplitSpec(validation=None))
    assert (data.labels, data.counts("train"), data.counts("test")) == (("b", "a"), {"b": 2, "a": 1}, {"b": 2, "a": 0})
    (tmp_path / "test.parquet").rename(tmp_path / "train-1.parquet")
    for card in ("", "---\nconfigs:\n- config_name: default\n  data_files: '*.parquet'\n---\n"):
        (tmp_path / "README.md").write_text(card)
        with pytest.raises(DataError, match=r"train-1.parquet and train.parquet"):
            load(tmp_path)


def test_one_class_in_memory():
    with pytest.raises(DataError, match="the class ant"):
        in_memory(train=[0, 0, 0], feature=ClassLabel(names=["ant", "bee"]))


def test_alike_class_folders(touch, log):
    load(touch("Cat/1.png", "cat/1.png"))
    assert any("'Cat' and 'cat'" in line for line in log())


def test_a_model_knows_a_class_in_another_spelling(touch):
    rows = load_rows(DataSpec(source=str(touch(f"{NFD}/1.png", "1.0/1.png", "bee /1.png"))), ("bee", NFC, "1"))
    assert dict(zip(rows["file"][:], rows["label"][:], strict=True)) == {
        f"{NFD}/1.png": 1,
        "1.0/1.png": 2,
        "bee /1.png": 0,
    }
    with pytest.raises(DataError, match="Bee; it knows bee"):
        load_rows(DataSpec(source=str(touch("Bee/1.png"))), ("bee", NFC, "1"))


def test_control_characters_are_escapes(tmp_path):
    labels = ["a\x1b[31m", "b\nc", "d\u202ee"]
    assert load(write(tmp_path, "t.jsonl", labels)).labels == ("a\\x1b[31m", "b\\x0ac", "d\\u202ee")
    assert label_text(b"caf\xe9") == "caf\\xe9"


def test_groups_that_are_no_value(tmp_path):
    text = "path,label,g\n1.png,a,x\n2.png,b, \n"
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match="group_column: 'g' holds"):
        load(tmp_path / "t.csv", group_column="g")


def test_a_group_in_two_spellings_is_one(tmp_path):
    for split, group in (("train", "1"), ("test", "1.0 ")):
        text = f"path,label,g\n{split}1.png,a,{group}\n{split}2.png,b,{split}\n"
        (tmp_path / f"{split}.csv").write_text(text)
    with pytest.raises(DataError, match="1 groups have images in train and in test, the first is '1'"):
        load(tmp_path, SplitSpec(validation=None), group_column="g")


def test_keys():
    assert {same_class(text) for text in ("0", "0.0", "-0.0", "False")} == {"0"}
    assert [same_class(text) for text in ("1.00", "01.0", "1.5", NFD)] == ["1", "01", "1.5", NFC]
    assert alike_classes(["a", "A", "b"]) == [["a", "A"]]


# Rows that repeat an image


def repeating(folder, rows):
    (folder / "t.csv").write_text("path,label\n" + "".join(f"{file}.png,{label}\n" for file, label in rows))
    return folder / "t.csv"


def test_oversampled_rows_train(tmp_path, log):
    data = load(repeating(tmp_path, ["1a", "2b", "2b", "3a", "2b"]))
    assert data.splits["train"]["file"][:] == ["1.png", "2.png", "2.png", "3.png", "2.png"]
    assert data.counts("train") == {"a": 2, "b": 3}
    assert any("2 of 5 training rows of 'train' repeat an image" in line for line in log())


def test_an_oversampled_image_is_in_one_split_and_counts_once_where_it_is_measured(tmp_path):
    rows = [(n, "ab"[n % 2]) for n in range(20) for _ in range(3 if n % 2 else 1)]
    data = load(repeating(tmp_path, rows), SplitSpec(validation=0.3, test=0.3))
    files = {split: part["file"][:] for split, part in data.splits.items()}
    assert not set(files["train"]) & {*files["validation"], *files["test"]}
    assert all(len(set(files[split])) == len(files[split]) == 6 for split in ("validation", "test"))
    assert len(files["train"]) == 4 + 3 * 4


def test_rows_of_a_test_table_that_repeat_an_image_count_once(tmp_path, log):
    write(tmp_path, "train.csv", ["a", "b"])
    (tmp_path / "test.csv").write_text("path,label\n1.png,a\n1.png,a\n2.png,b\n")
    assert load(tmp_path, SplitSpec(validation=None)).splits["test"]["file"][:] == ["1.png", "2.png"]
    assert any("left out 1 of 3 rows of 'test', which repeat an image" in line for line in log())
    assert len(load_rows(DataSpec(source=str(tmp_path / "test.csv")), ("a", "b"))) == 2


@pytest.mark.parametrize("text", ["path,label\n1.png,a\n1.png,b\n", "path,label,split\n1.png,a,train\n1.png,a,test\n"])
def test_rows_that_contradict_each_other(text, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=r"1.png has two"):
        load(tmp_path / "t.csv", SplitSpec(validation=None, test="auto"))


# Soft labels and weights


def load_columns(columns, splits=None, **fields):
    images = [{"bytes": b"", "path": None}] * len(next(iter(columns.values())))
    source = DatasetDict(train=Dataset.from_dict({"image": images, **columns}))
    spec = DataSpec(source="unused", splits=splits or SplitSpec(validation=None, test=None), **fields)
    return load_data(spec, 0, source)


SOFT = {"ant": [1.0, 0.25, 0.0], "bee": [0.0, 0.75, 1.0]}


def test_classes_alone_need_no_targets():
    assert targets_of(load_columns({"label": ["a", "b"]}).splits["train"], 2) is None


def test_a_column_for_each_class():
    data = load_columns(SOFT, label_column=("ant", "bee"))
    assert data.labels == ("ant", "bee")
    assert data.splits["train"]["label"][:] == [0, 1, 1]
    np.testing.assert_array_equal(targets_of(data.splits["train"], 2), [[1, 0], [0.25, 0.75], [0, 1]])


def test_a_column_of_lists():
    data = load_columns({"label": [[1.0, 0.0], [0.25, 0.75]]})
    assert data.labels == ("0", "1")
    np.testing.assert_array_equal(targets_of(data.splits["train"], 2), [[1, 0], [0.25, 0.75]])


def test_weights():
    data = load_columns({"label": ["a", "b", "a"], "w": [0.5, 2, 1]}, weight_column="w")
    np.testing.assert_array_equal(targets_of(data.splits["train"], 2), [[0.5, 0], [0, 2], [1, 0]])
    assert data.columns == "image 'image', label 'label', weight 'w'"


def test_soft_labels_and_weights():
    data = load_columns({**SOFT, "w": [1.0, 2.0, 4.0]}, label_column=("ant", "bee"), weight_column="w")
    np.testing.assert_array_equal(targets_of(data.splits["train"], 2), [[1, 0], [0.5, 1.5], [0, 4]])


def test_shares_stay_beside_their_images_when_splits_are_carved():
    columns = {"ant": [k / 40 for k in range(41)], "bee": [1 - k / 40 for k in range(41)]}
    data = load_columns(columns, SplitSpec(validation=0.3, test=None), label_column=("ant", "bee"))
    for rows in data.splits.values():
        expected = [int(file.removeprefix("train/")) / 40 for file in rows["file"]]
        np.testing.assert_allclose(targets_of(rows, 2)[:, 0], expected, rtol=1e-6)


BAD_SOFT_LABELS = [
    (
        {"ant": [1.0, 0.5], "bee": [0.0, 0.6]},
        {"label_column": ("ant", "bee")},
        r"row 1 \(train/1\) holds \[0.5, 0.6",
    ),
    (
        {"ant": [1.0, -0.5], "bee": [0.0, 1.5]},
        {"label_column": ("ant", "bee")},
        "allowed: a probability of each class",
    ),
    ({"ant": [1.0, None], "bee": [0.0, 1.0]}, {"label_column": ("ant", "bee")}, r"holds \[None, 1.0\]"),
    ({"label": [[1.0, 0.0], [1.0]]}, {}, r"row 1 \(train/1\) holds \[1.0\]"),
    ({"label": ["a", "b"], "w": [1.0, 0.0]}, {"weight_column": "w"}, r"weight_column: row 1 \(train/1\) holds 0.0"),
    (
        {"label": ["a", "b"], "w": ["1", "x"]},
        {"weight_column": "w"},
        "holds 'x'; allowed: a number above 0",
    ),
    ({"label": ["a", "b"], "w": [1.0, float("nan")]}, {"weight_column": "w"}, "holds nan; allowed: a number above 0"),
    ({"label": ["a", "b"]}, {"weight_column": "w"}, "weight_column: found 'w'; allowed: image, label"),
    ({"label": ["a", "b"]}, {"label_column": ("a", "b")}, "label_column: found 'a'; allowed: image, label"),
]


@pytest.mark.parametrize(
    ("columns", "fields", "message"), BAD_SOFT_LABELS, ids=[row[2][:40] for row in BAD_SOFT_LABELS]
)
def test_columns_that_hold_something_else(columns, fields, message):
    with pytest.raises(DataError, match=message):
        load_columns(columns, **fields)

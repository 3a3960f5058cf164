import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from shards import write_tar

from hfft.data.images.decoding import decode_row, read_content
from hfft.data.sources.reading import load_data, load_rows
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec

NO_CARVING = SplitSpec(validation=None, test=None)


def load(source, splits=NO_CARVING, **fields):
    return load_data(DataSpec(source=str(source), splits=splits, **fields), 0)


def found(data):
    """Split -> file -> class name."""
    return {split: {row["file"]: data.labels[row["label"]] for row in rows} for split, rows in data.splits.items()}


@pytest.fixture
def write(touch, tmp_path):
    """Writes a file beside empty images."""

    def make(name, text, *images):
        folder = touch(*images) if images else tmp_path / "source"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder / name

    return make


def test_a_table_of_paths(write):
    file = write("labels.csv", "image,label\na/1.png,ant\nb/2.png,bee\n", "a/1.png", "b/2.png")
    data = load(file)
    assert found(data) == {"train": {"a/1.png": "ant", "b/2.png": "bee"}}
    assert data.splits["train"][0]["image"] == {"bytes": None, "path": str(file.parent / "a/1.png")}
    assert data.columns == "image 'image', label 'label'"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "path;class\n1.png;ant\n2.png;bee\n"),
        ("t.tsv", "path\tclass\n1.png\tant\n2.png\tbee\n"),
        ("t.csv", "\ufeffpath,class\r\n1.png,ant\r\n2.png,bee\r\n"),
        ("t.csv", 'class,"path"\nant,"1.png"\nbee,"2.png"\n'),
        ("T.CSV", "snapshot,class\n1.png,ant\n2.png,bee\n"),
        ("t.jsonl", '{"path": "1.png", "class": "ant"}\n\n{"class": "bee", "path": "2.png"}\n'),
        ("t.csv", "path,class\n.\\1.png,ant\n2.png,bee\n"),
        ("t.csv", "path,class\n1.png,ant,\n2.png,bee,\n"),
        ("t.csv", ",path,class,\n0,1.png,ant,\n1,2.png,bee,\n"),
        ("t.csv", "path,class,\n1.png,ant\n2.png,bee\n"),
        ("t.csv", "path\tclass\n1.png\tant\n2.png\tbee\n"),
        ("t.csv", 'path,class\n1.png,ant\n"2.png",bee\n'),
        ("t.csv", 'path,class,note\r1.png,ant,a "b" c\r2.png,bee,"two\rlines"\r'),
        ("t.csv", 'path,class,note\n1.png,ant,\u2028\x0b\n\n  \n2.png,bee,"a ""b"""'),
        ("t.jsonl", '{"path": "1.png", "class": "ant", "note": "\u2028"}\r\n{"class": "bee", "path": "2.png"}'),
    ],
)
def test_tables_in_other_forms(name, text, write):
    assert found(load(write(name, text, "1.png", "2.png"))) == {"train": {"1.png": "ant", "2.png": "bee"}}


def test_classes_that_pandas_takes_for_nothing(write):
    file = write("t.csv", "path,label\n1.png,NA\n2.png,null\n3.png,007\n4.png,7\n")
    assert load(file).labels == ("007", "7", "NA", "null")


def test_labels_that_are_numbers_are_in_their_order(write):
    rows = "".join(f"{n}.png,{n}\n" for n in (10, 9, 1))
    assert load(write("t.csv", f"path,label\n{rows}")).labels == ("1", "9", "10")
    long = "9" * 5000  # more than Python reads as a number
    assert load(write("t.csv", f"path,label\n{rows}0.png,{long}\n")).labels == ("1", "9", "10", long)


def test_a_name_that_begins_with_a_tilde_and_no_user(write):
    data = load(write("t.csv", "path,label\n~1.png,a\n~nobody/2.png,b\n"))
    assert found(data) == {"train": {"~1.png": "a", "~nobody/2.png": "b"}}


def test_images_in_another_folder(write, tmp_path):
    file = write("t.csv", "path,label\n1.png,a\n2.png,b\n")
    (tmp_path / "photos").mkdir()
    data = load(file, image_folder=str(tmp_path / "photos"))
    assert data.splits["train"][0]["image"]["path"] == str(tmp_path / "photos/1.png")
    with pytest.raises(DataError, match=r"data.image_folder: the folder"):
        load(file, image_folder=str(tmp_path / "nowhere"))


BAD_TABLES = [
    ("t.csv", b"", "t.csv: the file is empty"),
    ("t.csv", b"path,label\n", "t.csv: the file holds a header and no rows"),
    ("t.csv", b"path,label\n1.png,a\n2.png,\xff\n", "t.csv: line 3 is no UTF-8 text"),
    ("t.csv", b"path,label\n1.png,a\n2.png,b,c\n", "t.csv: line 3: found 3 fields, and 2 in the header"),
    ("t.csv", b"path,label\n1.png,a,b\n2.png,b,c\n", "t.csv: line 2: found 3 fields, and 2 in the header"),
    ("t.csv", b"path,label,n\n1.png,a,1\n\n2.png,b\n", "t.csv: line 4: found 2 fields, and 3 in the header"),
    (
        "t.csv",
        b"path;label\n1.png;a;b\n",
        "t.csv: line 2: found 3 fields, and 2 in the header; a value that holds ';'",
    ),
    ("t.tsv", b"path\tlabel\n1.png\ta\tb\n", "t.tsv: line 2: found 3 fields, and 2 in the header"),
    ("t.csv", b'path,label\n1.png,a\n2.png,"b\n3.png,a\n', "t.csv: line 3: a quote is opened and not closed"),
    ("t.csv", b'path,label\n1.png,a\n2.png,"b', "t.csv: line 3: a quote is opened and not closed"),
    ("t.csv", b'path,label\n2.png,"b\n3.png,a\n4.png,"a"\n', "t.csv: line 2: a quote is opened and not closed"),
    ("t.csv", b"path,label,label\n1.png,a,b\n", "t.csv: two columns have the same name: label"),
    ("t.csv", "path,label\n1.png,a\n".encode("utf-16"), "t.csv: line 1 is no UTF-8 text"),
    ("t.csv", "path,label\n1.png,a\n".encode("utf-16-le"), "t.csv: line 1 holds a NUL character"),
    ("t.jsonl", b'{"path": "1.png", "label": "a", "label": "b"}\n', "the key 'label' stands there twice"),
    ("t.jsonl", b'{"path": "1.png", "label": "\\udce9"}\n', "half of a Unicode pair is no text"),
    ("t.jsonl", b'{"path": "1.png", "label": "a"}\n{"path": " ", "label": "b"}\n', "names no image in row 1"),
    ("t.jsonl", b'{"path": "1.png"}\n{"path"\n', "t.jsonl: line 2 is no JSON"),
    ("t.jsonl", b'["1.png", "a"]\n', "t.jsonl: line 1 holds list; allowed: an object per line"),
    ("t.jsonl", b'{"path": "1.png", "label": 1}\n{"path": "2.png", "label": "b"}\n', "values of different types"),
    ("t.csv", b"path,label\n1.png,a\n1.png,b\n", "1.png has two rows (train); allowed: one row for each image"),
    ("t.csv", b"path,label\n1.png,a\n,b\n", "the column 'path' names no image in row 1"),
    ("t.csv", b"path,label\n1.png,a\n2.png,\n", "no label in 1 of 2 rows, the first is row 1 (2.png)"),
    ("t.csv", b"name,remark\n1.png,a\n2.png,b\n", "label_column: none fits; name one of name, remark"),
    ("t.csv", b"a,b\n1.png,2.png\n3.png,4.png\n", "image_column: several fit (a, b); name one of a, b"),
    ("t.csv", b"x,label\n1,2\n3,4\n", "image_column: none fits; name one of x, label"),
    ("t.csv", b"path,label\n1.png,a\n2.p\0ng,b\n", "t.csv: line 3 holds a NUL character"),
    ("t.jsonl", b'{"path\\u0000": "1.png", "label": "a"}\n', "t.jsonl: the column 'path\\x00' has a NUL character"),
    ("t.tsv", b"\t".join(b"%d" % n for n in range(1501)) + b"\n" + b"\t" * 1500, "1,501 columns; allowed: 1,500"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_TABLES, ids=[row[2][:40] for row in BAD_TABLES])
def test_tables_that_cannot_be_used(name, content, message, write):
    with pytest.raises(DataError) as caught:
        load(write(name, content))
    assert message in str(caught.value)


def test_a_column_of_splits(write):
    rows = "1.png,a,train\n2.png,b,train\n3.png,a,val\n4.png,b,val\n5.png,a,test\n"
    data = load(write("t.csv", f"path,label,split\n{rows}"), SplitSpec())
    assert {split: list(files) for split, files in found(data).items()} == {
        "train": ["1.png", "2.png"],
        "validation": ["3.png", "4.png"],
        "test": ["5.png"],
    }
    assert data.columns == "image 'path', label 'label', split 'split'"


def test_a_column_called_split_that_holds_none(write):
    data = load(write("t.csv", "path,label,split\n1.png,a,left\n2.png,b,right\n"))
    assert found(data) == {"train": {"1.png": "a", "2.png": "b"}}


def test_a_column_of_splits_that_is_named(write):
    rows = "1.png,a,A\n2.png,b,A\n3.png,a,B\n"
    file = write("t.csv", f"path,label,part\n{rows}")
    data = load(file, SplitSpec(train="A", validation=None, test="B"), split_column="part")
    assert {split: list(files) for split, files in found(data).items()} == {
        "train": ["1.png", "2.png"],
        "test": ["3.png"],
    }
    with pytest.raises(DataError, match="split_column: found 'fold'; allowed: path"):
        load(file, split_column="fold")


SPLIT_VALUES = ("train", "train", "val", "val", "test", "test")


def with_splits(header, values):
    """A table of six images of classes a and b; a column tells the split of each."""
    return f"path,label,{header}\n" + "".join(f"{n}.png,{'ab'[n % 2]},{value}\n" for n, value in enumerate(values))


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("Split", SPLIT_VALUES),
        (" split ", SPLIT_VALUES),
        ("split", [f" {value.upper()} " for value in SPLIT_VALUES]),
        ("subset", SPLIT_VALUES),
        ("data set", SPLIT_VALUES),
    ],
)
def test_a_column_of_splits_in_another_spelling(header, values, write):
    data = load(write("t.csv", with_splits(header, values)), SplitSpec())
    expected = {"train": ["0.png", "1.png"], "validation": ["2.png", "3.png"], "test": ["4.png", "5.png"]}
    assert {split: list(files) for split, files in found(data).items()} == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["", *SPLIT_VALUES[1:]], "the column 'split' holds nothing in 1 of 6 rows, the first is row 0"),
        ([*SPLIT_VALUES[:5], "id_test"], "the column 'split' holds 'id_test' in row 5 as well as names"),
    ],
)
def test_a_column_of_splits_with_something_else_in_it(values, message, write):
    file = write("t.csv", with_splits("split", values))
    with pytest.raises(DataError) as caught:
        load(file)
    assert message in str(caught.value)


def test_splits_with_names_of_their_own_are_taken_when_named(write):
    file = write("t.csv", with_splits("split", [*SPLIT_VALUES[:4], "id_test", "id_test"]))
    data = load(file, SplitSpec(validation="val", test="id_test"), split_column="split")
    assert list(found(data)["test"]) == ["4.png", "5.png"]


def test_columns_that_are_found_by_their_values_are_said(write, log):
    text = with_splits("subset", SPLIT_VALUES).replace("label", "plumage")
    assert load(write("t.csv", text), SplitSpec()).labels == ("a", "b")
    assert [line.partition(": ")[2].partition(",")[0] for line in log()] == [
        "takes the labels from 'plumage'",
        "takes the splits from the column 'subset'",
    ]


@pytest.mark.parametrize("values", [["train set", "Test set"], ["train_1", "test_1"], [" TRAIN", "Testing"]])
def test_values_with_the_word_of_a_split(values, write):
    file = write("t.csv", with_splits("split", [values[0]] * 4 + [values[1]] * 2))
    assert load(file, SplitSpec(validation=None)).counts("test") == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("subset", ["train", "train", "", "train", "test", "test"]),
        ("subset", ["train", "train", "extra", "train", "test", "test"]),
        ("Usage", ["Training", "Training", "Training", "Training", "PublicTest", "PrivateTest"]),
        ("is_valid", ["False", "False", "False", "True", "True", "True"]),
        ("is_test", ["0", "0", "0", "1", "1", "1"]),
    ],
)
def test_a_column_that_may_tell_splits_and_is_not_used_is_said(column, values, write, log):
    assert len(load(write("t.csv", with_splits(column, values))).splits["train"]) == 6
    (line,) = log()
    assert f"the column '{column}' is not used" in line


@pytest.mark.parametrize("column", ["scene", "other_path", "vehicle"])
def test_a_column_with_the_word_of_a_split_that_tells_none(column, write, log):
    values = {
        "scene": ["train", "bus", "car", "train", "bus", "car"],
        "vehicle": ["train", "train", "train", "train", "test", ""],
        "other_path": [f"{'train' if n % 2 else 'test'}/mask{n}.png" for n in range(6)] * 3,
    }[column]
    labels = ["a", "b"] * (len(values) // 2)
    rows = "".join(f"{n}.png,{y},{value}\n" for n, (y, value) in enumerate(zip(labels, values, strict=True)))
    assert list(load(write("t.csv", f"path,label,{column}\n{rows}")).splits) == ["train"]
    assert len(log()) == (column == "vehicle")


def test_flags_of_a_split_are_no_class(write):
    rows = "".join(f"{n}.png,{n % 2},{n % 3 % 2},{(n + 1) % 2}\n" for n in range(6))
    assert load(write("t.csv", f"path,is_valid,ant,bee\n{rows}")).labels == ("ant", "bee")


def test_a_space_between_separator_and_quote(write):
    data = load(write("t.csv", 'path, label\n1.png, "ant, red"\n2.png, "bee"\n'))
    assert found(data) == {"train": {"1.png": "ant, red", "2.png": "bee"}}


def test_bars_between_fields(write):
    assert load(write("t.csv", "path|label\n1.png|a,x\n2.png|b\n")).labels == ("a,x", "b")


def test_ids_without_a_header(write):
    file = write("t.csv", "0,a\n1,b\n2,a\n3,b\n", *[f"{n}.png" for n in range(4)])
    with pytest.raises(DataError, match="line holds '0'"):
        load(file)


def test_measures_are_no_classes(write):
    rows = "".join(f"{n}.png,{n / 7:.3f}\n" for n in range(12))
    with pytest.raises(DataError, match="12 different numbers in 12"):
        load(write("t.csv", f"path,label\n{rows}"))


def test_paths_whose_folders_are_splits_and_classes(write):
    names = [f"./{split}/{label}/{n}.png" for split in ("train", "test") for n, label in enumerate(("ant", "bee"))]
    data = load(write("t.csv", "\n".join(["path", *names])), SplitSpec(validation=None))
    assert found(data)["test"] == {"test/ant/0.png": "ant", "test/bee/1.png": "bee"}
    with pytest.raises(DataError, match="label_column: none fits"):  # of splits for some rows alone
        load(write("t.csv", "\n".join(["path", *names, "5.png"])))


def test_two_columns_of_splits(write):
    lines = with_splits("part", SPLIT_VALUES).splitlines()
    text = "\n".join(f"{line},{part}" for line, part in zip(lines, ("subset", *SPLIT_VALUES), strict=True))
    with pytest.raises(DataError, match=r"split_column: several fit \(part, subset\)"):
        load(write("t.csv", text))


def test_a_table_of_one_split_that_names_another(write):
    write("train.csv", "path,label,split\n1.png,a,train\n2.png,b,test\n")
    file = write("test.csv", "path,label,split\n3.png,a,test\n")
    with pytest.raises(DataError, match="the table of the split 'train' holds rows of 'test'"):
        load(file.parent)
    with pytest.raises(DataError, match=r"already \(test, train\)"):
        load(file.parent, split_column="split")


def test_a_column_called_split_that_is_not_used_is_said(write, log):
    load(write("t.csv", "path,label,split\n1.png,a,left\n2.png,b,right\n"))
    assert ["'split' is not used" in line for line in log()] == [True]


def test_a_table_of_a_split_without_labels_is_left_out(write, log):
    write("train.csv", "path,label\n1.png,a\n2.png,b\n")
    file = write("test.csv", "path\n3.png\n4.png\n")
    assert set(load(file.parent).splits) == {"train"}
    assert log() == [f"{file.parent}: left out 'test', whose 2 rows have no labels"]


# metadata.csv, as imagefolder of datasets has it


def test_metadata_beside_images(write):
    file = write("metadata.csv", "file_name,label\n1.png,ant\n2.png,bee\n", "1.png", "2.png")
    assert found(load(file.parent)) == {"train": {"1.png": "ant", "2.png": "bee"}}


def test_metadata_in_split_folders(write):
    write("train/metadata.jsonl", '{"file_name": "1.png", "label": 0}\n{"file_name": "2.png", "label": 1}\n')
    file = write("test/metadata.csv", "file_name,label\n1.png,0\n2.png,1\n", "train/1.png", "test/1.png")
    assert found(load(file.parents[1], SplitSpec(validation=None))) == {
        "train": {"train/1.png": "0", "train/2.png": "1"},
        "test": {"test/1.png": "0", "test/2.png": "1"},
    }


def test_metadata_of_split_folders_in_one_table(write):
    rows = "train/1.png,a\ntrain/2.png,b\ntest/1.png,a\n"
    file = write("metadata.csv", f"file_name,label\n{rows}")
    assert found(load(file.parent, SplitSpec(validation=None))) == {
        "train": {"train/1.png": "a", "train/2.png": "b"},
        "test": {"test/1.png": "a"},
    }


def test_metadata_without_labels_leaves_those_of_the_folders(write):
    text = "file_name,patient\nant/1.png,x\nant/2.png,y\nbee/1.png,x\nbee/2.png,y\n"
    file = write("metadata.csv", text, "ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png")
    data = load(file.parent, SplitSpec(validation=None, test=0.5), group_column="patient")
    both = {split: {file[-5] for file in files} for split, files in found(data).items()}
    assert sorted(both["train"] | both["test"]) == ["1", "2"]
    assert data.labels == ("ant", "bee")
    assert data.columns == "image 'file_name', label 'class_folder', group 'patient'"


def test_a_split_folder_without_metadata(write):
    file = write("train/metadata.csv", "file_name,label\n1.png,a\n", "train/x/1.png", "test/x/1.png")
    with pytest.raises(DataError, match="found tables in train and none in test; add one"):
        load(file.parents[1])


# Saved data sets, and tables that hold images


def pictures(count):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
        found.append(stream.getvalue())
    return found


def test_what_save_to_disk_wrote(tmp_path):
    content = pictures(4)
    rows = Dataset.from_dict({"image": [{"bytes": item, "path": None} for item in content], "label": list("abab")})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0, 1])).save_to_disk(tmp_path / "both")
    assert load(tmp_path / "one").counts("train") == {"a": 2, "b": 2}
    data = load(tmp_path / "both", SplitSpec(validation=None))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 4, "test": 2}
    assert read_content(data.splits["test"][1]["image"]) == content[1]
    (tmp_path / "one/state.json").write_text("{}")
    with pytest.raises(DataError, match="can't be loaded as a saved data set"):
        load(tmp_path / "one")


def test_a_parquet_file_of_bytes(tmp_path):
    content = pictures(2)
    Dataset.from_dict({"image": content, "label": ["a", "b"]}).to_parquet(tmp_path / "t.parquet")
    data = load(tmp_path / "t.parquet")
    assert [read_content(row["image"]) for row in data.splits["train"]] == content


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_bytes_as_arrow_keeps_them(kind, tmp_path):
    content = pictures(2)
    labels = pa.array(["a", "b"], pa.string_view())
    pq.write_table(pa.table({"image": pa.array(content, kind), "label": labels}), tmp_path / "t.parquet")
    assert [read_content(row["image"]) for row in load(tmp_path / "t.parquet").splits["train"]] == content


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_texts_as_arrow_keeps_them(kind, tmp_path):
    columns = {"path": ["1.png", "2.png", "3.png"], "label": list("aba"), "split": ["train", "train", "test"]}
    arrays = {name: pa.array(values).cast(kind) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), tmp_path / "t.parquet")
    data = load(tmp_path / "t.parquet", SplitSpec(validation=None))
    assert found(data) == {"train": {"1.png": "a", "2.png": "b"}, "test": {"3.png": "a"}}


def test_a_parquet_file_of_paths(write, tmp_path):
    write("1.png", pictures(1)[0])
    Dataset.from_dict({"path": ["1.png", "2.png"], "label": ["a", "b"]}).to_parquet(tmp_path / "source/t.parquet")
    data = load(tmp_path / "source/t.parquet")
    assert found(data) == {"train": {"1.png": "a", "2.png": "b"}}
    assert np.asarray(decode_row(data.splits["train"][0])).shape[:2] == (8, 8)


def test_a_folder_of_tables(write):
    write("train.csv", "path,label\n1.png,a\n2.png,b\n")
    file = write("test.csv", "path,label\n3.png,a\n")
    assert found(load(file.parent, SplitSpec(validation=None))) == {
        "train": {"1.png": "a", "2.png": "b"},
        "test": {"3.png": "a"},
    }
    write("train-more.csv", "path,label\n1.png,a\n2.png,b\n")
    with pytest.raises(DataError, match=r"train-more.csv, train.csv are"):
        load(file.parent)


def test_label_array_new_images_from_a_table(write):
    rows = load_rows(DataSpec(source=str(write("t.csv", "path,label\n1.png,bee\n2.png,ant\n"))), ("bee", "ant", "cat"))
    assert rows["label"][:] == [0, 1]


def test_keys_that_a_source_has_no_use_for(write, touch):
    with pytest.raises(DataError, match=r"data.image_column: .* is a folder of images, which has none"):
        load(touch("a/1.png", "b/1.png"), image_column="x")
    with pytest.raises(DataError, match=r"data.config: .* is a file, which has none"):
        load(write("t.csv", "path,label\n1.png,a\n"), config="x")


# Tar shards


def test_json_of_a_shard(tmp_path):
    content = pictures(3)
    members = [(f"x/{n}.{end}", data) for n in range(3) for end, data in (("png", content[n]), ("json", None))]
    members = [(name, data or json.dumps({"label": "ab"[int(name[2]) % 2]}).encode()) for name, data in members]
    write_tar(tmp_path / "train-000.tar", members)
    data = load(tmp_path)
    assert found(data) == {
        "train": {"train-000.tar/x/0.png": "a", "train-000.tar/x/1.png": "b", "train-000.tar/x/2.png": "a"}
    }
    assert [read_content(row["image"]) for row in data.splits["train"]] == content


def test_shards_of_several_splits(tmp_path):
    content = pictures(4)
    for split in ("train-0", "train-1", "test-0"):
        members = [(f"{n}.{end}", (content[n], b"%d" % n)[end == "cls"]) for n in range(4) for end in ("PNG", "cls")]
        write_tar(tmp_path / f"{split}.tar", members)
    data = load(tmp_path, SplitSpec(validation=None))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 8, "test": 4}
    assert data.labels == ("0", "1", "2", "3")
    assert read_content(data.splits["train"][5]["image"]) == content[1]
    assert len(load(tmp_path / "test-0.tar").splits["train"]) == 4
    assert [load(tmp_path).shards, load(tmp_path / "test-0.tar").shards] == [3, 1]


def test_shards_that_cannot_be_used(tmp_path):
    content = pictures(2)
    write_tar(tmp_path / "t.tar", [("1.png", content[0]), ("1.jpg", content[1]), ("1.cls", b"0")])
    with pytest.raises(DataError, match=r"t.tar: the sample 1 has several images, t.tar/1.png and 1.jpg"):
        load(tmp_path / "t.tar")
    write_tar(tmp_path / "t.tar", [("1.cls", b"0"), ("2.png", content[0]), ("2.cls", b"1")])
    with pytest.raises(DataError, match=r"t.tar: a sample has no image, only cls"):
        load(tmp_path / "t.tar")
    write_tar(tmp_path / "t.tar", [("1.png", content[0]), ("1.json", b"{")])
    with pytest.raises(DataError, match=r"t.tar: 1.json is no JSON"):
        load(tmp_path / "t.tar")
    (tmp_path / "t.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match=r"t.tar: no tar"):
        load(tmp_path / "t.tar")


def test_a_shard_that_was_cut_short_after_it_was_read(tmp_path):
    write_tar(
        tmp_path / "t.tar", [("1.png", pictures(1)[0]), ("1.cls", b"0"), ("2.png", bytes(3000)), ("2.cls", b"1")]
    )
    row = load(tmp_path / "t.tar").splits["train"][1]
    content = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(content[:3000])
    with pytest.raises(DataError, match="ends in the middle of the image"):
        read_content(row["image"])


@pytest.mark.parametrize("prefix", ["", "./", "data/", "./all/images/"])
def test_class_folders_in_a_shard(prefix, tmp_path):
    content = pictures(2)
    for shard in range(2):
        members = [(f"{prefix}{label}/{shard}.png", data) for label, data in zip(("cat", "dog"), content, strict=True)]
        write_tar(tmp_path / f"s{shard}.tar", members)
    data = load(tmp_path)
    assert data.counts("train") == {"cat": 2, "dog": 2}


def test_split_folders_in_a_shard(tmp_path):
    content = pictures(2)
    names = [f"x/{split}/{label}/1" for split in ("train", "test_set") for label in ("cat", "dog")]
    write_tar(tmp_path / "all.tar", [(f"{name}.png", content[0]) for name in names])
    data = load(tmp_path / "all.tar", SplitSpec(validation=None))
    assert {split: data.counts(split) for split in data.splits} == {
        "train": {"cat": 1, "dog": 1},
        "test": {"cat": 1, "dog": 1},
    }


def test_shards_without_labels(tmp_path):
    for name in ("cat", "dog"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}1.png", pictures(1)[0])])
    with pytest.raises(DataError, match=r"images without labels.* data\.label_column=class_folder"):
        load(tmp_path)
    assert load(tmp_path, label_column="class_folder").labels == ("cat", "dog")


def test_texts_of_a_shard_are_labels_where_they_repeat(tmp_path):
    members = [
        (f"x/{n}.{end}", (pictures(1)[0], b"ab"[n % 2 :][:1])[end == "txt"])
        for n in range(4)
        for end in ("png", "txt")
    ]
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(DataError, match=r"several fit \(class_folder, txt\)"):
        load(tmp_path)
    assert load(tmp_path, label_column="txt").counts("train") == {"a": 2, "b": 2}

import json
import os

import pytest
from datasets import Dataset

from hfft.data.sources.reading import load_data
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec

OWN = SplitSpec(validation=None)  # test where the source has one


@pytest.fixture
def write(touch):
    """Writes tables, as lists of lines, beside empty images."""

    def make(images, tables):
        folder = touch(*images)
        for name, lines in tables.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("\n".join(lines) + "\n")
        return folder

    return make


def found(folder, splits=OWN, **fields):
    """Split -> file -> class name."""
    data = load_data(DataSpec(source=str(folder), splits=splits, **fields), 0)
    return {split: {row["file"]: data.labels[row["label"]] for row in rows} for split, rows in data.splits.items()}


def rows(names, *columns):
    """Lines of a table: a name, and a value of each column in turn."""
    return [",".join([name, *(values[n % len(values)] for values in columns)]) for n, name in enumerate(names)]


TRAIN = [f"train/{n}.jpg" for n in range(6)]
TEST = [f"test/{n}.jpg" for n in range(10, 14)]
IDS = [str(n) for n in range(6)]
AB = ("a", "b")
LABELLED = {"train": {file: AB[n % 2] for n, file in enumerate(TRAIN)}}
NONE = SplitSpec(validation=None, test=None)

BESIDE = {
    "names": {"train.csv": ["id,label", *rows([f"{n}.jpg" for n in IDS], AB)]},
    "ids": {"train.csv": ["id,breed", *rows(IDS, AB)]},
    "ids, and a table for all": {"labels.csv": ["id,Species", *rows(IDS, AB)]},
    "paths of another machine": {"train.csv": ["path,dx", *rows([f"/kaggle/input/x/{file}" for file in TRAIN], AB)]},
    "inside": {"train/labels.csv": ["Image Name,class_name", *rows(IDS, AB)]},
    "a name that nobody knows": {"train.csv": ["id,plumage", *rows(IDS, AB)]},
    "numbers and names of the classes": {"train.csv": ["id,class_id,class_name", *rows(IDS, ("0", "1"), AB)]},
    "what is no label": {"train.csv": ["id,patient_id,width,y", *rows(IDS, ("p", "q"), ("8", "9", "10"), AB)]},
    "a table without labels": {
        "train.csv": ["id,breed", *rows(IDS, AB)],
        "test.csv": ["id", *(str(n) for n in range(10, 14))],
    },
    "a submission": {
        "train.csv": ["id,breed", *rows(IDS, AB)],
        "sample_submission.csv": ["id,breed", *rows(["10", "11"], ("a",))],
    },
    "JSON lines": {
        "train.jsonl": [json.dumps({"id": n, "label": AB[n % 2], "test": None}) for n in range(6)],
    },
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_table_of_loose_images_in_split_folders(name, write, log):
    folder = write([*TRAIN, *TEST], BESIDE[name])
    assert found(folder, NONE) == LABELLED
    left_out = [line for line in log() if "left out 4 images without a label" in line]
    assert len(left_out) == 1
    assert "test/10.jpg" in left_out[0]


def test_a_table_for_each_split(write):
    first, second = ([f"{n}.jpg" for n in names] for names in (range(6), range(4)))
    folder = write(
        [*(f"train/{n}" for n in first), *(f"test/{n}" for n in second)],  # the same names in both
        {"train.csv": ["file,label", *rows(first, AB)], "test.csv": ["file,label", *rows(second, AB)]},
    )
    expected = {"train": LABELLED["train"], "test": {f"test/{n}.jpg": AB[n % 2] for n in range(4)}}
    assert found(folder) == expected


def test_one_hot_tables_inside_of_split_folders(write):
    tables = {
        f"{split}/_classes.csv": ["filename, ant, bee", *rows([f"{n}.jpg" for n in names], (" 1, 0", " 0, 1"))]
        for split, names in (("train", range(6)), ("valid", range(4)))
    }
    folder = write([*TRAIN, *(f"valid/{n}.jpg" for n in range(4))], tables)
    expected = {file: ("ant", "bee")[n % 2] for n, file in enumerate(TRAIN)}
    data = found(folder, SplitSpec(test=None))
    assert data["train"] == expected
    assert set(data["validation"].values()) == {"ant", "bee"}


@pytest.mark.parametrize("name", ["{}.jpg", "part{}/{}.jpg", "images/{}.jpg"])
def test_a_table_of_images_elsewhere(name, write):
    files = [name.format(*([n % 2] if name.count("{}") > 1 else []), n) for n in range(6)]
    expected = {"train": {file: AB[n % 2] for n, file in enumerate(files)}}
    folder = write(files, {"meta.csv": ["image_id,dx", *rows(IDS, AB)]})
    assert found(folder, NONE) == expected
    assert found(folder / "meta.csv", NONE) == expected


def test_rows_of_both_split_folders(write):
    files = [*(f"training_set/{n}.jpg" for n in range(4)), *(f"test_set/{n}.jpg" for n in range(4))]
    folder = write(files, {"labels.csv": ["path,label", *rows(files, AB)]})
    assert {split: list(part) for split, part in found(folder).items()} == {"train": files[:4], "test": files[4:]}


def test_metadata_in_parquet(write):
    folder = write(TRAIN, {})
    table = {"file_name": [f"{n}.jpg" for n in range(6)], "label": [AB[n % 2] for n in range(6)]}
    Dataset.from_dict(table).to_parquet(folder / "train/metadata.parquet")
    assert found(folder, NONE) == LABELLED


def test_names_in_the_other_unicode_form(write):
    folder = write(
        [f"images/e\u0301{n}.jpg" for n in range(4)],
        {"t.csv": ["id,label", *rows([f"\xe9{n}" for n in range(4)], AB)]},
    )
    assert list(found(folder, NONE)["train"].values()) == ["a", "b", "a", "b"]


def test_images_below_a_folder_whose_name_is_no_utf_8(write):
    folder = write([], {"t.csv": ["id,label", *rows(IDS, AB)]})
    parent = os.fsencode(folder) + b"/images_caf\xe9"
    os.mkdir(parent)
    for name in IDS:
        with open(parent + f"/{name}.jpg".encode(), "wb"):
            pass
    files = {f"images_caf\\xe9/{name}.jpg": AB[n % 2] for n, name in enumerate(IDS)}
    assert found(folder / "t.csv", NONE) == {"train": files}


def test_an_export_of_label_studio(write):
    files = [f"images/{n}.jpg" for n in range(6)]
    names = [f"/data/upload/3/0123abcd-{n}.jpg" for n in range(6)]
    folder = write(files, {"project.csv": ["image,id,choice", *rows(names, IDS, AB)]})
    assert found(folder, NONE) == {"train": {file: AB[n % 2] for n, file in enumerate(files)}}


REFUSED = {
    "no table": ([*TRAIN, *TEST], {}, "data.label_column=class_folder"),
    "a table of something else": (TRAIN, {"a.csv": ["x,y", "1.5,2.5", "2.5,2.5"]}, "a.csv (x, y)"),
    "several columns": (
        TRAIN,
        {"a.csv": ["id,plumage,mood", *rows(IDS, AB, AB[::-1])]},
        "several fit (plumage, mood); name one of",
    ),
    "two tables": (
        TRAIN,
        {name: ["id,label", *rows(IDS, AB)] for name in ("a.csv", "b.csv")},
        "a.csv and b.csv have labels; name one: data.source=",
    ),
    "two images of a name": (
        ["train/0.jpg", "test/0.jpg", "train/1.jpg", "test/1.jpg"],
        {"a.csv": ["id,label", *rows(IDS[:2], AB)]},
        "0 may be test/0.jpg or train/0.jpg; name the folder of its images",
    ),
    "other classes than the folders'": (
        [f"{n % 3}/{n}.jpg" for n in range(6)],
        {"labels.csv": ["id,label", *rows(IDS, AB)]},
        "labels.csv and the folders name different classes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, write):
    images, tables, message = REFUSED[name]
    with pytest.raises(DataError) as caught:
        found(write(images, tables), NONE)
    assert message in str(caught.value)


def test_class_folders_with_a_table_that_says_the_same(write):
    files = [f"{('ant', 'bee')[n % 2]}/{n}.jpg" for n in range(6)]
    tables = {"labels.csv": ["path,label", *rows(files, AB)], "notes.csv": ["a,b", "1,2"]}
    expected = {file: file.split("/")[0] for file in files}
    assert found(write(files, tables), NONE) == {"train": expected}


def test_a_column_beside_images_that_is_not_used_is_said_once(write, log):
    folder = write(TRAIN, {"train.csv": ["id,label,is_valid", *rows(IDS, AB, "001")]})
    assert len(found(folder, NONE)["train"]) == 6
    assert ["'is_valid' is not used" in line for line in log()] == [True]


def test_the_column_that_names_the_images_and_not_the_one_called_so(write):
    folder = write(TRAIN, {"train.csv": ["id,image,label", *rows(IDS, [f"photo {n}" for n in IDS], AB)]})
    assert found(folder, NONE) == LABELLED


def test_a_link_that_leads_nowhere_is_no_table(write):
    files = [f"{('ant', 'bee')[n % 2]}/{n}.jpg" for n in range(6)]
    folder = write(files, {})
    (folder / "labels.csv").symlink_to("nowhere.csv")
    assert set(found(folder, NONE)["train"]) == set(files)


def test_a_table_with_coarser_classes_than_the_folders(write):
    files = [f"{('ant', 'bee', 'cat')[n % 3]}/{n}.jpg" for n in range(6)]
    folder = write(files, {"labels.csv": ["path,category", *rows(files, ("insect", "insect", "mammal"))]})
    with pytest.raises(DataError, match=r"data.label_column=category or data.label_column=class_folder"):
        found(folder, NONE)


CONTRARY = [f"{n % 2:05d}/{n}.jpg" for n in range(8)]


@pytest.mark.parametrize("count", [1, 2])
def test_other_labels_than_the_folders_are_taken_when_asked_for(count, write):
    lines = rows([str(n) for n in range(8)], ("a", "a", "b", "b"))
    tables = {f"{n}.csv": ["id,breed", *lines[n * 4 if count == 2 else 0 :][: 8 // count]] for n in range(count)}
    folder = write(CONTRARY, tables)
    with pytest.raises(DataError, match=r"data.label_column=breed or data.label_column=class_folder"):
        found(folder, NONE)
    assert set(found(folder, NONE, label_column="breed")["train"].values()) == {"a", "b"}
    assert set(found(folder, NONE, label_column="class_folder")["train"].values()) == {"00000", "00001"}


def test_a_column_of_splits_beside_class_folders(write):
    files = [f"{('ant', 'bee')[n % 2]}/{n}.jpg" for n in range(8)]
    lines = rows(files, ("ant", "bee"), ("train", "train", "train", "train", "test", "test"))
    folder = write(files, {"list.csv": ["path,label,split", *lines]})
    assert sorted(found(folder)["test"]) == [files[4], files[5]]
    (folder / "list.csv").write_text("\n".join(["path,label,split", *lines[:7], f"{files[7]},bee,"]))
    with pytest.raises(DataError, match="split_column: the column 'split' holds nothing in 1 of 8 rows"):
        found(folder)


def test_a_table_with_label_array_a_flat_test_folder_alone(write):
    train = [f"train/{('ant', 'bee')[n % 2]}/{n}.jpg" for n in range(6)]
    tables = {"test.csv": ["id,label,note", *rows(["10", "11", "12", "13"], ("ant", "bee"), ("x",))]}
    data = found(write([*train, *TEST], tables))
    assert data["test"] == {file: ("ant", "bee")[n % 2] for n, file in enumerate(TEST)}
    assert data["train"] == {file: file.split("/")[1] for file in train}


def test_a_table_for_the_test_folder_that_has_no_class_folders(write):
    train = [f"Train/{n % 2}/{n}.png" for n in range(6)]
    test = [f"Test/{n}.png" for n in range(10, 14)]
    tables = {
        "Train.csv": ["ClassId,Path", *(f"{n % 2},{file}" for n, file in enumerate(train))],
        "Test.csv": ["ClassId,Path", *(f"{n % 2},{file}" for n, file in enumerate(test))],
    }
    assert set(found(write([*train, *test], tables))["test"]) == set(test)


@pytest.mark.parametrize("column", ["class_folder", "weather"])
def test_folders_and_a_column_could_be_meant(column, write):
    files = [f"{('ant', 'bee')[n % 2]}/{n}.jpg" for n in range(6)]
    folder = write(files, {"t.csv": ["path,weather", *rows(files, ("sun", "rain", "sun"))]})
    with pytest.raises(DataError, match=r"several fit \(class_folder, weather\)"):
        found(folder / "t.csv", NONE)
    expected = {"ant", "bee"} if column == "class_folder" else {"sun", "rain"}
    assert set(found(folder / "t.csv", NONE, label_column=column)["train"].values()) == expected


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["1.png,a", "2.png,b"], "the first line holds '1.png'"),
        (["url,label", "https://example.org/1.png,a", "https://example.org/2.png,b"], "holds URLs"),
        (["image,label", f"{'iVBORw0K' * 90},a", f"{'iVBORw0K' * 99},b"], "base64"),
        (["image,label", "x1,a", "x2,b"], "looked for "),
    ],
)
def test_tables_whose_images_are_elsewhere(lines, told, write):
    with pytest.raises(DataError, match=told):
        found(write([], {"t.csv": lines}) / "t.csv", NONE)


def test_a_table_beside_an_archive(write):
    folder = write(["images.zip"], {"train.csv": ["id,label", "1.jpg,a", "2.jpg,b"]})
    with pytest.raises(DataError, match=r"looked for .*1.jpg first.*unpack it"):
        found(folder, NONE)

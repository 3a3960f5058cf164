import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from hfft.data.sources.reading import load_data
from hfft.data.sources.targets import targets_of
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec


def load(columns, splits=None, **fields):
    images = [{"bytes": b"", "path": None}] * len(next(iter(columns.values())))
    source = DatasetDict(train=Dataset.from_dict({"image": images, **columns}))
    spec = DataSpec(source="unused", splits=splits or SplitSpec(validation=None, test=None), **fields)
    return load_data(spec, 0, source)


SHARES = {"ant": [1.0, 0.25, 0.0], "bee": [0.0, 0.75, 1.0]}


def test_classes_alone_need_no_targets():
    assert targets_of(load({"label": ["a", "b"]}).splits["train"], 2) is None


def test_a_column_for_each_class():
    data = load(SHARES, label_column=("ant", "bee"))
    assert data.labels == ("ant", "bee")
    assert data.splits["train"]["label"][:] == [0, 1, 1]
    np.testing.assert_array_equal(targets_of(data.splits["train"], 2), [[1, 0], [0.25, 0.75], [0, 1]])


def test_a_column_of_lists():
    data = load({"label": [[1.0, 0.0], [0.25, 0.75]]})
    assert data.labels == ("0", "1")
    np.testing.assert_array_equal(targets_of(data.splits["train"], 2), [[1, 0], [0.25, 0.75]])


def test_weights():
    data = load({"label": ["a", "b", "a"], "w": [0.5, 2, 1]}, weight_column="w")
    np.testing.assert_array_equal(targets_of(data.splits["train"], 2), [[0.5, 0], [0, 2], [1, 0]])
    assert data.columns == "image 'image', label 'label', weight 'w'"


def test_shares_and_weights():
    data = load({**SHARES, "w": [1.0, 2.0, 4.0]}, label_column=("ant", "bee"), weight_column="w")
    np.testing.assert_array_equal(targets_of(data.splits["train"], 2), [[1, 0], [0.5, 1.5], [0, 4]])


def test_shares_stay_beside_their_images_when_splits_are_carved():
    columns = {"ant": [k / 40 for k in range(41)], "bee": [1 - k / 40 for k in range(41)]}
    data = load(columns, SplitSpec(validation=0.3, test=None), label_column=("ant", "bee"))
    for rows in data.splits.values():
        expected = [int(file.removeprefix("train/")) / 40 for file in rows["file"]]
        np.testing.assert_allclose(targets_of(rows, 2)[:, 0], expected, rtol=1e-6)


BAD = [
    (
        {"ant": [1.0, 0.5], "bee": [0.0, 0.6]},
        {"label_column": ("ant", "bee")},
        r"row 1 \(train/1\) holds \[0.5, 0.6",
    ),
    ({"ant": [1.0, -0.5], "bee": [0.0, 1.5]}, {"label_column": ("ant", "bee")}, "allowed: a share of 0 or more"),
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


@pytest.mark.parametrize(("columns", "fields", "message"), BAD, ids=[row[2][:40] for row in BAD])
def test_columns_that_hold_something_else(columns, fields, message):
    with pytest.raises(DataError, match=message):
        load(columns, **fields)

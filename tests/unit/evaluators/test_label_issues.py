import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hfft.evaluators import label_issues
from hfft.evaluators.label_issues import FOLDS, LabelIssue, described, find_label_issues, out_of_fold


def as_rows(*first, labels):
    """Probabilities of the first of two classes to rows, and labels."""
    probabilities = np.array(first)
    return np.stack([probabilities, 1 - probabilities], axis=1), np.array(labels)


def test_label_issues_are_off_the_diagonal_of_the_confident_joint():
    # means of the own class: 0.7 for class 0, and 0.75 for class 1
    probabilities, labels = as_rows(
        *(1.0, 0.9, 0.8, 0.7, 0.1),  # the last one reaches 0.75 for class 1
        *(0.0, 0.0, 0.25, 0.25, 0.75),  # the last one reaches 0.7 for class 0
        labels=[0] * 5 + [1] * 5,
    )
    assert find_label_issues(probabilities, labels) == [
        LabelIssue(
            row=4, label=0, believed=1, label_probability=pytest.approx(0.1), believed_probability=pytest.approx(0.9)
        ),
        LabelIssue(row=9, label=1, believed=0, label_probability=pytest.approx(0.25), believed_probability=0.75),
    ]


def test_a_class_that_is_not_confident_is_no_issue():
    probabilities, labels = as_rows(0.9, 0.9, 0.9, 0.9, 0.45, 0, 0, 0, 0, 0, labels=[0] * 5 + [1] * 5)
    assert find_label_issues(probabilities, labels) == []  # 0.55 for class 1, whose own images have 1


def test_a_label_that_is_more_probable_than_the_confident_class_stays():
    # class 2 is confident at 0.3 already, but class 0, which is not confident of the image, is more probable
    probabilities = np.array([[0.9, 0.1, 0.0]] * 8 + [[0.6, 0.0, 0.4]] + [[0.5, 0.2, 0.3]] * 6)
    labels = np.array([0] * 9 + [2] * 6)
    assert 8 not in [issue.row for issue in find_label_issues(probabilities, labels)]


def test_a_rare_class_is_not_judged_and_not_believed_in():
    probabilities, labels = as_rows(*[0.9] * 20, 0.9, 0.9, 0.9, 0.1, labels=[0] * 20 + [1] * (FOLDS - 1))
    assert find_label_issues(probabilities, labels) == []
    probabilities, labels = as_rows(*[0.9] * 20, 0.9, 0.9, 0.9, 0.1, 0.1, labels=[0] * 20 + [1] * FOLDS)
    assert [issue.row for issue in find_label_issues(probabilities, labels)] == [20, 21, 22]


def test_no_image_is_judged_by_its_own_label():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(60, 200)).astype(np.float32))  # any labels can be learned by heart
    labels = np.arange(60) % 2
    found = out_of_fold(features, labels, classes=2, seed=0)
    accuracy = (found.argmax(axis=1) == labels).mean()
    assert 0.25 < accuracy < 0.75
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_every_class_is_in_every_fold():
    labels = np.array([0] * 50 + [1] * 5 + [2] * 10)
    folds = label_issues._folds(labels, np.random.default_rng(3))
    for label, count in ((0, 10), (1, 1), (2, 2)):
        assert np.bincount(folds[labels == label]).tolist() == [count] * FOLDS


def test_a_sample_chooses_the_strength_and_all_images_get_probabilities(monkeypatch):
    monkeypatch.setattr(label_issues, "_SAMPLE", 40)
    labels = np.arange(100) % 2
    features = torch.from_numpy(np.stack([labels * 2.0 - 1, np.ones(100)], axis=1).astype(np.float32))
    found = out_of_fold(features, labels, classes=2, seed=0)
    assert (found.argmax(axis=1) == labels).all()


def test_flipped_labels_of_digits_are_found():
    data = load_digits()
    rng = np.random.default_rng(0)
    truth = data.target.astype(np.int64)
    changed = rng.permutation(len(truth))[:90]
    labels = truth.copy()
    labels[changed] = (truth[changed] + rng.integers(1, 10, 90)) % 10
    features = torch.from_numpy(data.data).float()
    issues = find_label_issues(out_of_fold(features, labels, classes=10, seed=0), labels)
    rows = {issue.row for issue in issues}
    assert len(rows & set(changed)) > 0.8 * len(rows)
    assert len(rows & set(changed)) > 0.6 * 90
    right = [issue.believed == truth[issue.row] for issue in issues if issue.row in set(changed)]
    assert np.mean(right) > 0.9


def test_names_in_the_place_of_numbers():
    (row,) = described([LabelIssue(1, 0, 1, 0.25, 0.75)], ["a.png", "b.png"], ["ant", "bee"])
    assert row == {
        "rank": 1,
        "row": 1,
        "file": "b.png",
        "label": "ant",
        "label_probability": 0.25,
        "believed": "bee",
        "believed_probability": 0.75,
    }

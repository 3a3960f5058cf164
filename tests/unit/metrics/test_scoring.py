import sys

import numpy as np
import pytest
import tiny
import torch
import toy
from sklearn.metrics import precision_recall_fscore_support

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import evaluation_transform
from hfft.metrics import scoring
from hfft.metrics.scoring import Logits, compute, predict, score
from hfft.replay.engine import scoring_engine


@pytest.fixture(scope="module")
def scores():
    model = tiny.build("convnext")
    splits = {"test": toy.rows(23)}
    return score(model, splits, evaluation_transform(tiny.processor()), classes=toy.CLASSES, batch_size=4)["test"]


def test_every_image_once_and_in_order(scores):
    assert scores.files == tuple(f"{k:03d}" for k in range(23))
    assert scores.labels.tolist() == [k % 2 for k in range(23)]
    model, transform = tiny.build("convnext"), evaluation_transform(tiny.processor())
    examples = Examples(toy.rows(23), transform)
    with torch.inference_mode():
        alone = torch.cat([model(examples[k]["pixel_values"][None]).logits for k in range(23)]).softmax(dim=1)
    np.testing.assert_allclose(scores.probabilities, alone.numpy(), atol=1e-6)


def test_splits_are_told_apart(scores):
    model, transform = tiny.build("convnext"), evaluation_transform(tiny.processor())
    splits = {"validation": toy.rows(23).select(range(5)), "test": toy.rows(23).select(range(5, 23))}
    found = score(model, splits, transform, classes=toy.CLASSES, batch_size=4)
    assert [(name, len(part.files)) for name, part in found.items()] == [("validation", 5), ("test", 18)]
    together = np.concatenate([part.probabilities for part in found.values()])
    np.testing.assert_allclose(together, scores.probabilities, atol=1e-6)
    assert sum((part.files for part in found.values()), ()) == scores.files
    assert score(model, {}, transform, classes=toy.CLASSES) == {}


def test_another_engine_predicts_the_same_and_the_last_batch_may_be_small(monkeypatch):
    model, examples = tiny.build("efficientnet"), Examples(toy.rows(23), evaluation_transform(tiny.processor()))
    expected = predict(model, examples, torch.Tensor.float, batch_size=4)
    monkeypatch.setattr(scoring, "_MANY", 1)
    options = {"batch_size": 4, "choose_run": scoring_engine("onnxruntime")}
    (found,) = compute(Logits(model), examples, torch.Tensor.float, **options)
    assert not np.array_equal(found, expected)  # other orders of sums
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_engine_that_cannot_predict_leaves_it_to_torch(monkeypatch):
    model, examples = tiny.build("vit"), Examples(toy.rows(8), evaluation_transform(tiny.processor()))
    expected = predict(model, examples, torch.Tensor.float, batch_size=4)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(scoring, "_MANY", 1)
    options = {"batch_size": 4, "choose_run": scoring_engine("onnxruntime")}
    assert np.array_equal(compute(Logits(model), examples, torch.Tensor.float, **options)[0], expected)


def test_batch_size_changes_nothing():
    model, examples = tiny.build("vit"), Examples(toy.rows(10), evaluation_transform(tiny.processor()))
    one, many = (predict(model, examples, torch.Tensor.float, batch_size=size) for size in (1, 7))
    np.testing.assert_allclose(one, many, atol=1e-6)


def test_the_model_is_scored_in_evaluation_mode():
    model, examples = tiny.build("vit"), Examples(toy.rows(6), evaluation_transform(tiny.processor()))
    expected = predict(model, examples, torch.Tensor.float, batch_size=6)
    assert np.array_equal(predict(model.train(), examples, torch.Tensor.float, batch_size=6), expected)


def test_the_table_holds_what_was_predicted(scores):
    table = scores.table("test")
    assert list(table.columns) == [
        *("split", "file", "label", "prediction", "probability"),
        *("probability red", "probability blue"),
    ]
    assert set(table["split"]) == {"test"}
    assert (table["label"] == [toy.CLASSES[k % 2] for k in range(23)]).all()
    best = np.where(table["probability red"] >= table["probability blue"], "red", "blue")
    assert (table["prediction"] == best).all()
    assert (table["probability"] == table[["probability red", "probability blue"]].max(axis=1)).all()


def test_by_class_agrees_with_scikit_learn(scores):
    predicted = scores.probabilities.argmax(axis=1)
    expected = precision_recall_fscore_support(scores.labels, predicted, labels=[0, 1], zero_division=0)
    for number, name in enumerate(toy.CLASSES):
        row = scores.by_class[name]
        got = [row["precision"], row["recall"], row["f1"], row["images"]]
        assert got == pytest.approx([column[number] for column in expected])

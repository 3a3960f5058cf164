import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import toy
from datasets import Dataset
from pictures import make_photos
from sklearn.metrics import precision_recall_fscore_support

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.rows import row_features
from hfft.errors import TrainingError
from hfft.metrics import scoring
from hfft.metrics.scoring import Logits, check_logits, check_validation, compute, score
from hfft.replay.engine import scoring_engine


def predict(model, examples, **options):
    (logits,) = compute(Logits(model), examples, torch.Tensor.float, **options)
    return logits


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
    expected = predict(model, examples, batch_size=4)
    monkeypatch.setattr(scoring, "_MANY", 1)
    options = {"batch_size": 4, "choose_run": scoring_engine("onnxruntime")}
    found = predict(model, examples, **options)
    assert not np.array_equal(found, expected)  # other orders of sums
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_engine_that_cannot_predict_leaves_it_to_torch(monkeypatch):
    model, examples = tiny.build("vit"), Examples(toy.rows(8), evaluation_transform(tiny.processor()))
    expected = predict(model, examples, batch_size=4)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(scoring, "_MANY", 1)
    options = {"batch_size": 4, "choose_run": scoring_engine("onnxruntime")}
    assert np.array_equal(predict(model, examples, **options), expected)


def test_batch_size_changes_nothing():
    model, examples = tiny.build("vit"), Examples(toy.rows(10), evaluation_transform(tiny.processor()))
    one, many = (predict(model, examples, batch_size=size) for size in (1, 7))
    np.testing.assert_allclose(one, many, atol=1e-6)


def test_the_model_is_scored_in_evaluation_mode():
    model, examples = tiny.build("vit"), Examples(toy.rows(6), evaluation_transform(tiny.processor()))
    expected = predict(model, examples, batch_size=6)
    assert np.array_equal(predict(model.train(), examples, batch_size=6), expected)


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = make_photos(tmp_path_factory.mktemp("photos"), {"ant": 3, "bee": 3})
    content = [
        {"image": {"bytes": None, "path": str(path)}, "label": place % 2, "file": path.name}
        for place, path in enumerate(sorted(folder.rglob("*.png")))
    ]
    return Dataset.from_list(content, features=row_features(("ant", "bee")))


def side(family="vit", noise=0.0, processor=None):
    model = tiny.build(family)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(noise * torch.randn_like(value))
    return model, evaluation_transform(processor or tiny.processor())


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_same_network_passes_and_keeps_its_modes(family, photos):
    trained = side(family)
    trained[0].train()
    assert check_logits(trained, side(family), photos, "model") == 0
    assert all(module.training for module in trained[0].modules())


def test_other_weights_pixels_or_outputs_do_not(photos):
    others = (
        side(noise=0.05),
        side(processor=tiny.ViTImageProcessor(size={"height": tiny.SIDE, "width": tiny.SIDE}, image_mean=[0.1] * 3)),
        (tiny.build("vit", 3), side()[1]),
    )
    for other in others:
        with pytest.raises(TrainingError, match="isn't the one that was trained"):
            check_logits(side(), other, photos, "model")


def scored(images=18, **values):
    metrics = {name: {"value": value} for name, value in values.items()}
    return SimpleNamespace(metrics=metrics, labels=[0] * images)


def check(measured, found, precision="float32"):
    check_validation(measured, found, types={precision, "auto"}, phase="lora", where="model")


@pytest.mark.parametrize(
    ("measured", "found", "precision"),
    [
        ({"accuracy": 1.0, "log_loss": 0.642}, {"accuracy": 0.667, "log_loss": 0.644}, "float32"),
        ({"accuracy": 1.0, "log_loss": 0.642}, {"accuracy": 1.0, "log_loss": 0.686}, "float32"),
        ({"accuracy": 1.0, "log_loss": 0.01}, {"accuracy": 0.0, "log_loss": 4.0}, "bfloat16"),
        (
            {"mean_average_precision": 0.9, "log_loss": 0.2},
            {"mean_average_precision": 0.5, "log_loss": 0.2},
            "float16",
        ),
        ({"log_loss": 0.2}, {"log_loss": float("nan")}, "float32"),
    ],
)
def test_a_gap_is_told_with_both_numbers(measured, found, precision):
    name = next(name for name in measured if name in found and measured[name] != found[name])
    with pytest.raises(TrainingError) as error:
        check(measured, scored(**found), precision)
    assert f"{measured[name]:.4f}" in str(error.value)
    assert f"{found[name]:.4f}" in str(error.value)


@pytest.mark.parametrize(
    ("measured", "found", "precision"),
    [
        ({"accuracy": 0.5, "log_loss": 0.642389}, {"accuracy": 0.5, "log_loss": 0.642391}, "float32"),
        ({"accuracy": 17 / 18, "log_loss": 12.0}, {"accuracy": 1.0, "log_loss": 12.05}, "float32"),
        ({"accuracy": 0.9, "log_loss": 0.30}, {"accuracy": 0.95, "log_loss": 0.33}, "bfloat16"),
        ({}, {"accuracy": 0.9, "log_loss": 0.3}, "float32"),
        ({"micro_f1": 0.9, "log_loss": 0.3}, {"micro_f1": 0.4, "log_loss": 0.3}, "float32"),
    ],
)
def test_rounding_and_what_is_chosen_anew_is_no_gap(measured, found, precision):
    check(measured, scored(**found), precision)


def test_what_activations_are_kept_in_counts_like_what_is_computed_in():
    gap = ({"log_loss": 0.5}, scored(log_loss=0.53))
    check_validation(*gap, types={"float32", "bfloat16"}, phase="head", where="model")
    with pytest.raises(TrainingError, match="log loss"):
        check_validation(*gap, types={"float32", "float16"}, phase="head", where="model")

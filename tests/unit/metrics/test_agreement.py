from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset

from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.rows import row_features
from hfft.errors import TrainingError
from hfft.metrics.agreement import check_logits, check_validation


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    from pictures import make_photos

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
def test_the_same_network_passes_and_keeps_its_modes(family, rows):
    trained = side(family)
    trained[0].train()
    assert check_logits(trained, side(family), rows, "model") == 0
    assert all(module.training for module in trained[0].modules())


def test_other_weights_pixels_or_outputs_do_not(rows):
    others = (
        side(noise=0.05),
        side(processor=tiny.ViTImageProcessor(size={"height": tiny.SIDE, "width": tiny.SIDE}, image_mean=[0.1] * 3)),
        (tiny.build("vit", 3), side()[1]),
    )
    for other in others:
        with pytest.raises(TrainingError, match="isn't the one that was trained"):
            check_logits(side(), other, rows, "model")


def scores(images=18, **values):
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
        check(measured, scores(**found), precision)
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
    check(measured, scores(**found), precision)


def test_what_activations_are_kept_in_counts_like_what_is_computed_in():
    gap = ({"log_loss": 0.5}, scores(log_loss=0.53))
    check_validation(*gap, types={"float32", "bfloat16"}, phase="head", where="model")
    with pytest.raises(TrainingError, match="log loss"):
        check_validation(*gap, types={"float32", "float16"}, phase="head", where="model")

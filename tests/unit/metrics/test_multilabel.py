import numpy as np
import pytest
from sklearn import metrics as sk

from hfft.metrics.calibration import calibration
from hfft.metrics.evaluate_modules import MULTI_LABEL_MODULES, ProbabilityMetric
from hfft.metrics.intervals import exact_share
from hfft.metrics.multilabel import (
    LABEL_METRICS,
    LabelOutcomes,
    label_details,
    label_differences,
    label_intervals,
    measure_labels,
)
from hfft.metrics.paired_tests import mcnemar
from hfft.metrics.probabilities import log_odds, sigmoid
from hfft.metrics.scores import label_scores


def intervals(shares, truth):
    return label_intervals(LabelOutcomes.of(shares, truth))


def draw(images=60, labels=5, seed=0, digits=None):
    """Probabilities that know something of the labels; rounded, many are equal."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((images, labels)) < np.linspace(0.6, 0.1, labels)).astype(np.uint8)
    logits = rng.normal(size=truth.shape) + 1.5 * truth - 0.5
    shares = sigmoid(logits)
    return (shares if digits is None else shares.round(digits).astype(np.float32)), truth


CASES = [draw(), draw(seed=1), draw(seed=2, digits=1), draw(images=300, labels=12, seed=3)]


@pytest.mark.parametrize(("shares", "truth"), CASES)
def test_metrics_are_those_of_scikit_learn(shares, truth):
    given = shares >= 0.5
    exact = shares.astype(np.float64)
    expected = {
        "mean_average_precision": sk.average_precision_score(truth, shares, average="macro"),
        "macro_f1": sk.f1_score(truth, given, average="macro", zero_division=0),
        "micro_f1": sk.f1_score(truth, given, average="micro"),
        "subset_accuracy": sk.accuracy_score(truth, given),
        "hamming_loss": sk.hamming_loss(truth, given),
        "log_loss": np.mean([sk.log_loss(truth[:, k], exact[:, k], labels=[0, 1]) for k in range(truth.shape[1])])
        if exact.min() > 0 and exact.max() < 1
        else None,
    }
    for name, metric in LABEL_METRICS.items():
        if expected[name] is not None:
            assert metric(shares, truth) == pytest.approx(expected[name], abs=1e-9), name


@pytest.mark.parametrize(("shares", "truth"), CASES)
def test_details_are_those_of_scikit_learn(shares, truth):
    given = shares >= 0.5
    found = label_details(LabelOutcomes.of(shares, truth))
    count = truth.shape[1]
    assert found["weighted_f1"] == pytest.approx(sk.f1_score(truth, given, average="weighted", zero_division=0))
    assert found["macro_precision"] == pytest.approx(
        sk.precision_score(truth, given, average="macro", zero_division=0)
    )
    assert found["macro_recall"] == pytest.approx(sk.recall_score(truth, given, average="macro", zero_division=0))
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(truth, shares, average="macro"))
    brier = np.mean([sk.brier_score_loss(truth[:, k], shares[:, k].astype(np.float64)) for k in range(count)])
    assert found["brier_score"] == pytest.approx(brier)


@pytest.mark.parametrize(("shares", "truth"), CASES)
def test_scores_by_label_are_those_of_scikit_learn(shares, truth):
    names = [f"c{k}" for k in range(truth.shape[1])]
    limits = np.linspace(0.2, 0.7, len(names))
    given = shares >= limits
    found = label_scores(LabelOutcomes.of(shares, truth, given), limits, names)
    for k, row in enumerate(found.values()):
        precision, recall, f1, _ = sk.precision_recall_fscore_support(
            truth[:, k], given[:, k], average="binary", zero_division=0
        )
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision, recall, f1))
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(truth[:, k], shares[:, k]))
        assert (row["images"], row["predicted"]) == (truth[:, k].sum(), given[:, k].sum())
        assert row["threshold"] == limits[k]
        assert row["recall_low"] <= row["recall"] <= row["recall_high"]


def test_a_label_that_no_image_has():
    shares, truth = draw()
    truth[:, 2] = 0
    found = {name: metric(shares, truth) for name, metric in LABEL_METRICS.items()}
    others = [0, 1, 3, 4]
    assert found["mean_average_precision"] == pytest.approx(
        sk.average_precision_score(truth[:, others], shares[:, others])
    )
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, shares >= 0.5, average="macro", zero_division=0))
    assert (
        label_scores(LabelOutcomes.of(shares, truth), np.full(5, 0.5), list("abcde"))["c"]["average_precision"] is None
    )
    found = intervals(shares, truth)
    assert [name for name, row in found.items() if row["low"] is None] == ["log_loss"]  # of 60 images


def test_no_label_at_all():
    shares, truth = draw(images=4)
    found = intervals(shares, truth * 0)
    assert found["mean_average_precision"] == {"value": 0, "low": None, "high": None}
    assert found["hamming_loss"]["value"] == pytest.approx(np.mean(shares >= 0.5))


def test_a_resample_is_measured_as_its_images_would_be():
    shares, truth = draw(seed=4, digits=1)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(truth), np.full(len(truth), 1 / len(truth)), size=6)
    found = measure_labels(LabelOutcomes.of(shares, truth).tally(weights))
    for number, times in enumerate(weights):
        rows = np.repeat(np.arange(len(truth)), times)
        alone = measure_labels(LabelOutcomes.of(shares[rows], truth[rows]).tally())
        for name, values in found.items():
            assert values[number] == pytest.approx(float(alone[name])), name


def test_intervals_are_as_wide_as_other_images_would_make_them():
    value, width = [], []
    for seed in range(60):
        row = label_intervals(LabelOutcomes.of(*draw(images=150, seed=100 + seed)))["mean_average_precision"]
        assert row["low"] <= row["value"] <= row["high"]
        value.append(row["value"])
        width.append(row["high"] - row["low"])
    assert np.mean(width) == pytest.approx(2 * 1.96 * np.std(value), rel=0.35)


@pytest.mark.parametrize("images", [2, 10, 40])
def test_all_right_leaves_a_doubt(images):
    truth = np.arange(3 * images).reshape(-1, 3) % 2
    found = intervals(np.where(truth > 0, 0.99, 0.01), truth)
    for name in ("mean_average_precision", "macro_f1", "micro_f1", "subset_accuracy"):
        assert found[name]["value"] - found[name]["low"] >= 0.99 - exact_share(images, images)[0], name
    assert found["hamming_loss"]["high"] >= 0.99 * exact_share(0, images)[1]
    assert found["log_loss"]["low"] is None


def test_simulated_intervals_cover_the_truth():
    for images, labels, repeats in ((10, 5, 100), (100, 3, 100)):
        truths = measure_labels(LabelOutcomes.of(*draw(20_000, labels, seed=0)).tally())
        found = [label_intervals(LabelOutcomes.of(*draw(images, labels, seed=200 + k))) for k in range(repeats)]
        for name, truth in truths.items():
            rows = [one[name] for one in found if one[name]["low"] is not None]
            assert np.mean([one["low"] <= truth <= one["high"] for one in rows] or [1]) >= 0.93, (images, name)


def test_intervals_of_many_images_come_from_fewer_resamples_and_are_reproducible():
    shares, truth = draw(images=3000, labels=60)
    assert intervals(shares, truth) == intervals(shares, truth)


def test_differences_are_those_of_the_metrics():
    (first, truth), (second, _) = draw(seed=5), draw(seed=6)
    found = label_differences(LabelOutcomes.of(first, truth), LabelOutcomes.of(second, truth))
    for name, metric in LABEL_METRICS.items():
        assert found[name]["value"] == pytest.approx(metric(second, truth) - metric(first, truth))
        if name not in ("mean_average_precision", "log_loss"):  # 60 images are too few
            assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    same = label_differences(LabelOutcomes.of(first, truth), LabelOutcomes.of(first, truth))
    for name in ("macro_f1", "micro_f1", "subset_accuracy", "hamming_loss"):
        assert same[name]["value"] == 0
        assert same[name]["low"] == pytest.approx(-same[name]["high"])
        assert same[name]["low"] < 0
    assert same["log_loss"]["low"] is None


def test_the_subset_accuracy_differs_clearly_where_mcnemar_says_so():
    truth = np.zeros((40, 3), int)
    for better in range(2, 10):
        first = np.full(truth.shape, 0.1)
        second = first.copy()
        first[:better, 0] = second[39, 1] = 0.9
        outcomes = [LabelOutcomes.of(shares, truth) for shares in (first, second)]
        test = mcnemar(*(~outcome.wrong.any(axis=1) for outcome in outcomes))
        assert (label_differences(*outcomes)["subset_accuracy"]["low"] > 0) == (test.p_value < 0.05)


def test_calibration_is_the_mean_over_the_labels():
    shares = np.array([[0.25, 0.9], [0.25, 0.9], [0.25, 0.9], [0.25, 0.9]], np.float32)
    truth = np.array([[1, 1], [0, 1], [0, 0], [0, 0]])
    found = calibration(shares, truth)
    assert found["expected_calibration_error"] == pytest.approx((0 + 0.4) / 2, abs=1e-6)
    assert [(part["images"], part["accuracy"]) for part in found["bins"]] == [(4, 0.25), (4, 0.5)]


@pytest.mark.parametrize("size", [10.0, 17.0, 20.0, 30.0])
def test_an_answer_costs_what_its_logit_says(size):
    logits = np.array([[size, -size]])
    for truth in ([[0, 1]], [[1, 0]]):
        expected = np.mean(np.logaddexp(0, np.where(truth, -logits, logits)))
        outcomes = LabelOutcomes.of_logits(logits, np.array(truth))
        assert outcomes.losses.mean() == pytest.approx(expected, rel=1e-9)
        assert LABEL_METRICS["log_loss"](sigmoid(logits), np.array(truth)) == pytest.approx(expected, abs=1e-3)


def test_logits_are_ranked_where_probabilities_are_all_1():
    logits, truth = np.array([[40.0], [45.0], [50.0], [55.0]]), np.array([[0], [0], [1], [1]])
    outcomes = LabelOutcomes.of_logits(logits, truth)
    assert float(measure_labels(outcomes.tally())["mean_average_precision"]) == 1
    assert label_details(outcomes)["roc_auc"] == 1


def test_a_probability_of_1_was_rounded():
    for kind, size in ((np.float32, 17.3), (np.float64, 37.4)):
        found = log_odds(np.array([[0.0, 0.5, 1.0]], kind))[0]
        assert found == pytest.approx([-87.3, 0, size], abs=0.1)
    assert sigmoid(np.array([[-1000.0, 0.0, 1000.0]])).tolist() == [[0.0, 0.5, 1.0]]


@pytest.mark.parametrize("name", sorted(MULTI_LABEL_MODULES))
def test_every_metric_is_a_module(name):
    shares, truth = draw()
    module = ProbabilityMetric(name, is_multi_label=True)
    module.add_batch(predictions=shares[:30].tolist(), references=truth[:30].tolist())
    module.add_batch(predictions=shares[30:].tolist(), references=truth[30:].tolist())
    assert module.compute() == {name: pytest.approx(MULTI_LABEL_MODULES[name](shares, truth))}

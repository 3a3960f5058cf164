import pytest

from hfft.recipe.loading import load_recipe
from hfft.runs.record import PhaseResult
from hfft.training.model_selection import select_phase

WORSE, BETTER = {"accuracy": 0.8533, "log_loss": 0.5}, {"accuracy": 0.8612, "log_loss": 0.4}


def chosen(*metrics, phases=None, **recipe):
    """The choice among phases called a, b and c with these validation metrics."""
    phases = phases or [{}] * len(metrics)
    content = {
        "name": "r",
        "model": {"checkpoint": "m"},
        "data": {"source": "d"},
        "phases": [{"name": name, **phase} for name, phase in zip("abc", phases, strict=False)],
        **recipe,
    }
    results = [PhaseResult("checkpoint-1", 1, 1, found, 1.0, 1.0, {}) for found in metrics]
    return select_phase(load_recipe(content), results)


@pytest.mark.parametrize(
    ("metrics", "phase", "reason"),
    [
        ([WORSE, BETTER], "b", "b improved validation accuracy (0.853 after a, 0.861 after b): model/ is that of b"),
        (
            [BETTER, WORSE],
            "a",
            "b did not improve validation accuracy (0.861 after a, 0.853 after b): model/ is that of a",
        ),
        (
            [WORSE, WORSE],  # the earlier changed less
            "a",
            "b did not improve validation accuracy (0.853 after a, 0.853 after b): model/ is that of a",
        ),
        (
            [BETTER, WORSE, {"accuracy": 0.87}],
            "c",
            "c improved validation accuracy (0.861 after a, 0.870 after c): model/ is that of c",
        ),
        (
            [WORSE, BETTER, WORSE],
            "b",
            "c did not improve validation accuracy (0.861 after b, 0.853 after c): model/ is that of b",
        ),
        (
            [BETTER, WORSE, {"accuracy": 0.8612 - 1e-5}],
            "a",
            "b and c did not improve validation accuracy (0.86120 after a, 0.85330 after b, 0.86119 after c): "
            "model/ is that of a",
        ),
        ([BETTER], "a", "a is the only phase: model/ is that of a"),
        ([{}, {}], "b", "no phase was measured on validation images: model/ is that of b"),
    ],
)
def test_the_best_phase_on_validation_is_kept(metrics, phase, reason):
    kept = chosen(*metrics)
    assert (kept.phase, kept.reason) == (phase, reason)
    assert "abc"[kept.number] == phase


def test_the_metric_is_that_of_the_later_phase():
    log_loss = {"metric_for_best_model": "log_loss"}
    kept = chosen({"accuracy": 0.8, "log_loss": 0.3}, {"accuracy": 0.9, "log_loss": 0.4}, phases=[{}, log_loss])
    assert kept.phase == "a"
    assert kept.reason.startswith("b did not improve validation log loss (0.300 after a, 0.400 after b)")
    assert kept.values == {"a": {"log_loss": 0.3}, "b": {"log_loss": 0.4}}
    assert chosen(BETTER, WORSE, phases=[{}, {**log_loss, "greater_is_better": True}]).phase == "b"


def test_two_metrics_make_two_sentences():
    phases = [{}, {"metric_for_best_model": "eval_log_loss"}, {"metric_for_best_model": "accuracy"}]
    kept = chosen(BETTER, WORSE, WORSE, phases=phases)
    assert kept.reason == (
        "b did not improve validation log loss (0.400 after a, 0.500 after b); "
        "c did not improve validation accuracy (0.861 after a, 0.853 after c): model/ is that of a"
    )


def test_last_is_last():
    kept = chosen(BETTER, WORSE, keep="last")
    assert (kept.phase, kept.reason) == ("b", "the recipe says keep: last: model/ is that of b")


def test_a_phase_without_numbers_can_not_be_beaten_or_beat():
    kept = chosen(BETTER, {}, WORSE)
    assert kept.phase == "c"
    assert kept.reason == "not every phase was measured on validation images: model/ is that of c"
    assert chosen(BETTER, {}).phase == "b"


def test_an_adapter_that_is_to_stay_apart_is_the_result_whatever_it_is_worth():
    apart = [{}, {"adapter": {"merge": False}}]
    kept = chosen(BETTER, WORSE, phases=apart)
    assert (kept.phase, kept.number) == ("b", 1)
    assert kept.reason == (
        "b did not improve validation accuracy (0.861 after a, 0.853 after b), but adapter.merge: false asks for the "
        "adapter: adapter/ is that of b"
    )
    assert chosen(WORSE, BETTER, phases=apart).reason.endswith("0.861 after b): adapter/ is that of b")

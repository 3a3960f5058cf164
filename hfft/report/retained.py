"""What the encoder still knows, and what confidence is worth, as parts of the card."""

from collections.abc import Mapping
from typing import Any

from hfft.runs.facts import RunFacts
from hfft.system.markdown import escape, table


def confidence_in_words(facts: RunFacts) -> str:
    """The temperature and what it does; empty where none was fitted."""
    found = facts.confidence
    if not found:
        return ""
    before, after = found["before"], found["after"]
    labels = ""
    if "label_thresholds" in found:
        labels = "The thresholds of the labels are there too (`hfft.label_thresholds`)."
    text = (
        f"Divided by a temperature of {found['temperature']:.3f}, fitted on {found['fitted_on']['images']:,} "
        f"{found['fitted_on']['split']} images and kept in `config.json` (`hfft.temperature`), the logits have a log "
        f"loss of {after['log_loss']:.4f} instead of {before['log_loss']:.4f} on the {found['measured_on']} images, "
        f"and an expected calibration error (15 bins) of {after['expected_calibration_error']:.3f} instead of "
        f"{before['expected_calibration_error']:.3f}. All other numbers here are without it, and so is `pipeline()`."
    )
    return f"{text} {labels}".rstrip()


def retention_in_words(facts: RunFacts) -> str:
    """A table by phase; empty where nothing was measured or no phase changed the encoder."""
    phases = facts.retention.get("phases", {})
    if not any(phase["changed"] for phase in phases.values()):
        return ""
    sample = facts.retention["sample"]
    has_old_task = any(phase["old_task"] is not None for phase in phases.values())
    header = ["after phase", *(["same answers of the old head", "divergence (nats)"] if has_old_task else [])]
    header += ["drift of features", "similarity of features", "right by nearest neighbours"]
    rows = [[escape(name), *_cells(phase, has_old_task=has_old_task)] for name, phase in phases.items()]
    before = next(iter(phases.values()))["knn_accuracy"]["before"]
    return (
        f"What is left of the pretrained encoder, on {sample['images']:,} {sample['split']} images: drift is 1 - "
        "cosine and similarity is linear centred kernel alignment, of what enters the head"
        f"{'' if before is None else f'; nearest neighbours were right in {before:.3f} before'}.\n\n"
        + table(header, rows)
    )


def _cells(phase: Mapping[str, Any], *, has_old_task: bool) -> list[str]:
    old, entering = phase["old_task"] or {}, phase["head_input"] or {}
    answers = [_number(old.get("agreement")), _number(old.get("kl_divergence"))] if has_old_task else []
    similar = [_number(entering.get("cosine_drift")), _number(entering.get("cka"))]
    return [*answers, *similar, _number(phase["knn_accuracy"]["after"])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

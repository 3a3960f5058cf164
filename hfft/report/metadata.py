"""What the Hub reads of a card: the YAML at its head."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hfft.report.words import spoken
from hfft.runs.facts import RunFacts, SplitFacts

TASK = "image-classification"
# What the Hub calls our metrics, where it has them, and how they are averaged.
_METRICS = {"macro_f1": ("f1", {"average": "macro"}), "micro_f1": ("f1", {"average": "micro"})}


def card_data(facts: RunFacts) -> ModelCardData:
    """The metadata of a run's result; it names Hub ids only, and no path of the disk that it was made on.

    Args:
        facts: Of the run.
    """
    base = None if facts.has_own_base else facts.checkpoint.hub_id
    others: dict[str, Any] = {}
    if base is not None:
        others["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    if facts.examples:
        others["widget"] = [{"src": example.file, "example_title": example.label} for example in facts.examples]
    return ModelCardData(
        model_name=facts.recipe.name,
        base_model=base,
        datasets=[facts.data.hub_id] if facts.data.hub_id else None,
        license=facts.recipe.license or "unknown",
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=["hfft", TASK, facts.model_type, *(["multi-label"] if facts.is_multi_label else [])],
        eval_results=_results(facts, facts.judged) if facts.judged else None,
        **others,
    )


def _results(facts: RunFacts, split: SplitFacts) -> list[EvalResult]:
    """One entry per metric of the split that the model is judged by; a validation split has helped to choose it."""
    results = []
    for name, measured in split.metrics.items():
        metric, arguments = _METRICS.get(name, (name, None))
        results.append(
            EvalResult(
                task_type=TASK,
                task_name="Image Classification",
                dataset_type=facts.data.hub_id or "imagefolder",
                dataset_name=facts.data.name,
                dataset_config=facts.recipe.data.config if facts.data.hub_id else None,
                dataset_revision=facts.data.revision,
                dataset_split=split.name,
                metric_type=metric,
                metric_name=spoken(name),
                metric_value=measured.value,
                metric_args=arguments,
            )
        )
    return results

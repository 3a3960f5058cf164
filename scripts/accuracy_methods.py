"""One run of benchmark_accuracy.py: a method on one split of a data set, which is scored on the test images once.

That script runs this one with a Job as JSON, in a process of its own; it is not meant to be run by hand. Every method
reads the same table and the same checkpoint; what it chooses, it chooses on the validation images.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_data import Job, Outcome, flips_of, outcome_of, read_rows
from accuracy_plain import BATCH, EVAL_BATCH, fastai, plain
from torch import nn

NEIGHBOURS = (1, 5, 20, 50)  # of which validation chooses one
TEMPERATURE = 0.07  # of the votes, as in DINO's protocol, https://hf.co/papers/2104.14294
WEIGHT_DECAYS = tuple(10.0**power for power in range(0, -7, -1))  # of the probe, strongest first


# hfft: a method is a list of phases. The rates of `head` and `last-blocks` are those of recipes/quickstart.yaml, which
# were chosen on the validation images of the quick start's own split; those of the others are common values for the
# methods of the publications named beside them. No choice was made on any test image.

_HEAD = {"name": "head", "num_train_epochs": 1, "learning_rate": 1e-2, "lr_scheduler_type": "cosine"}
_LATER = {"num_train_epochs": 3, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}


def _lora(method: str) -> list[dict[str, Any]]:
    """Rank 16 on all linear and plain convolution layers: more targets are better, https://hf.co/papers/2405.09673."""
    adapter = {"method": method, "on": "all", "r": 16, "lora_alpha": 32}
    return [_HEAD, {**_LATER, "name": method, "adapter": adapter, "learning_rate": 5e-4}]


PHASES: dict[str, list[dict[str, Any]]] = {
    "blocks": [_HEAD, {**_LATER, "name": "last-blocks", "unfreeze": {"blocks": 5}, "learning_rate": 3e-5}],
    "gradual": [
        _HEAD,  # ULMFiT, https://hf.co/papers/1801.06146
        {
            **_LATER,
            "name": "down",
            "gradual": {"blocks_per_phase": 2, "blocks": 6},
            "learning_rate": 3e-5,
            "num_train_epochs": 1,
        },
    ],
    "full": [_HEAD, {**_LATER, "name": "all", "unfreeze": "all", "learning_rate": 3e-5}],  # LP-FT, 2202.10054
    "one_phase": [{**_LATER, "name": "all", "unfreeze": "all", "learning_rate": 1e-4, "num_train_epochs": 4}],
    "lora": _lora("lora"),
    "dora": _lora("dora"),
    "bitfit": [_HEAD, {**_LATER, "name": "bias", "unfreeze": "bias", "learning_rate": 1e-3}],  # 2106.10199
    "norm": [_HEAD, {**_LATER, "name": "norm", "unfreeze": "norm", "learning_rate": 1e-3}],  # 2003.00152
}


def recipe_of(job: Job, phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The recipe of a method: as recipes/quickstart.yaml but for the phases, flips alone as augmentation."""
    return {
        "name": "run",
        "model": {"checkpoint": job.checkpoint},
        "data": {
            "source": job.table,
            "image_column": "path",
            "label_column": "label",
            "split_column": "split",
            "augment": {"flip": flips_of(job.table)},
            "audit": "off",
        },
        "training": {
            "per_device_train_batch_size": BATCH,
            "weight_decay": 0.01,
            "metric_for_best_model": "log_loss",
        },
        "phases": list(phases),
        "label_hints": False,
        "report": False,
        "seed": job.seed,
        "output_dir": job.folder,
    }


def with_hfft(job: Job, phases: Sequence[Mapping[str, Any]]) -> Outcome:
    """A recipe through hfft.finetune."""
    import hfft
    from hfft.recipe.loading import load_recipe

    return _of_run(hfft.finetune(load_recipe(recipe_of(job, phases)), overwrite=True).folder)


def auto(job: Job) -> Outcome:
    """The recipe that hfft chooses for the images and a time budget."""
    import hfft
    from hfft.commands.automatic import choose_recipe

    own = recipe_of(job, [])
    data = [f"data.{key}={own['data'][key]}" for key in ("image_column", "label_column", "split_column")]
    rest = [f"{key}={own[key]}" for key in ("name", "seed", "output_dir")]
    overrides = [*data, *rest, "label_hints=false", "report=false"]
    chosen = choose_recipe(
        job.table, checkpoint=job.checkpoint, minutes=job.minutes, overrides=overrides, overwrite=True
    )
    return _of_run(hfft.finetune(chosen, overwrite=True).folder)


def _of_run(folder: Path) -> Outcome:
    """What a run folder says of the test images."""
    import pandas as pd

    table = pd.read_parquet(folder / "predictions.parquet")
    table = table[table["split"] == "test"]
    plans = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/plan.json"))]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return Outcome(
        dict(zip(table["file"], table["prediction"], strict=True)),
        max(plan["trainable"] for plan in plans),
        str(metrics.get("kept", {}).get("reason", "")),
        _retention(metrics),
    )


def _retention(metrics: Mapping[str, Any]) -> float | None:
    """Of the last phase."""
    phases = [*metrics.get("retention", {}).get("phases", {}).values()]
    old_task = phases[-1]["old_task"] if phases else None
    return None if old_task is None else old_task["agreement"]


# Features of the frozen network


def features_of(job: Job) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], tuple[str, ...]]:
    """What enters the head for the images of each split, (N, D) float32; the class numbers; and the classes."""
    from torch.utils.data import DataLoader
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from hfft.data.images.batches import Collator, Examples
    from hfft.data.images.transforms import evaluation_transform
    from hfft.data.sources.reading import load_data
    from hfft.model.anatomy import dissect, head_modules
    from hfft.recipe.loading import load_recipe
    from hfft.replay.split_point import Prefix, split_point_at

    images = load_data(load_recipe(recipe_of(job, [_HEAD])).data, job.seed)
    model = AutoModelForImageClassification.from_pretrained(job.checkpoint).eval().requires_grad_(False)
    transform = evaluation_transform(AutoImageProcessor.from_pretrained(job.checkpoint))
    head = head_modules(dissect(model))[0]
    found, labels = {}, {}
    for split, rows in images.splits.items():
        loader = DataLoader(Examples(rows, transform), EVAL_BATCH, collate_fn=Collator())
        parts, numbers, prefix = [], [], None
        for batch in loader:
            pixels = batch["pixel_values"]
            prefix = prefix or Prefix(model, [split_point_at(model, head, pixels[:1])]).eval()
            with torch.inference_mode():
                parts.append(prefix(pixels)[0].float().flatten(1))
            numbers.append(batch["labels"])
        found[split], labels[split] = torch.cat(parts), torch.cat(numbers).numpy()
    return found, labels, images.labels


def knn(job: Job) -> Outcome:
    """Nearest neighbours by cosine similarity, the nearer the heavier; validation chooses how many."""
    features, labels, classes = features_of(job)
    known = nn.functional.normalize(features["train"], dim=1)
    marks = nn.functional.one_hot(torch.from_numpy(labels["train"]), len(classes)).float()

    def answer(count: int, asked: str) -> np.ndarray:
        similarity = nn.functional.normalize(features[asked], dim=1) @ known.T
        nearest, places = similarity.topk(min(count, len(known)))  # (N, count)
        weights = torch.softmax(nearest / TEMPERATURE, dim=1)
        return torch.einsum("nc,nck->nk", weights, marks[places]).argmax(dim=1).numpy()

    scores = {count: float((answer(count, "validation") == labels["validation"]).mean()) for count in NEIGHBOURS}
    best = max(scores, key=lambda count: scores[count])
    return outcome_of(job, answer(best, "test"), classes, 0, f"{best} neighbours")


def probe(job: Job) -> Outcome:
    """Logistic regression; validation chooses the weight decay by log loss."""
    from hfft.training.logistic import head_path

    features, labels, classes = features_of(job)
    train, validation = (torch.from_numpy(labels[split]) for split in ("train", "validation"))
    heads = head_path(features["train"], train, classes=len(classes), weight_decays=WEIGHT_DECAYS)
    best = min(heads, key=lambda head: nn.functional.cross_entropy(head.logits(features["validation"]), validation))
    answers = best.logits(features["test"]).argmax(dim=1).numpy()
    trainable = best.weight.numel() + best.bias.numel()
    return outcome_of(job, answers, classes, trainable, f"weight decay {best.weight_decay:g}")


METHODS: dict[str, Callable[[Job], Outcome]] = {
    "knn": knn,
    "probe": probe,
    **{name: partial(with_hfft, phases=phases) for name, phases in PHASES.items()},
    "auto": auto,
    "plain": plain,
    "fastai": fastai,
}


def run(job: Job) -> None:
    """Run a method in this process and write what it gives to `job.result`."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("hfft").setLevel(logging.INFO)
    outcome, rows = METHODS[job.method](job), read_rows(job.table)
    test = rows["test"]
    lacking = [row.path for row in test if row.path not in outcome.predictions]
    if lacking:
        raise SystemExit(f"{job.method} gave no answer for {len(lacking)} of {len(test)} test images")
    is_right = [outcome.predictions[row.path] == row.label for row in test]
    kinds = sorted({row.kind for row in test} - {""})
    content = {
        "accuracy": float(np.mean(is_right)),
        "by_kind": {
            kind: float(np.mean([right for right, row in zip(is_right, test, strict=True) if row.kind == kind]))
            for kind in kinds
        },
        "images": {split: len(part) for split, part in rows.items()},
        "trainable": outcome.trainable,
        "chosen": outcome.chosen,
        "retention": outcome.retention,
        "threads": torch.get_num_threads(),
        "truth": [row.label for row in test],
        "predictions": [outcome.predictions[row.path] for row in test],
    }
    Path(job.result).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))

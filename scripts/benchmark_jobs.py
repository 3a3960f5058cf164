"""One measurement of benchmark_two_phase.py: plain Trainer code, hfft, or the floor.

That script runs this one with a Job as JSON, in a process of its own; it is not meant to be run by hand.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hfft.data.images.batches import Collator, Examples
from hfft.data.images.transforms import evaluation_transform, training_transform
from hfft.data.sources.reading import load_data
from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.system.machine import cpus_per_process

EVAL_BATCH = 32
LORA_LAYERS = {
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "convnext": ["pwconv1", "pwconv2", "downsampling_layer.1"],
}
WARM_UP, TRIED = 1, 3  # batches, where the fastest of several ways is looked for

MANY = 10**9  # images, for which an engine's preparation is nothing

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        variant: `floor`, `plain-float32`, `plain-bfloat16`, or hfft with any name.
        recipe: Path or content of a recipe.
        overrides: `key=value` for it.
        result: File to write.
    """

    variant: str
    recipe: str | dict[str, Any]
    overrides: tuple[str, ...]
    result: str


class Clock(TrainerCallback):
    """Seconds of every epoch, by the name of the phase's folder: of its steps, and with evaluation and checkpoint."""

    def __init__(self) -> None:
        """Start with no epochs."""
        self.epochs: dict[str, list[dict[str, float]]] = {}
        self._begun = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start an epoch."""
        self._begun = time.perf_counter()
        self.epochs.setdefault(Path(args.output_dir).name, []).append({})

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The steps are done."""
        seconds = time.perf_counter() - self._begun
        self.epochs[Path(args.output_dir).name][-1] = {"steps": seconds, "all": seconds}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluated and saved."""
        self.epochs[Path(args.output_dir).name][-1]["all"] = time.perf_counter() - self._begun


def plain(recipe: Recipe, *, bf16: bool) -> dict[str, Any]:
    """The job as it is written without hfft: one Trainer per phase, the encoder frozen by requires_grad."""
    set_seed(recipe.seed)
    images = load_data(recipe.data, recipe.seed)
    checkpoint = recipe.model.checkpoint
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint, num_labels=len(images.labels), ignore_mismatched_sizes=True
    )
    flips = [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip()] if recipe.data.augment.flip else []
    changes = {"train": transforms.Compose(flips)}
    splits: dict[str, Any] = {
        name: rows.cast_column("image", Image()).with_transform(
            partial(_pixels, processor=processor, change=changes.get(name))
        )
        for name, rows in images.splits.items()
    }
    clock, trainer = Clock(), None
    phases: dict[str, dict[str, Any]] = {}
    for number, phase in enumerate(recipe.phases):
        begun = time.perf_counter()
        folder = Path(recipe.output_dir) / recipe.name / f"{number}-{phase.name}"
        model = release(model, phase)
        trainer = Trainer(
            model=model,
            args=_plain_arguments(phase, folder, seed=recipe.seed, bf16=bf16),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            compute_metrics=_accuracy,
            callbacks=[clock],
        )
        trainer.train()
        phases[phase.name] = {
            "seconds": time.perf_counter() - begun,
            "images": trainer.state.num_train_epochs * len(splits["train"]),
            "epochs": clock.epochs[folder.name],
            "trainable": sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad),
        }
    assert trainer is not None  # a recipe has phases
    accuracy = trainer.evaluate(splits["test"], metric_key_prefix="test")["test_accuracy"]
    return {"phases": phases, "accuracy": accuracy, "train_images": len(images.splits["train"])}


def _plain_arguments(phase: PhaseSpec, folder: Path, *, seed: int, bf16: bool) -> TrainingArguments:
    schedule = {key: value for key, value in phase.arguments.items() if key != "metric_for_best_model"}
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        bf16=bf16,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,  # by the loss, which is the recipes' log loss
        per_device_eval_batch_size=EVAL_BATCH,
        dataloader_num_workers=_workers(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **schedule,
    )


def _workers() -> int:
    """As many as hfft starts."""
    return min(cpus_per_process(), 8)


def _pixels(batch: dict[str, Any], *, processor: Any, change: Callable[[Any], Any] | None) -> dict[str, Any]:
    pictures = [image.convert("RGB") for image in batch["image"]]
    pixels = processor([change(picture) if change else picture for picture in pictures], return_tensors="pt")
    return {"pixel_values": list(pixels["pixel_values"]), "labels": batch["label"]}


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def release(model: Any, phase: PhaseSpec) -> Any:
    """Freeze all but what the phase trains."""
    if phase.adapter is not None:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=phase.adapter.r or 8,
            lora_alpha=phase.adapter.lora_alpha or 16,
            target_modules=LORA_LAYERS[model.config.model_type],
            modules_to_save=["classifier"],
        )
        return get_peft_model(model, settings)
    model.requires_grad_(False)
    for part in tail(model, phase):
        if isinstance(part, nn.Module):
            part.requires_grad_(True)
    return model


def tail(model: Any, phase: PhaseSpec) -> list[Step]:
    """What a phase trains, as functions that lead one after the other from its input to the logits."""
    released = int(str(phase.unfreeze["blocks"])) if isinstance(phase.unfreeze, dict) else 0
    if model.config.model_type == "vit":
        body = model.vit
        steps = [*body.layers[-released:], body.layernorm, lambda tokens: tokens[:, 0], model.classifier]
    elif model.config.model_type == "convnext":
        body = model.convnext
        blocks = [block for stage in body.encoder.stages for block in stage.layers]
        steps = [*blocks[-released:], lambda maps: maps.mean((-2, -1)), body.layernorm, model.classifier]
    else:
        body = model.timm_model
        blocks = [block for stage in body.blocks for block in stage]
        steps = [*blocks[-released:], body.conv_head, body.bn2, body.global_pool, body.classifier]
    return steps if released else steps[-1:]


def with_hfft(recipe: Recipe) -> dict[str, Any]:
    """The job with hfft."""
    from hfft.commands.finetune import finetune  # its imports are no part of the plain job
    from hfft.system.files import read_json

    clock = Clock()
    run = finetune(recipe, callbacks=[clock], overwrite=True)
    images = sum(read_json(run.folder / "data.json")["splits"]["train"]["counts"].values())
    phases = {}
    for number, phase in enumerate(recipe.phases):
        folder = run.phase_dir(number)
        phases[phase.name] = {
            "seconds": run.metrics["seconds"][folder.name],
            "images": phase.arguments["num_train_epochs"] * images,
            "epochs": clock.epochs[folder.name],
            "trainable": read_json(folder / "plan.json")["trainable"],
            "result": read_json(folder / "result.json"),
        }
    return {"phases": phases, "accuracy": run.metrics["test"]["accuracy"]["value"], "train_images": images}


def floor(recipe: Recipe) -> dict[str, Any]:
    """What the phases can't do without, each part measured alone on all cores, and added up.

    - decode: one pass over the training images with the training transform (as many passes as `replay.views` says,
      `auto` for one) and over the validation images with the evaluation transform, through a data loader with as many
      workers as hfft starts, one thread each.
    - forward: one pass of the same images, in memory, up to what the phase trains, with the fastest engine that hfft
      knows in the faster of float32 and bfloat16, batches of 32. Choosing and preparing the engine is not counted.
    - steps: the phase's epochs of AdamW on what trains, from the kept float32 activations, in batches of the recipe's
      size and the faster of float32 and bfloat16 autocast, and a pass over those of the validation images per epoch.
    """
    PartialState(cpu=True)  # hfft's log asks it which process this is
    images = load_data(recipe.data, recipe.seed)
    processor = AutoImageProcessor.from_pretrained(recipe.model.checkpoint)
    train = Examples(images.splits["train"], training_transform(processor, recipe.data.augment), seed=recipe.seed)
    validation = Examples(images.splits["validation"], evaluation_transform(processor))
    views = 1 if recipe.replay.views == "auto" else recipe.replay.views
    loader = DataLoader(
        ConcatDataset([*[train] * views, validation]), EVAL_BATCH, num_workers=_workers(), collate_fn=Collator()
    )
    begun = time.perf_counter()
    batches = list(loader)
    decode = time.perf_counter() - begun
    labels = torch.cat([batch["labels"] for batch in batches])
    model = AutoModelForImageClassification.from_pretrained(
        recipe.model.checkpoint, num_labels=len(images.labels), ignore_mismatched_sizes=True
    ).eval()
    if recipe.model.memory_format != "contiguous":
        model = model.to(memory_format=torch.channels_last)
    phases = {}
    for phase in recipe.phases:
        if phase.adapter is not None:  # reaches down to the first block: nothing comes before it
            continue
        parts = tail(model, phase)
        features, forward, way = _forward(model, parts[0], [batch["pixel_values"] for batch in batches])
        steps, how = _steps(parts, features, labels, phase, (len(train), len(validation)))
        phases[phase.name] = {
            "seconds": decode + forward + steps,
            "images": phase.arguments["num_train_epochs"] * len(train),
            "parts": {"decode": decode, "forward": forward, "steps": steps},
            "way": {"forward": way, "steps": how},
        }
    return {"phases": phases, "train_images": len(train), "validation_images": len(validation), "views": views}


def prefix_to(model: Any, stop: Step, pixels: torch.Tensor) -> nn.Module:
    """The network in front of one of its modules."""
    from hfft.replay.split_point import Prefix, split_point_at  # as with finetune

    path = next(name for name, module in model.named_modules() if module is stop)
    return Prefix(model, [split_point_at(model, path, pixels[:1])]).eval()


def _forward(model: Any, stop: Step, pixels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, float, str]:
    from hfft.replay.engine import choose_engine

    prefix = prefix_to(model.requires_grad_(False), stop, pixels[0])
    engines = {
        dtype: choose_engine(prefix, pixels[0], asked="auto", autocast=autocast, images=MANY)
        for dtype, autocast in (("float32", None), ("bfloat16", torch.bfloat16))
    }
    dtype, best = max(engines.items(), key=lambda found: found[1].images_per_second or 0)
    size = len(pixels[0])
    found: list[torch.Tensor] = []
    begun = time.perf_counter()
    for batch in pixels:
        filled = torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])  # engines keep to one size
        found.append(best.run(filled)[0][: len(batch)])
    return torch.cat(found).float(), time.perf_counter() - begun, f"{best.name}, {dtype}"


def _steps(
    parts: Sequence[Step], features: torch.Tensor, labels: torch.Tensor, phase: PhaseSpec, sizes: tuple[int, int]
) -> tuple[float, str]:
    released = [part for part in parts if isinstance(part, nn.Module)]
    weights = [weight for part in released for weight in part.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-6)
    size = phase.arguments["per_device_train_batch_size"]
    train, validation = sizes

    def logits(values: torch.Tensor, bf16: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for part in parts:
                values = part(values)
        return values.float()

    def epoch(bf16: bool, images: int) -> None:
        for chosen in torch.randperm(images).split(size):
            nn.functional.cross_entropy(logits(features[chosen], bf16), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def job(bf16: bool) -> None:
        for _ in range(int(phase.arguments["num_train_epochs"])):
            epoch(bf16, train)
            with torch.no_grad():
                for values in features[-validation:].split(EVAL_BATCH):
                    logits(values, bf16)

    def trial(bf16: bool) -> float:
        epoch(bf16, WARM_UP * size)
        return _seconds(lambda: epoch(bf16, min(TRIED * size, train)))

    best = min((False, True), key=trial)
    return _seconds(lambda: job(best)), "bfloat16 autocast" if best else "float32"


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def run(job: Job) -> None:
    """Make one measurement in this process and write it to `job.result`."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("hfft").setLevel(logging.INFO)
    recipe = load_recipe(job.recipe, job.overrides)
    if job.variant == "floor":
        measured = floor(recipe)
    elif job.variant.startswith("plain"):
        measured = plain(recipe, bf16=job.variant == "plain-bfloat16")
    else:
        measured = with_hfft(recipe)
    Path(job.result).write_text(json.dumps({**measured, "threads": torch.get_num_threads()}), encoding="utf-8")


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))

"""Phases, durations and machines in words, for cards and pages alike; plain text, not Markdown."""

import dataclasses
import shlex
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.runs.facts import PhaseFacts, RunFacts
from hfft.runs.record import Group
from hfft.training.callbacks import headline_in


def time_in_words(seconds: float) -> str:
    """For example `0.3 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def rates(groups: tuple[Group, ...]) -> str:
    """Learning rates of a phase: one, or the highest and the lowest with their parts."""
    from_head = reversed(groups)
    known = [(group.learning_rate, group.part) for group in from_head if group.learning_rate is not None]
    if not known:
        return "unknown"
    (highest, top), (lowest, bottom) = max(known, key=lambda rate: rate[0]), min(known, key=lambda rate: rate[0])
    return f"{highest:.3g}" if highest == lowest else f"{highest:.3g} ({top}) to {lowest:.3g} ({bottom})"


def trained_parts(spec: PhaseSpec, trains: str) -> str:
    """What a phase trained, for example `blocks 8-11 of 12, norm, head`, and with which adapter."""
    if spec.adapter is None:
        return trains
    settings = {"r": spec.adapter.r, "lora_alpha": spec.adapter.lora_alpha, "lora_dropout": spec.adapter.lora_dropout}
    given = "".join(f", {name} {value:g}" for name, value in settings.items() if value is not None)
    end = "then added to the weights" if spec.adapter.merge else "kept apart"
    return f"{trains} ({spec.adapter.method} on {spec.adapter.on}{given}, {end})"


def how_trained(phase: PhaseFacts) -> str:
    """A phase in two or three sentences."""
    arguments, plan, result = phase.spec.arguments, phase.plan, phase.result
    schedule = arguments.get("lr_scheduler_type", "linear")
    decay = max((group.weight_decay for group in plan.groups), default=0.0)
    optimizer = arguments.get("optim", "AdamW")
    epochs = max((entry["epoch"] for entry in phase.history if "epoch" in entry), default=plan.epochs)
    passes = "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"
    early = f" of {plan.steps:,} planned" if result.steps < plan.steps else ""
    taken = f"{result.steps:,}{early} {'step' if result.steps == plan.steps == 1 else 'steps'}"
    best, kept = "", ""
    if result.metrics:
        judge = str(arguments.get("metric_for_best_model", headline_in(result.metrics))).removeprefix("eval_")
        value = f" ({result.metrics[judge]:.4f})" if judge in result.metrics else ""
        best = f", the best by {spoken(judge)} on validation{value}"
        kept = f" The weights of step {result.best_step:,} were kept{best}."
        if phase.spec.average is not None and "ema" in phase.spec.average:
            kept = f" An average of the weights up to step {result.best_step:,} was kept{best}."
    if result.mean is not None and result.mean["kept"]:
        kept = f" The mean of the weights of {len(result.mean['checkpoints'])} checkpoints was kept."
    if plan.solver == "lbfgs":
        decays = {entry["step"]: entry["weight_decay"] for entry in phase.history if "weight_decay" in entry}
        return (
            f"Trained {plan.trains}: {plan.trainable:,} of {plan.total:,} parameters, {plan.steps_in_words}. "
            f"The head of weight decay {decays[result.best_step]:g} was kept{best}."
        )
    replayed = "" if phase.engine is None else " What enters this part was computed once and replayed."
    return (
        f"Trained {trained_parts(phase.spec, plan.trains)}: {plan.trainable:,} of {plan.total:,} parameters. "
        f"{taken} of {plan.batch_in_words} ({passes}), {optimizer}, "
        f"learning rate {rates(plan.groups)}, {schedule} schedule, weight decay {decay:g}.{kept}{replayed}"
    )


def for_all_phases(recipe: Recipe) -> str:
    """What the training images went through, and how they were counted, in every phase; empty for nothing special."""
    augment = recipe.data.augment
    flip = "horizontal" if augment.flip is True else augment.flip
    changes = {
        f"random crops of {augment.crop[0]:g} to {augment.crop[1]:g} of the area"
        if augment.crop
        else "": augment.crop,
        f"{'horizontal and vertical' if flip == 'both' else flip} flips": augment.flip,
        "turns by multiples of 90 degrees": augment.rotate90,
        f"RandAugment of magnitude {augment.randaugment}": augment.randaugment is not None,
        "TrivialAugment Wide": augment.trivialaugment,
        f"AugMix of severity {augment.augmix}": augment.augmix is not None,
        f"brightness, contrast and saturation changed by up to {augment.color:.0%}": augment.color,
        f"rectangles erased in {augment.erasing:.0%} of the images": augment.erasing,
        f"mixup with alpha {augment.mixup:g}": augment.mixup,
        f"CutMix with alpha {augment.cutmix:g}": augment.cutmix,
    }
    weights = "balanced" if recipe.class_weights == "balanced" else "given by class"
    others = {
        f"class weights {weights}": recipe.class_weights,
        f"{recipe.sampler} sampling": recipe.sampler != "shuffle",
        f"{recipe.loss.name.replace('_', '-')} loss": recipe.loss.name != "cross_entropy",
    }
    used = [words for words, is_used in changes.items() if is_used]
    counted = [words for words, is_used in others.items() if is_used]
    sentences = [f"Training images were augmented: {', '.join(used)}."] if used else []
    sentences += [f"In all phases: {', '.join(counted)}."] if counted else []
    return " ".join(sentences)


def machine_in_words(environment: Mapping[str, Any]) -> str:
    """For example `cpu (AMD EPYC, 2 cores)`; `2 processes on cuda (NVIDIA A100)`."""
    device = str(environment["device"]).partition(":")[0]
    cores = f", {environment['cores']} cores" if device == "cpu" else ""
    count = environment["processes"]
    several = f"{count} processes on " if count > 1 else ""
    return f"{several}{device} ({environment['hardware']}{cores}{' each' if count > 1 and cores else ''})"


def spoken(metric: str) -> str:
    """A metric's name in a sentence."""
    return metric.replace("_", " ").replace("f1", "F1").replace("hamming", "Hamming")


def headline(metrics: Collection[str]) -> str:
    """The metric that a page begins with: accuracy, or where images have any number of labels, the first there is."""
    return "accuracy" if "accuracy" in metrics else next(iter(metrics))


def shared_recipe(facts: RunFacts) -> Recipe:
    """The recipe as others may see it: folders of somebody's disk by their last name, and not where runs are put."""
    recipe, folder, images = facts.recipe, facts.recipe.replay.folder, facts.recipe.data.image_folder

    def shared(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _last_name(value) if isinstance(value, str) else value for name, value in arguments.items()}

    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, checkpoint=facts.checkpoint.name),
        data=dataclasses.replace(
            recipe.data, source=facts.data.name, image_folder=None if images is None else _last_name(images)
        ),
        replay=dataclasses.replace(recipe.replay, folder=None if folder is None else _last_name(folder)),
        output_dir=Recipe.output_dir,  # the default
        training=shared(recipe.training),
        phases=tuple(
            dataclasses.replace(phase, arguments=shared(phase.own_arguments), inherited={}) for phase in recipe.phases
        ),
    )


def shared_command(environment: Mapping[str, Any]) -> str:
    """The command of a run as others may see it: `hfft`, and paths of somebody's disk by their last name."""
    program, *arguments = map(str, environment["command"] or [""])
    name = PureWindowsPath(program).name
    shown = ["hfft" if name in ("hfft", "hfft.exe", "__main__.py") else name]
    for argument in arguments:
        key, equals, value = argument.rpartition("=")
        shown.append(f"{key}{equals}{_last_name(value)}")
    return shlex.join(shown)


def _last_name(text: str) -> str:
    """A path's last part, if the text is an absolute path of any system."""
    is_path = text.startswith(("~", "..")) or PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive
    return PureWindowsPath(text).name if is_path else text


def training_in_words(facts: RunFacts) -> dict[str, Any]:
    """What cards and pages alike say of the training."""
    phases = facts.retention.get("phases") or {"": {"knn_accuracy": {"before": None}}}
    return {
        "for_all": for_all_phases(facts.recipe),
        "has_frozen": any(phase.result.frozen["tensors"] for phase in facts.phases),
        "interpolation": interpolation_in_words(facts),
        "machine": machine_in_words(facts.environment),
        "nearest_before": next(iter(phases.values()))["knn_accuracy"]["before"],
    }


def interpolation_in_words(facts: RunFacts) -> str:
    """How far the weights went, without a full stop; empty where they are the final ones."""
    if not facts.interpolation:
        return ""
    metric, images = facts.interpolation["metric"], facts.interpolation["images"]
    chosen = "as the recipe says" if metric is None else f"chosen by {spoken(metric)} on {images:,} validation images"
    return (
        f"The weights lie {facts.interpolation['alpha']:g} of the way from the model of the head phase (0) to the "
        f"final one (1), {chosen}"
    )


def retention_rows(facts: RunFacts) -> list[dict[str, Any]]:
    """What was measured of the encoder after each phase, the old head's answers where the checkpoint has a head.

    Empty where nothing was measured, or no phase changed the encoder.
    """
    phases: Mapping[str, Any] = facts.retention.get("phases", {})
    if not any(phase["changed"] for phase in phases.values()):
        return []
    has_old_task = any(phase["old_task"] is not None for phase in phases.values())
    rows = []
    for name, phase in phases.items():
        old, entering = phase["old_task"] or {}, phase["head_input"] or {}
        answers = {"agreement": old.get("agreement"), "divergence": old.get("kl_divergence")} if has_old_task else {}
        features = {"drift": entering.get("cosine_drift"), "cka": entering.get("cka")}
        nearest = phase["knn_accuracy"]["after"]
        rows.append({"phase": name, "changed": len(phase["changed"]), **answers, **features, "nearest": nearest})
    return rows

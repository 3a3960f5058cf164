"""Verbs before and during training: train, plan, check-data."""

import argparse
import dataclasses
import json
import os
from typing import Any

from hfft.cli.arguments import add_recipe, count, whole
from hfft.cli.printing import between, print_metrics, print_table, show
from hfft.system.lazy_imports import quick_imports
from hfft.system.paths import expanded


def add_verbs(verbs: Any) -> None:
    """Add the parsers of these verbs."""
    _add_train(verbs.add_parser("train", help="run a recipe, or finish an interrupted run of it"))
    _add_plan(verbs.add_parser("plan", help="check a recipe and show what each phase would do"))
    _add_check(verbs.add_parser("check-data", help="look for broken, repeated and leaking images"))


def _add_train(train: argparse.ArgumentParser) -> None:
    add_recipe(train)
    train.add_argument("--overwrite", action="store_true", help="start anew where there is a run of that name")
    train.set_defaults(run=_train)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    add_recipe(plan)
    plan.add_argument("--processes", type=count, default=1, help="processes that would share the images")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def _add_check(check: argparse.ArgumentParser) -> None:
    check.add_argument("source", type=expanded, help="folder, table, shards, Hub id or recipe")
    check.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="as for train: data.label_column=..., data.audit=quick",
    )
    check.add_argument("--max-shown", type=whole, default=10, metavar="N", help="findings of a kind; 0 shows all")
    check.add_argument("--json", action="store_true", help="print JSON, all findings included")
    check.set_defaults(run=_check)


def _train(arguments: argparse.Namespace) -> None:
    from hfft.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.folds is not None:
        _cross_validate(recipe, overwrite=arguments.overwrite)
        return
    if recipe.hub.repo_id is not None and os.environ.get("RANK", "0") == "0":
        from hfft.hub.pushing import check_ahead

        check_ahead(recipe, overwrite=arguments.overwrite)  # said before torch is imported
    with quick_imports():
        from hfft.commands.finetune import finetune

    run = finetune(recipe, overwrite=arguments.overwrite)
    if os.environ.get("RANK", "0") == "0":
        print_metrics({split: run.metrics[split] for split in ("validation", "test") if split in run.metrics})
        if run.skipped:
            show(f"left out: {len(run.skipped)} images that can't be read; {run.folder / 'data.json'} lists them")
        show(f"model: {run.model_dir}")


def _cross_validate(recipe: Any, *, overwrite: bool) -> None:
    with quick_imports():
        from hfft.commands.cross_validate import cross_validate

    found = cross_validate(recipe, overwrite=overwrite)
    if os.environ.get("RANK", "0") == "0":
        rows = [
            (name.replace("_", " "), f"{v['value']:.4f}", between(v), f"{v['std']:.4f}")
            for name, v in found.metrics["test"].items()
        ]
        print_table((f"{len(found.runs)} folds", "all images", "95 % interval", "std over folds"), rows)
        show(f"runs: {found.folder}")


def _plan(arguments: argparse.Namespace) -> None:
    from hfft.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    with quick_imports():
        from hfft.commands.plan import plan_recipe

    images, plans = plan_recipe(recipe, processes=arguments.processes)
    if arguments.json:
        counts = {split: images.counts(split) for split in images.splits}
        show(
            json.dumps(
                {"splits": counts, "shards": images.shards, "phases": [dataclasses.asdict(plan) for plan in plans]}
            )
        )
        return
    splits = ", ".join(f"{len(rows):,} {split}" for split, rows in images.splits.items())
    many = ", any number of them in an image" if images.is_multi_label else ""
    show(f"{recipe.name}: {splits} images, {len(images.labels)} classes{many}: {', '.join(images.labels[:12])}")
    if images.columns:
        show(f"columns: {images.columns}")
    if images.shards and arguments.processes > 1:
        show(
            f"shards: {images.shards}; images are divided, not shards: each process reads its images from all of them"
        )
    for number, plan in enumerate(plans, start=1):
        _print_plan(plan, f"phase {number}/{len(plans)} {plan.phase}")


def _print_plan(plan: Any, title: str) -> None:
    show(f"\n{title}: trains {plan.trains}")
    show(f"  {plan.trainable:,} of {plan.total:,} parameters ({plan.trainable / plan.total:.2%})")
    epochs = "1 epoch" if plan.epochs == 1 else f"{plan.epochs:g} epochs"
    show(f"  {plan.steps_in_words}, {epochs}")
    if plan.processes > 1:
        least, most = plan.shares
        share = f"{least} to {most}" if most > least else f"{least}"
        show(f"  each process sees {share} of {plan.images:,} images per epoch")
    activations = ""
    if plan.activation_bytes is not None:
        activations = f" + about {plan.activation_bytes / 2**20:,.0f} of activations for {plan.device_batch} images"
    show(f"  memory in float32: {plan.state_bytes / 2**20:,.0f} MiB of weights, gradients and AdamW{activations}")
    rows = [
        (
            group.part,
            len(group.names),
            "auto" if group.learning_rate is None else f"{group.learning_rate:.3g}",
            f"{group.weight_decay:g}",
        )
        for group in plan.groups
    ]
    print_table(("part", "tensors", "learning rate", "weight decay"), rows)


def _check(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from hfft.commands.check_data import check_data
        from hfft.data.audit.findings import KINDS

    found = check_data(arguments.source, arguments.overrides)
    if arguments.json:
        show(json.dumps(found.to_dict()))
        return found.exit_code
    print_table(("split", "images", "classes", "smallest", "median", "largest"), found.summary())
    show()
    print_table(("class", *found.splits), found.class_counts())
    for kind, findings in found.by_kind().items():
        show(f"\n{kind} ({KINDS[kind][0]}): {KINDS[kind][1]}: {len(findings)}")
        shown = findings[: arguments.max_shown or None]
        print_table(("images", "what", "files"), [_finding_cells(finding) for finding in shown])
        if len(findings) > len(shown):
            show(f"and {len(findings) - len(shown)} more; --max-shown 0 shows all")
    show(f"\n{found.conclusion}")
    return found.exit_code


def _finding_cells(finding: Any) -> tuple[str, ...]:
    files = ", ".join(finding.files[:6]) + (", ..." if finding.count > 6 else "")
    return str(finding.count or ""), finding.detail, files

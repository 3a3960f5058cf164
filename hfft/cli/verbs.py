"""The verbs that make and look at runs: each calls its function of `hfft.commands`, and prints the result."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from hfft.cli.printing import (
    format_bounds,
    format_interval,
    in_words,
    is_main_process,
    print_json,
    print_line,
    print_metrics,
    print_table,
    values_of,
)
from hfft.errors import DataError, RecipeError, TrainingError
from hfft.system.lazy_imports import quick_imports


def run_train(arguments: argparse.Namespace) -> None:
    """Run a recipe, or its folds."""
    recipe, chosen = _recipe_of(arguments, overwrite=arguments.overwrite)
    if recipe.folds is not None:
        _cross_validate(recipe, overwrite=arguments.overwrite)
        return
    if recipe.hub.repo_id is not None and is_main_process():
        from hfft.hub.pushing import check_ahead

        check_ahead(recipe, overwrite=arguments.overwrite)  # before torch is imported
    with quick_imports():
        from hfft.commands.finetune import finetune

    run = finetune(chosen or recipe, overwrite=arguments.overwrite)
    if is_main_process():
        print_metrics({split: run.metrics[split] for split in ("validation", "test") if split in run.metrics})
        if run.skipped:
            skipped = f"{len(run.skipped)} images that can't be read"
            print_line(f"left out: {skipped}; {run.folder / 'data.json'} lists them")
        print_line(f"model: {run.model_dir}")


def _recipe_of(arguments: argparse.Namespace, *, overwrite: bool = False) -> tuple[Any, Any]:
    """The recipe of a file; or one for images, and how it was chosen."""
    from hfft.recipe.loading import is_recipe, load_recipe

    options = {key: value for key, value in values_of(arguments, "checkpoint", "minutes").items() if value is not None}
    if is_recipe(arguments.recipe):
        if options:
            raise RecipeError(f"--{next(iter(options))}: goes with images in the place of a recipe; leave it out")
        return load_recipe(arguments.recipe, arguments.overrides), None
    with quick_imports():
        from hfft.commands.automatic import choose_recipe

    chosen = choose_recipe(arguments.recipe, overrides=arguments.overrides, overwrite=overwrite, **options)
    return chosen.recipe, chosen


def _cross_validate(recipe: Any, *, overwrite: bool) -> None:
    with quick_imports():
        from hfft.commands.cross_validate import cross_validate

    found = cross_validate(recipe, overwrite=overwrite)
    if is_main_process():
        rows = [
            (in_words(name), f"{row['value']:.4f}", format_bounds(row), f"{row['std']:.4f}")
            for name, row in found.metrics["test"].items()
        ]
        print_table((f"{len(found.runs)} folds", "all images", "95 % interval", "std over folds"), rows)
        print_line(f"runs: {found.folder}")


def run_plan(arguments: argparse.Namespace) -> None:
    """Check a recipe, and print the plan of each phase."""
    recipe, chosen = _recipe_of(arguments)
    with quick_imports():
        from hfft.commands.plan import plan_recipe

    images, plans = plan_recipe(recipe, processes=arguments.processes)
    if arguments.json:
        counts = {split: images.counts(split) for split in images.splits}
        more = {} if chosen is None else {"recipe": chosen.text, "seconds": chosen.seconds}
        phases = [dataclasses.asdict(plan) for plan in plans]
        print_json(splits=counts, shards=images.shards, phases=phases, **more)
        return
    if chosen is not None:
        print_line(chosen.text)
        print_line(f"expected: {chosen.in_minutes}\n" if chosen.seconds else "this is the recipe of the run there\n")
    splits = ", ".join(f"{len(rows):,} {split}" for split, rows in images.splits.items())
    many = ", any number of them in an image" if images.is_multi_label else ""
    print_line(f"{recipe.name}: {splits} images, {len(images.labels)} classes{many}: {', '.join(images.labels[:12])}")
    if images.columns:
        print_line(f"columns: {images.columns}")
    if images.shards and arguments.processes > 1:
        print_line(f"shards: {images.shards}; each process reads its images from all of them")
    for number, one in enumerate(plans, start=1):
        _print_plan(one, f"phase {number}/{len(plans)} {one.phase}")


def _print_plan(plan: Any, title: str) -> None:
    print_line(f"\n{title}: trains {plan.trains}")
    print_line(f"  {plan.trainable:,} of {plan.total:,} parameters ({plan.trainable / plan.total:.2%})")
    epochs = ", 1 epoch" if plan.epochs == 1 else f", {plan.epochs:g} epochs"
    print_line(f"  {plan.steps_in_words}{epochs if plan.groups else ''}")
    if plan.processes > 1:
        least, most = plan.shares
        share = f"{least} to {most}" if most > least else f"{least}"
        print_line(f"  each process sees {share} of {plan.images:,} images per epoch")
    activations = ""
    if plan.activation_bytes is not None:
        activations = f" + about {plan.activation_bytes / 2**20:,.0f} of activations for {plan.device_batch} images"
    state = f"{plan.state_bytes / 2**20:,.0f} MiB of weights, gradients and AdamW"
    print_line(f"  memory in float32: {state}{activations}")
    rows = [
        (group.part, len(group.names), f"{group.learning_rate:.3g}", f"{group.weight_decay:g}")
        for group in plan.groups
    ]
    if rows:
        print_table(("part", "tensors", "learning rate", "weight decay"), rows)


def run_check_data(arguments: argparse.Namespace) -> int:
    """Look at the images, and print what is wrong with them."""
    with quick_imports():
        from hfft.commands.check_data import check_data
        from hfft.data.audit.findings import KINDS

    found = check_data(arguments.source, arguments.overrides)
    if arguments.json:
        print_json(**found.to_dict())
        return found.exit_code
    print_table(("split", "images", "classes", "smallest", "median", "largest"), found.summary())
    print_line()
    print_table(("class", *found.splits), found.class_counts())
    for kind, findings in found.by_kind().items():
        print_line(f"\n{kind} ({KINDS[kind][0]}): {KINDS[kind][1]}: {len(findings)}")
        shown = findings[: arguments.max_shown or None]
        rows = [
            (one.count or "", one.detail, ", ".join(one.files[:6]) + (", ..." if one.count > 6 else ""))
            for one in shown
        ]
        print_table(("images", "what", "files"), rows)
        if len(findings) > len(shown):
            print_line(f"and {len(findings) - len(shown)} more; --max-shown 0 shows all")
    print_line(f"\n{found.conclusion}")
    return found.exit_code


def run_find_lr(arguments: argparse.Namespace) -> None:
    """Try rising learning rates in a phase of a recipe."""
    from hfft.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    with quick_imports():
        from hfft.commands.find_lr import find_lr
        from hfft.inference.outputs import check_output_file

    if arguments.figure is not None:
        check_output_file(arguments.figure, "--figure", (".png", ".svg", ".pdf"))
    found = find_lr(recipe, phase=arguments.phase, steps=arguments.steps)
    if arguments.figure is not None:
        from hfft.report.figures import write_range_curve

        write_range_curve(found, arguments.figure)
    if arguments.json:
        print_json(**dataclasses.asdict(found))
    elif found.suggestion is None:
        print_line(
            f"phase {found.phase}: the loss falls at no rate by more than its noise; as it may behind a head that"
        )
        print_line("is trained well: try more --steps, or compare rates on validation images with hfft sweep")
    else:
        print_line(f"phase {found.phase}: set learning_rate: {found.suggestion:.1e}, where the loss falls fastest")
        print_line(f"the loss is lowest at {found.lowest_loss_at:.1e}; rates near that are too high to train with")


def run_choose(arguments: argparse.Namespace) -> None:
    """Compare checkpoints on some images."""
    overrides = [word for word in arguments.words if "=" in word and not Path(word).exists()]
    checkpoints = [word for word in arguments.words if word not in overrides]
    if not checkpoints:
        raise DataError(f"{arguments.source}: no checkpoint to compare; name folders or Hub ids behind it")
    with quick_imports():
        from hfft.commands.choose import choose
        from hfft.inference.outputs import check_output_file, write_output_file

    if arguments.output is not None:
        check_output_file(arguments.output)
    found = choose(arguments.source, checkpoints, overrides, trust_remote_code=arguments.trust_remote_code)
    if not is_main_process():
        return
    if arguments.output is not None:
        text = json.dumps(found.to_dict(), indent=2) + "\n"
        write_output_file(arguments.output, lambda path: path.write_text(text, encoding="utf-8"))
    if arguments.json:
        print_json(**found.to_dict())
        return
    works = [one for one in found.candidates if not one.problem]
    names = list(works[0].probe)[:2]
    header = (
        *("checkpoint", *map(in_words, names), "worse than the best by", f"{in_words(found.metric)} of neighbours"),
        *("images/s here", "parameters", "image size", "licence"),
    )
    rows = []
    for one in works:
        gap = "-" if one.difference is None else f"{one.difference['value']:.4f} ({format_bounds(one.difference)})"
        scores = (
            *(format_interval(one.probe[name]) for name in names),
            gap,
            format_interval(one.neighbours[found.metric]),
        )
        size = " x ".join(map(str, one.image_size))
        rows.append(
            (one.checkpoint, *scores, f"{one.images_per_second:,.0f}", f"{one.parameters:,}", size, one.license)
        )
    print_table(header, rows)
    print_line(f"measured on {found.images['validation']:,} validation images, with 95 % intervals")
    for one in found.candidates[len(works) :]:
        print_line(f"not measured: {one.checkpoint}: {one.problem}")


def run_report(arguments: argparse.Namespace) -> None:
    """Render card, page and figures of a finished run anew."""
    with quick_imports():
        from hfft.commands.report import report_run

    for path in report_run(arguments.folder, trust_remote_code=arguments.trust_remote_code):
        print_line(str(path))


def run_push(arguments: argparse.Namespace) -> None:
    """Send a run to the Hub."""
    from hfft.hub.pushing import push

    asked = ("what", "private", "revision", "create_pr", "commit_message", "base_model", "trust_remote_code")
    pushed = push(arguments.run_folder, arguments.repo_id, **values_of(arguments, *asked))
    if arguments.json:
        print_json(**dataclasses.asdict(pushed))
    else:
        print_line(pushed.in_words)


def run_sweep(arguments: argparse.Namespace) -> None:
    """Run a recipe with each combination of some values, and compare the runs."""
    _check_html(arguments.html)
    with quick_imports():
        from hfft.commands.sweep import plan_sweep, sweep

    found = sweep(plan_sweep(arguments.recipe, arguments.values))
    if len(found.finished) > 1:
        from hfft.commands.compare import compare

        _show_comparison(compare(found.finished), arguments.html)
    elif arguments.html is not None:
        print_line(f"no page: {len(found.finished)} of the runs finished, and there is nothing to compare")
    if found.failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in found.failed.items())
        total = len(found.failed) + len(found.finished)
        raise TrainingError(
            f"{len(found.failed)} of {total} runs failed; the same command tries them again:\n{reasons}"
        )


def run_compare(arguments: argparse.Namespace) -> None:
    """Compare finished runs."""
    _check_html(arguments.html)
    from hfft.commands.compare import compare

    found = compare(arguments.runs, split=arguments.split)
    _show_comparison(found, arguments.html, as_json=arguments.json)


def _check_html(file: Path | None) -> None:
    if file is not None:
        from hfft.inference.outputs import check_output_file

        check_output_file(file, "--html", (".html", ".htm"))


def _show_comparison(found: Any, html: Path | None, *, as_json: bool = False) -> None:
    content = dataclasses.asdict(found)
    if html is not None:
        with quick_imports():
            from hfft.report.page import write_comparison

        write_comparison(content, html)
    if as_json:
        print_json(**content)
        return
    names = list(dict.fromkeys(name for row in found.rows for name in row.metrics))
    header = (f"{found.split} of", "images", *map(in_words, names), "model of", "trainable", "seconds")
    rows = [
        (
            *(row.run, row.images),
            *(format_interval(row.metrics[name]) if name in row.metrics else "-" for name in names),
            *(row.phase, f"{row.trainable:,}", row.seconds),
        )
        for row in found.rows
    ]
    print_table(header, rows)
    if found.pair is not None:
        _print_pair(found.pair)
    for note in found.notes:
        print_line(f"note: {note}")
    if html is not None:
        print_line(f"page: {html}")


def _print_pair(pair: Any) -> None:
    print_line(f"\n{pair.second} minus {pair.first}, on the {pair.images:,} images of both:")
    rows = [
        (in_words(name), f"{row['value']:+.4f}", f"({format_bounds(row, '+')})")
        for name, row in pair.differences.items()
    ]
    print_table(("metric", "difference", "95 % interval"), rows)
    test = pair.mcnemar
    print_line(
        f"right on {test.only_second} images where {pair.first} is wrong, wrong on {test.only_first} where it is "
        f"right: McNemar's exact p = {test.p_value:.3g}"
    )

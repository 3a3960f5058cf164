"""Damaged recipes and tables through the planner: planned or refused with a reason, soon and in little memory.

    python scripts/fuzz_recipes.py --recipes 2000 --tables 2000

Nothing but an HfftError may come out, none may take longer than 20 seconds, and the process may not grow by more than
2 GiB. Mutants are functions of their number: `--only 1234` (of the recipes, or with `--tables 1` of the tables) shows
one with what becomes of it.
"""

import argparse
import copy
import io
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from hfft.commands.plan import plan_recipe
from hfft.errors import HfftError
from hfft.recipe.loading import load_recipe

_LONGEST = 20  # seconds
_MORE = 2 * 2**30  # bytes
_HERE = Path(__file__).parents[1]
_TREE = {
    "name": "fuzz",
    "model": {"checkpoint": "CHECKPOINT", "image_size": 32, "head": "zero"},
    "data": {
        "source": "SOURCE",
        "splits": {"train": "train", "validation": 0.2, "test": 0.2},
        "augment": {"crop": [0.6, 1.0], "flip": True, "mixup": 0.1},
        "fit": "letterbox",
        "background": [255, 0, 0],
    },
    "training": {"per_device_train_batch_size": 4, "weight_decay": 0.05, "lr_scheduler_type": "cosine"},
    "class_weights": "balanced",
    "loss": {"name": "focal", "gamma": 1.5},
    "phases": [
        {"name": "head", "unfreeze": "head", "num_train_epochs": 2, "learning_rate": 1e-3},
        {"name": "last", "unfreeze": {"blocks": 2}, "layer_decay": 0.75, "early_stopping": 2, "learning_rate": 1e-4},
        {"name": "more", "gradual": {"blocks_per_phase": 2}, "warmup_steps": 0.1},
        {"name": "lora", "adapter": {"method": "lora", "on": "attention", "r": 4}, "learning_rate": 1e-3},
    ],
    "hub": {"repo_id": None},
    "retain": {"measure": True, "interpolate": None},
    "replay": {"mode": "auto", "views": "auto", "budget": "1GB"},
    "seed": 3,
    "output_dir": "runs",
}
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**9, 10**18, 10**400, -(10**30), 1e-320, 1e308, float("nan"), float("inf")),
    *("", " ", "\n", "none", "auto", "null", "1e400", "0x10", "2026-11-25", "12:30:45", "~", "=", "<<", "nowhere/"),
    *("a/b", "{0}${HOME}", "%s", "!!python/none", "a\tb", "x" * 100_000, "../" * 300 + "nowhere", {"name": "head"}),
    *("é", "\u202e", "\U0001f41c", "\ud7ff"),
    *([], {}, [[]], [{}], {"": {}}, [None] * 10, list(range(10_000)), {str(k): k for k in range(1000)}),
)
_KEYS = ("", "name", "nam", "é", "learning_rate", "None", "true", "1", "a.b", "x" * 5000, "token", "phases", "seed")
_LINES = (
    *("<<: *missing", "a: &a [*a]", "a: &a {b: *a}", "- a", "? [a, b]\n: c", "%YAML 9.9", "---", "...", "\t- a"),
    *("a: !!python/object/apply:os.system [true]", "a: !!binary =", "a: !!timestamp x", "a: !!set {b}"),
    *("a: !!int x", "a: !!float x", "name: twice", "a: 1e999999", "a: 0o9", "a: " + "9" * 6000),
    *('"', "'", "|", ">-", "{", "[", "a: [", "\ufeff", "\x00", "\x85", "? ", ": "),
    *("[" * 3000, "{a: " * 500, "- " * 2000),
    "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "\n".join(f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 10)}]" for k in range(9)),
)


class _Hung(BaseException):
    """Took too long; no Exception, so that nothing catches it on its way."""


def make_workplace(folder: Path) -> None:
    """A tiny checkpoint, some photos and a table of them."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")


def whole_recipes(folder: Path) -> list[dict[str, Any]]:
    """Valid recipes on the workplace's data: one with much in it, and those of the repository."""
    found = [_TREE, *(YAML(typ="safe").load(path.read_text()) for path in sorted(_HERE.glob("recipes/*.yaml")))]
    for recipe in found:
        recipe["model"]["checkpoint"], recipe["data"]["source"] = str(folder / "vit"), str(folder / "photos")
    return found


def mutant_recipe(number: int, whole: list[dict[str, Any]]) -> str:
    """The text of a damaged recipe: values, keys and nesting changed, then perhaps lines, letters and anchors."""
    rng = np.random.default_rng([11, number])
    tree = copy.deepcopy(whole[rng.integers(len(whole))])
    for _ in range(rng.integers(0, 4)):
        _change_tree(tree, rng)
    stream = io.StringIO()
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.width = 10**6
        yaml.dump(tree, stream)
        text = stream.getvalue()
    except Exception:  # the writer has limits of its own
        text = json.dumps(tree)
    for _ in range(rng.integers(0, 3)):
        text = _change_text(text, rng)
    return text


def _change_tree(tree: Any, rng: np.random.Generator) -> None:
    places = list(_places(tree))
    node, key = places[rng.integers(len(places))]
    match rng.integers(7):
        case 0 | 1 | 2:
            node[key] = copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])
        case 3:
            del node[key]
        case 4 if isinstance(node, dict):
            node[_KEYS[rng.integers(len(_KEYS))]] = node.pop(key)
        case 5:
            node[key] = [node[key]] if rng.random() < 0.5 else {"name": node[key]}
        case _:
            other, place = places[rng.integers(len(places))]
            node[key] = copy.deepcopy(other[place])


def _places(node: Any) -> Any:
    for key in list(node if isinstance(node, dict) else range(len(node))):
        yield node, key
        if isinstance(node[key], dict | list) and len(node[key]) < 50:
            yield from _places(node[key])


def _change_text(text: str, rng: np.random.Generator) -> str:
    lines = text.split("\n")
    place = int(rng.integers(len(lines)))
    match rng.integers(6):
        case 0 | 1:
            lines.insert(place, _LINES[rng.integers(len(_LINES))])
        case 2:
            lines.insert(place, lines[rng.integers(len(lines))])
        case 3:
            lines[place] = " " * int(rng.integers(1, 9)) + lines[place]
        case 4:
            return text[: int(rng.integers(len(text) + 1))]
        case _:
            letter = chr(int(rng.choice([0, 9, 34, 38, 42, 58, 91, 123, 0x85, 0xE9, 0x2028, 0xFEFF, 0x1F41C])))
            spot = int(rng.integers(len(text) + 1))
            return text[:spot] + letter + text[spot:]
    return "\n".join(lines)


def whole_tables(folder: Path) -> list[tuple[str, bytes]]:
    """Valid tables of the workplace's photos, with their endings."""
    rows = [
        {"file": f"photos/{name}/{number}.png", "label": name, "split": ("test", "train")[number > 2], "w": number}
        for name in ("ant", "bee", "cat")
        for number in range(12)
    ]
    shares = [{"image": row["file"], "a": 0.25, "b": 0.75} for row in rows]

    def separated(table: list[dict[str, Any]], sign: str) -> bytes:
        return "\n".join([sign.join(table[0]), *(sign.join(map(str, row.values())) for row in table)]).encode()

    return [
        *((".csv", separated(table, ",")) for table in (rows, shares)),
        (".tsv", separated(rows, "\t")),
        *((".jsonl", "\n".join(map(json.dumps, table)).encode()) for table in (rows, shares)),
    ]


def mutant_table(number: int, whole: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """The ending and content of a damaged table."""
    rng = np.random.default_rng([13, number])
    ending, content = whole[rng.integers(len(whole))]
    pieces = (
        *(b'"', b",", b"\t", b"\n", b"\r\n", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b"\\"),
        *(b"\\u", b"\x85", b"nan", b"null", b"1e999", b"-1", b"../", b"/", b"label", b"image", b"file", b""),
        *(b"9" * 5000, b"x" * 200_000, b"/dev/zero", b"http://x/a.png", "é\U0001f41c\u202e".encode()),
        *(b'{"a":' * 2000, b"[" * 5000, b"\n" * 1000, b",," * 500),
    )
    for _ in range(rng.integers(1, 4)):
        piece = pieces[rng.integers(len(pieces))]
        place = int(rng.integers(len(content) + 1))
        lines = content.split(b"\n")
        line = int(rng.integers(len(lines)))
        match rng.integers(7):
            case 0 | 1:
                content = content[:place] + piece + content[place:]
            case 2:
                content = content[:place] + content[place + int(rng.integers(1, 60)) :]
            case 3:
                content = content[:place]
            case 4:
                lines[line] = piece
                content = b"\n".join(lines)
            case 5:
                content = content.replace(lines[line][:8] or b"a", piece, int(rng.integers(1, 50)))
            case _:
                content = content.replace(b"photos", piece) if rng.random() < 0.3 else b"\n".join(lines[line:])
    return ending, content


def judge_recipe(text: str, folder: Path) -> str:
    """`planned`, or `refused` with an HfftError."""
    path = folder / "mutant.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return _judge(lambda: plan_recipe(load_recipe(path)))


def judge_table(ending: str, content: bytes, folder: Path) -> str:
    """Likewise, of a table as the source of a recipe."""
    path = folder / f"mutant{ending}"
    path.write_bytes(content)
    recipe = {
        "name": "fuzz",
        "model": {"checkpoint": str(folder / "vit")},
        "data": {"source": str(path)},
        "phases": [{"name": "head"}],
    }
    try:
        return _judge(lambda: plan_recipe(load_recipe(recipe)))
    finally:
        path.unlink()


def _judge(plan: Callable[[], Any]) -> str:
    try:
        plan()
    except HfftError as error:
        return "refused" if str(error).strip() else "refused without a reason"
    return "planned"


def fuzz(numbers: range, judge: Callable[[int], str]) -> tuple[Counter[str], list[str]]:
    """Judge mutants, each with a limit of time; memory is limited for all of them."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    def end(*_: Any) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, end)
    for number in numbers:
        signal.alarm(_LONGEST)
        try:
            counts[judge(number)] += 1
        except _Hung:
            signal.alarm(0)
            wrong.append(f"mutant {number}: more than {_LONGEST} s")
        except BaseException as error:  # that is what is looked for
            signal.alarm(0)
            at = traceback.extract_tb(error.__traceback__)[-1]
            words = str(error).strip().partition("\n")[0][:200]
            wrong.append(f"mutant {number}: {type(error).__name__}: {words} ({Path(at.filename).name}:{at.lineno})")
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return counts, wrong


def run(recipes: range, tables: range) -> list[str]:
    """Judge mutants of both kinds in a folder of their own; prints their fates, and returns what went wrong."""
    wrong: list[str] = []
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        make_workplace(folder)
        texts, contents = whole_recipes(folder), whole_tables(folder)
        kinds: dict[str, tuple[range, Callable[[int], str]]] = {
            "recipes": (recipes, lambda n: judge_recipe(mutant_recipe(n, texts), folder)),
            "tables": (tables, lambda n: judge_table(*mutant_table(n, contents), folder)),
        }
        for kind, (numbers, judge) in kinds.items():
            begun = time.monotonic()
            counts, found = fuzz(numbers, judge)
            taken = time.monotonic() - begun
            print(f"{kind} {numbers.start} to {numbers.stop - 1}: {dict(counts)} in {taken:.0f} s, {len(found)} wrong")
            wrong += [f"{kind}: {line}" for line in found]
    logging.disable(logging.NOTSET)
    return wrong


def _limit_memory() -> None:
    """Let the process grow by so much, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + _MORE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _show(number: int, *, is_table: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workplace(folder)
        if is_table:
            ending, content = mutant_table(number, whole_tables(folder))
            print(ending, content[:4000])
            print(judge_table(ending, content, folder))
        else:
            text = mutant_recipe(number, whole_recipes(folder))
            print(text[:4000])
            print(judge_recipe(text, folder))


def main() -> int:
    """Run from the command line; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, default=0)
    parser.add_argument("--tables", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="show this mutant alone")
    arguments = parser.parse_args()
    if sys.platform == "linux":
        _limit_memory()
    if arguments.only is not None:
        _show(arguments.only, is_table=arguments.tables > 0)
        return 0
    first = arguments.first
    wrong = run(range(first, first + arguments.recipes), range(first, first + arguments.tables))
    for line in wrong:
        print(f"wrong: {line}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"most memory: {peak:.2f} GiB")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""Types of the recipe's values: names, paths, sizes, ranges, and what is allowed of each."""

import os
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hfft.errors import nearest
from hfft.system.files import expanded

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FIRST = re.compile(r"first [1-9]\d*")
_REPO_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"  # neither the Hub nor its client take others
_REPO_ID = re.compile(rf"(?!.*(--|\.\.))(?!.*\.git$)(?:{_REPO_WORD}/)?{_REPO_WORD}")
_REPO_LENGTH = 96  # characters of the name

# As the Hub's check of a card's metadata names them (huggingface_hub, issue 4218, May 2026); it refuses others.
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = tuple(_LICENSES.split())
_UNFREEZE_WORDS = ("head", "norm", "bias", "all")
_UNFREEZE_COUNTS = ("blocks", "stages", "layers")
_COLORS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Fold:
    """One of several parts of train, of equal size: number `fold`, from 0, of `of`. Each image is in one of them."""

    fold: int
    of: int


def _checked(value_of: Callable[[Any], Any], allowed: str) -> Callable[[Any], Any]:
    """A validator: the value that `value_of` makes of what is written, or an error where it makes None of it."""

    def check(written: Any) -> Any:
        value = value_of(written)
        if value is None:
            raise ValueError(allowed)
        return value

    return check


def _unfreeze(value: Any) -> Any:
    if isinstance(value, str) and value in _UNFREEZE_WORDS:
        return value
    if not (isinstance(value, dict) and len(value) == 1):
        return None
    ((word, amount),) = value.items()
    if word in _UNFREEZE_COUNTS and type(amount) is int and amount > 0:
        return value
    if word == "blocks" and isinstance(amount, str) and _FIRST.fullmatch(amount):
        return value
    if word == "parts" and isinstance(amount, list | tuple) and amount and all(isinstance(one, str) for one in amount):
        return {word: tuple(amount)}
    return None


def _average(value: Any) -> Any:
    if not (isinstance(value, dict) and len(value) == 1):
        return None
    ((kind, amount),) = value.items()
    is_mean = kind in ("last", "best", "soup") and type(amount) is int and amount > 1
    return value if is_mean or (kind == "ema" and type(amount) is float and 0 < amount < 1) else None


def _split(value: Any) -> Any:
    if isinstance(value, Fold) or (isinstance(value, str) and value) or (isinstance(value, float) and 0 < value < 1):
        return value
    if isinstance(value, dict) and set(value) == {"fold", "of"}:
        fold, of = value["fold"], value["of"]
        is_one = type(fold) is int and type(of) is int and 0 <= fold < of and of > 1
        return Fold(fold=fold, of=of) if is_one else None
    return None


def _crop(value: Any) -> Any:
    is_pair = isinstance(value, list | tuple) and [type(bound) in (int, float) for bound in value] == [True, True]
    return tuple(value) if is_pair and 0 < value[0] <= value[1] <= 1 else None


def _color(value: Any) -> Any:
    if isinstance(value, str):
        return _COLORS.get(value)
    is_color = isinstance(value, list | tuple) and len(value) == 3
    return tuple(value) if is_color and all(type(part) is int and 0 <= part <= 255 for part in value) else None


def _size(value: str) -> Any:
    try:
        TypeAdapter(ByteSize).validate_python(value)
    except ValidationError:
        return None
    return value


def _repo_id(value: str) -> Any:
    return value if _REPO_ID.fullmatch(value) and len(value.rpartition("/")[2]) <= _REPO_LENGTH else None


def _check_license(value: str) -> str:
    name = value.lower()  # as the Hub has them
    if name not in LICENSES:
        meant = nearest(name, LICENSES)
        like = f"did you mean {meant!r}?" if meant else "for example apache-2.0 or cc-by-4.0"
        raise ValueError(
            "allowed: an identifier of https://huggingface.co/docs/hub/repositories-licenses, as the Hub refuses "
            f"others, or 'other'; {like}"
        )
    return name


def _check_path(value: str) -> str:
    found = expanded(value)
    first = found.split("/")[0]
    if found.startswith("~") and not os.path.lexists(first):
        raise ValueError(f"allowed: a path; there is no user for {first}, and a folder of that name is ./{first}")
    return found


_NAMES = "allowed are letters, digits, '-' and '_', starting with a letter or digit"
_REPO_IDS = (
    "allowed: name or owner/name, of letters, digits, '-', '_' and '.', without '--' and '..', not beginning or "
    f"ending with '-' or '.', the name of {_REPO_LENGTH} characters at most"
)
_SIZES = "allowed: a number of bytes with its unit, for example 20GB or 500MiB"
_UNFREEZES = (
    f"allowed: {', '.join(_UNFREEZE_WORDS)}, {', '.join(f'{{{word}: N}}' for word in _UNFREEZE_COUNTS)}, "
    "{blocks: first N} or {parts: [stem, block 0, norm, head, ...]}"
)
_AVERAGES = "allowed: {ema: D} with D between 0 and 1, or {last: K}, {best: K} or {soup: K} with K above 1"
_SPLITS = (
    "allowed: the name of a split of the source, a fraction between 0 and 1 carved from train, or {fold: I, of: N} "
    "with I from 0 to N - 1"
)
_CROPS = "allowed: [smallest, largest] share of the image's area, with 0 < smallest <= largest <= 1"
_COLOR_WORDS = f"allowed: {', '.join(_COLORS)}, or [red, green, blue] from 0 to 255"
Name = Annotated[str, AfterValidator(_checked(lambda value: value if _NAME.fullmatch(value) else None, _NAMES))]
UserPath = Annotated[str, AfterValidator(_check_path)]
License = Annotated[str, AfterValidator(_check_license)]
RepoId = Annotated[str, AfterValidator(_checked(_repo_id, _REPO_IDS))]
Size = Annotated[str, AfterValidator(_checked(_size, _SIZES))]
Unfreeze = Annotated[str | dict[str, int | str | tuple[str, ...]], BeforeValidator(_checked(_unfreeze, _UNFREEZES))]
Average = Annotated[dict[str, int | float], BeforeValidator(_checked(_average, _AVERAGES))]
Split = Annotated[str | float | Fold, BeforeValidator(_checked(_split, _SPLITS))]
Crop = Annotated[tuple[float, float], BeforeValidator(_checked(_crop, _CROPS))]
Color = Annotated[tuple[int, int, int], BeforeValidator(_checked(_color, _COLOR_WORDS))]
Fraction = Annotated[float, Field(ge=0, lt=1)]

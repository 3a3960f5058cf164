"""Values of a label column, of any type and spelling -> one name for each class; what is no label is no class."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Value

from hfft.system.distributed import inform, warn
from hfft.system.text import path_text, printable

_AROUND = r"[\s\u200b\u2060\ufeff]+"  # spaces, and characters without width that tables have at their ends
_ENDS = re.compile(f"^{_AROUND}|{_AROUND}$")
_WHOLE = re.compile(r"(-?[0-9]+)\.0+")  # a whole number as a float is written
_FLAGS = {"false": "0", "true": "1"}
# How programs write that there is no value; any of them may be the name of a class.
_NOTHING = frozenset(
    (
        *("NA", "N/A", "n/a", "na", "NaN", "nan", "-nan", "NAN", "NaT", "<NA>", "#N/A"),
        *("NULL", "Null", "null", "None", "NONE", "-", "--", "?"),
    )
)


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds text, in any of Arrow's ways to keep it."""
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string", "string_view")


def label_text(value: Any) -> str | None:
    """A label of any type as text on one line, without spaces around it; None for nothing, NaN and blanks."""
    if value is None or value != value:
        return None
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    return printable(_ENDS.sub("", text)) or None


def label_texts(values: Sequence[Any], files: Sequence[str], where: str) -> list[str | None]:
    """The label of each row as `label_text` has it; says so where texts lost spaces.

    Args:
        values: Of one type.
        files: Names of the rows.
        where: Names the source.
    """
    known = {value: label_text(value) for value in set(values)}
    texts = [known[value] for value in values]
    changed = {value for value, text in known.items() if isinstance(value, str) and text not in (None, value)}
    if changed:
        rows = [row for row, value in enumerate(values) if value in changed]
        first = rows[0]
        inform(
            f"{where}: {len(rows)} of {len(values)} labels are taken without spaces around them and control "
            f"characters, the first is that of {files[first]}: {values[first]!r} as {texts[first]!r}"
        )
    return texts


def same_class(name: str) -> str:
    """The common spelling of names that mean one class: Unicode's composed form; 0 for 0.0 and false, 1 for true."""
    text = unicodedata.normalize("NFC", name)
    whole = _WHOLE.fullmatch(text)
    text = whole[1] if whole else text
    return _FLAGS.get(text.lower(), "0" if text == "-0" else text)


def class_spellings(found: Iterable[str], declared: Sequence[str], where: str) -> dict[str, str]:
    """Each spelling that occurs -> the name of its class, which is one of them; classes are in their order.

    Args:
        found: Labels as `label_text` has them.
        declared: Names that a data set declares, which come first, in their order.
        where: Names the source in warnings.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys([*declared, *sorted(set(found), key=natural)]):
        groups.setdefault(same_class(name), []).append(name)
    chosen = {common: common if common in names else names[0] for common, names in groups.items()}
    several = [(chosen[common], names) for common, names in groups.items() if len(names) > 1]
    for name, names in several:
        shown = ", ".join(
            map(ascii if len({unicodedata.normalize("NFC", one) for one in names}) == 1 else repr, names)
        )
        warn(f"{where}: {shown} are taken for one class, {name!r}; write it one way")
    return {name: chosen[common] for common, names in groups.items() for name in names}


def folder_classes(folders: Iterable[str], where: str) -> dict[str, str | None]:
    """The class of each class folder, by the folder's name; None for a blank name."""
    names = sorted(set(folders))
    values = list(map(path_text, names))
    texts = dict(zip(names, label_texts(values, list(map(printable, values)), where), strict=True))
    spellings = class_spellings((text for text in texts.values() if text is not None), (), where)
    return {name: None if text is None else spellings[text] for name, text in texts.items()}


def known_as(names: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    """Names that an existing model has, too, perhaps in another spelling -> the model's name."""
    spelled = {same_class(label_text(name) or name): name for name in reversed(known)} | {name: name for name in known}
    found = {name: spelled.get(name, spelled.get(same_class(name))) for name in names}
    return {name: other for name, other in found.items() if other is not None}


def alike_classes(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in case, marks between words, width or invisible characters alone, in groups."""
    groups: dict[str, list[str]] = {}
    for name in names:
        seen = (one for one in unicodedata.normalize("NFKC", name).casefold() if unicodedata.category(one) != "Cf")
        groups.setdefault(" ".join(re.split(r"[\s_-]+", "".join(seen))), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def warn_of_nothing(found: Iterable[str], declared: Sequence[str], where: str) -> None:
    """Once, if a table that declares no such class holds words for a missing value."""
    odd = sorted((_NOTHING & set(found)).difference(declared))
    if odd:
        warn(
            f"{where}: {', '.join(map(repr, odd))} is taken for the name of a class; where it means that there is no "
            "label, leave the field empty"
        )


def warn_of_alike(names: Sequence[str], where: str) -> None:
    """Once, if any classes are called almost alike."""
    alike = alike_classes(names)
    if alike:
        shown = "; ".join(" and ".join(map(repr, group)) for group in alike[:5])
        more = f"; and {len(alike) - 5} more" if len(alike) > 5 else ""
        warn(f"{where}: classes are called almost alike: {shown}{more}; rename them if they are one")


def is_number(text: str) -> bool:
    """Whether a text is a number of any kind."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def natural(text: str) -> tuple[int, int, str]:
    """A key that sorts numbers by their value, in front of all other texts."""
    is_whole = text.isdecimal() and len(text) < 1000  # Python reads no longer ones
    return (0, int(text), text) if is_whole else (1, 0, text)

"""Which files of a run go to the Hub, and as what; reads the run folder and changes nothing there."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

from hfft.errors import HubError
from hfft.recipe.loading import RECIPE, dump_recipe
from hfft.recipe.spec import HubSpec, Recipe
from hfft.runs.locating import adapter_base
from hfft.runs.record import (
    ADAPTER,
    ADAPTER_CONFIG,
    CARD,
    EXAMPLES,
    EXPORT,
    FIGURES,
    FIRST_BATCH,
    METRICS,
    MODEL,
    RunRecord,
)
from hfft.system.files import read_json

_PLACE = "this/folder"  # where a card's example has the name of the model
_SENT = (".json", ".safetensors", ".md", ".txt", ".py", ".yaml", ".png", ".jpg", ".jpeg", ".svg", ".webp")
_SENT_NAMES = ("LICENSE", "NOTICE")
_TEXTS = (".json", ".md", ".yaml", ".txt", ".py", ".svg")
_EXAMPLE = re.compile(r"```python\n(?:(?!```).)*pipeline\((?:(?!```).)*this/folder(?:(?!```).)*```", re.DOTALL)
_ADAPTER_EXAMPLE = """```python
import hfft

classify = hfft.Classifier.from_pretrained("this/folder"{trust})  # loads `{base}` too
classify(["image.jpg"])
```"""

_LOG = logging.getLogger(__name__)  # not accelerate's, which imports torch; one process alone pushes


@dataclass(frozen=True)
class File:
    """One file of a commit: its path in the repository, and where it is, or its content."""

    path: str
    source: Path | bytes

    @cached_property
    def sha256(self) -> str:
        """Hash of the content as it was when first asked for, in hexadecimal digits."""
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else hash_file(self.source)


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def parts(recipe: Recipe, what: str | None) -> dict[str, str]:
    """Folders of the run that are pushed -> their folders in the repository; `.` is its root."""
    adapter = recipe.phases[-1].adapter
    there = [MODEL] if adapter is None else [MODEL, ADAPTER] if adapter.merge else [ADAPTER]
    asked = there[:1] if what is None else [MODEL, ADAPTER] if what == "both" else [what]
    missing = [name for name in asked if name not in there]
    if missing:
        raise HubError(
            f"what: found {what}, but this run ends with {' and '.join(there)} and no {missing[0]}; allowed: "
            f"{', '.join(there if len(there) == 1 else [*there, 'both'])}"
        )
    return {name: "." if len(asked) == 1 or name == MODEL else ADAPTER for name in asked}


def check_base(recipe: Recipe, spec: HubSpec) -> None:
    """Refuse, before anything is trained, to push an adapter on weights that are on this disk alone."""
    if ADAPTER not in parts(recipe, spec.what) or spec.base_model is not None:
        return
    checkpoint = recipe.model.checkpoint
    if Path(checkpoint).is_dir():
        raise _no_base(f"the folder {checkpoint}")
    if any(phase.adapter is not None or phase.unfreeze != "head" for phase in recipe.phases[:-1]):
        raise _no_base("the weights that the phases before it trained")


def shared_config(adapter: Path, base_model: str | None) -> bytes:
    """The config of a finished run's adapter, with a base that others can open; a HubError where there is none."""
    content = read_json(adapter / ADAPTER_CONFIG)
    base, _ = adapter_base(adapter)
    if base_model is not None:
        content |= {"base_model_name_or_path": base_model, "revision": None}
    elif Path(base).is_absolute() or Path(base).is_dir():
        raise _no_base(base)
    return json.dumps(content, indent=2).encode()


def _no_base(sits_on: str) -> HubError:
    return HubError(
        f"the adapter sits on {sits_on}, which nobody else can open: push the model (--what model, hub.what), or push "
        "those weights first and name them (--base-model, hub.base_model)"
    )


def collect(
    run: Path,
    recipe: Recipe,
    spec: HubSpec,
    repo_id: str,
    shared: Recipe,
    *,
    folders: Mapping[str, str] | None = None,
) -> list[File]:
    """The files of the commit of a finished run.

    `shared` is the recipe as others may see it, and `folders` as from `parts`, which it comes from when None.
    """
    folders = parts(recipe, spec.what) if folders is None else folders
    files: dict[str, Path | bytes] = {}
    for name, place in folders.items():
        if not (run / name).is_dir():
            reason = RunRecord(run).metrics.get("kept", {}).get("reason", "it isn't there")
            raise HubError(f"what: {spec.what or name}: {run} has no {name}/ ({reason}); allowed: model")
        files |= {(PurePath(place) / path).as_posix(): source for path, source in _sendable(run / name).items()}
    place = folders.get(ADAPTER, ".")
    if ADAPTER in folders:
        files[(PurePath(place) / ADAPTER_CONFIG).as_posix()] = shared_config(run / ADAPTER, spec.base_model)
    card = next((run / name / CARD for name in (MODEL, ADAPTER) if (run / name / CARD).is_file()), None)
    shown = [run / FIGURES]
    if card is not None:
        base = spec.base_model or recipe.model.checkpoint if {ADAPTER} == set(folders) else None
        files.pop(f"{place}/{CARD}", None)
        files[CARD] = fill_card(card.read_text("utf-8"), repo_id, base, inside=place).encode()
        shown += [card.parent / FIGURES, card.parent / EXAMPLES]
    for folder in shown:
        sendable = _sendable(folder).items()
        files |= {f"{folder.name}/{path}": source for path, source in sendable if path != FIRST_BATCH}
    files[RECIPE] = dump_recipe(shared).encode()
    files[METRICS] = run / METRICS
    return [File(path, files[path]) for path in sorted(files)]


def _sendable(folder: Path) -> dict[str, Path]:
    """Files below a folder that may be sent; pickles, and what isn't known, are left out and named."""
    found, left_out = {}, []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        is_known = path.suffix.lower() in _SENT or path.name in _SENT_NAMES
        if is_known and inside.parts[0] != EXPORT:  # an export is whole with its weights alone
            found[inside.as_posix()] = path
        else:
            left_out.append(inside.as_posix())
    if left_out:
        _LOG.info(f"{folder}: left out, as only safetensors, text and images are pushed: {', '.join(left_out)}")
    return found


def refuse_secret(files: Sequence[File], secret: str) -> None:
    """Refuse to send a file that holds the user's token, which could only have got there by mistake."""
    for file in files:
        if PurePath(file.path).suffix not in _TEXTS:
            continue
        content = file.source if isinstance(file.source, bytes) else file.source.read_bytes()
        if secret.encode() in content:
            raise HubError(f"{file.path} holds the token that you push with; remove it from the recipe or the file")


def fill_card(text: str, repo_id: str, base: str | None = None, *, inside: str = ".") -> str:
    """The run's card with the repository's name in its example.

    Where the repository holds an adapter alone, `base` is what it sits on: transformers' `pipeline` takes the number
    of classes from there, and hfft's Classifier doesn't. `inside` is the adapter's folder.
    """
    if base is not None:
        trust = ", trust_remote_code=True" if "trust_remote_code=True" in text else ""
        text = _EXAMPLE.sub(lambda _: _ADAPTER_EXAMPLE.format(base=base, trust=trust), text)
        if inside != ".":
            text = text.replace(f'from_pretrained("{_PLACE}"', f'from_pretrained("{_PLACE}", subfolder="{inside}"')
            text = text.replace(f"hfft evaluate {_PLACE}", f"hfft evaluate {_PLACE} --subfolder {inside}")
    return text.replace(_PLACE, repo_id)

"""A repository on the Hub: which files there are of earlier pushes, and the one commit that brings the new ones."""

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.hf_api import RepoFile

from hfft.errors import HubError
from hfft.hub.access import Destination, hub_errors, tidy_client
from hfft.hub.content import File, refuse_secret
from hfft.runs.record import ADAPTER, ADAPTER_CONFIG, CARD, EXAMPLES, FIGURES, MODEL
from hfft.system.signals import apart
from hfft.system.text import printable

MANIFEST = "hfft_files.json"
"""List in a repository: path to the sha256 of what pushes have sent there; all else is left alone."""
# What would be opened instead of, or together with, what is pushed; found in folders of models and adapters.
_OPENED = ("*.safetensors", "*.bin", "*.index.json", ADAPTER_CONFIG, "*processor_config.json")
_OPENED_FIRST = ("model.safetensors", ADAPTER_CONFIG, "*processor_config.json")
_SHOWN_LINES = 20

_LOG = logging.getLogger(__name__)  # not accelerate's, which imports torch; one process alone pushes


class Remote:
    """A repository at one commit."""

    def __init__(self, api: HfApi, there: ModelInfo, folder: Path) -> None:
        """What the Hub says of the repository, `there`; `folder` is for downloads."""
        self._api, self._there, self._folder = api, there, folder
        self.paths = frozenset(sibling.rfilename for sibling in there.siblings or ())
        self.listed = _read_list(self.content(MANIFEST)) if MANIFEST in self.paths else None

    def content(self, path: str) -> bytes:
        """Of a small file."""
        download = partial(self._api.hf_hub_download, self._there.id, path, local_dir=self._folder)
        return Path(apart(lambda: download(revision=self._there.sha))).read_bytes()

    def unchanged(self, paths: Sequence[str], listed: Mapping[str, str]) -> list[str]:
        """Those of some paths whose content is what was listed; large files aren't downloaded for that."""
        if not paths:
            return []
        tree = self._api.list_repo_tree(self._there.id, recursive=True, revision=self._there.sha)
        large = {file.path: file.lfs.sha256 for file in tree if isinstance(file, RepoFile) and file.lfs is not None}
        return [path for path in paths if (large.get(path) or _digest(self.content(path))) == listed[path]]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_list(content: bytes) -> dict[str, str]:
    try:
        return {str(path): str(digest) for path, digest in json.loads(content)["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        _LOG.warning(f"{MANIFEST} on the Hub can't be read: nothing there is taken for an earlier push")
        return {}


def send(
    api: HfApi,
    destination: Destination,
    files: list[File],
    message: str,
    *,
    create_pr: bool = False,
    earlier: Mapping[str, str] | None = None,
) -> tuple[CommitInfo, list[File]]:
    """Make one commit of the files, and of the removal of what an earlier push left.

    `HfApi.upload_folder` would make several commits, so that somebody could open half a push (huggingface_hub 2.4).
    Large files that the Hub has already, as after a push that broke off, aren't sent again; nor is what is the same.
    Files there that hfft hasn't pushed stay, also a card. `earlier` is what an earlier push has sent there, path to
    sha256; it counts where the repository has no list of it.

    Returns:
        The commit, and the files that it holds of these, with their list.

    Raises:
        HubError: If this user may not write there, a file holds the token, or one there would be opened instead.
        PushError: If it failed.
    """
    refuse_secret(files, str(api.token))
    with hub_errors(f"{destination.repo_id}: uploading"), tidy_client(), TemporaryDirectory(prefix="hfft-") as folder:
        there = api.model_info(destination.repo_id, revision=destination.revision)
        files, old = settle(Remote(api, there, Path(folder)), files, earlier or {})
        if old:
            _LOG.info(f"{destination.repo_id}: removes what an earlier push left: {', '.join(old)}")
        added = [CommitOperationAdd(file.path, file.source) for file in files]
        done = api.create_commit(
            destination.repo_id,
            [*added, *(CommitOperationDelete(path, is_folder=False) for path in old)],
            commit_message=message,
            revision=destination.revision,
            create_pr=create_pr,
            parent_commit=there.sha,
        )
    return done, files


def settle(remote: Remote, files: Sequence[File], known: Mapping[str, str]) -> tuple[list[File], list[str]]:
    """What a push sends, its list included, and what it removes.

    `known` is what an earlier push that left no list has sent there, path to sha256.
    """
    ours = known if remote.listed is None else remote.listed
    _refuse_hidden(remote.paths - set(ours), files)
    sent = [file for file in files if file.path != CARD or _may_replace(remote, file, ours.get(CARD))]
    gone = remote.unchanged(leftovers(sorted(remote.paths & set(ours)), files), ours)
    still = {path: digest for path, digest in ours.items() if path in remote.paths and path not in gone}
    if len(sent) < len(files):
        still.pop(CARD, None)
    now = {**still, **{file.path: file.sha256 for file in sent}}
    about = "what hfft has pushed here: a later push replaces or removes these files, and no others"
    content = json.dumps({"about": about, "files": dict(sorted(now.items()))}, indent=1)
    return [*sent, File(MANIFEST, content.encode())], gone


def check_room(api: HfApi, there: ModelInfo, folders: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Before anything is trained: refuse a repository where a file that isn't ours would be opened instead.

    `folders` are model and adapter folders of the run -> their folders in the repository; `known` is as for `settle`.
    """
    with TemporaryDirectory(prefix="hfft-") as aside:
        remote = Remote(api, there, Path(aside))
    own = {ADAPTER: ADAPTER_CONFIG, MODEL: "model.safetensors"}
    files = [File((PurePath(place) / own[name]).as_posix(), b"") for name, place in folders.items()]
    _refuse_hidden(remote.paths - set(known if remote.listed is None else remote.listed), files)


def leftovers(ours: Sequence[str], files: Sequence[File]) -> list[str]:
    """Paths of an earlier push that would be opened with the new files: shards, another kind of result, figures."""
    sent = {file.path for file in files}
    return [path for path in ours if path not in sent and _is_of_result(path)]


def _is_of_result(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    is_opened = folder in ("", ADAPTER) and any(fnmatch(name, pattern) for pattern in _OPENED)
    return is_opened or folder.split("/")[0] in (ADAPTER, FIGURES, EXAMPLES)


def _refuse_hidden(others: frozenset[str], files: Sequence[File]) -> None:
    """Refuse to put a model where a file of somebody else's would be opened first."""
    sent = {file.path for file in files}
    folders = {path.rpartition("/")[0] for path in sent} & {"", ADAPTER}
    first = [
        path
        for path in sorted(others - sent)
        if path.rpartition("/")[0] in folders and any(fnmatch(Path(path).name, pattern) for pattern in _OPENED_FIRST)
    ]
    if first:
        raise HubError(
            f"{', '.join(first)}: there already, not from hfft, and would be opened in the place of what is pushed; "
            "remove it on the Hub, or push to another repository"
        )


def _may_replace(remote: Remote, card: File, listed: str | None) -> bool:
    """Whether the card there is the one that was pushed; another is kept, and the difference shown."""
    if card.path not in remote.paths:
        return True
    theirs = remote.content(card.path)
    assert isinstance(card.source, bytes)
    if _digest(theirs) == listed or theirs == card.source:
        return True
    texts = [content.decode("utf-8", "replace").splitlines() for content in (theirs, card.source)]
    lines = list(difflib.unified_diff(*texts, fromfile="on the Hub, kept", tofile="of this run", lineterm="", n=0))
    shown = [printable(line) for line in lines[:_SHOWN_LINES]]
    more = [f"... {len(lines) - _SHOWN_LINES} lines more"] if len(lines) > _SHOWN_LINES else []
    what = (
        f"{CARD} on the Hub isn't the one that hfft pushed, and is kept; remove it there and push again for the run's:"
    )
    _LOG.warning("\n".join([what, *shown, *more]))
    return False

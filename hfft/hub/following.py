"""The Hub in a training: checked before it, each save sent while it goes on, the result pushed at its end."""

import copy
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from huggingface_hub import HfApi
from transformers import TrainerCallback

from hfft.errors import HubError
from hfft.hub.access import connection, reach
from hfft.hub.content import File
from hfft.hub.pushing import check_ahead, push_run, wants_push
from hfft.hub.repository import send
from hfft.model.adapters import merge
from hfft.model.config import load_processor, quiet
from hfft.recipe.spec import Recipe
from hfft.system.distributed import meet, on_main

_LOG = get_logger(__name__)


def check_hub(recipe: Recipe, *, overwrite: bool = False) -> None:
    """`check_ahead` for all processes, before anything else."""
    on_main(lambda: check_ahead(recipe, overwrite=overwrite))


def make_repository(recipe: Recipe) -> None:
    """`reach` for all processes, once the rest of the recipe is known to be right: make what isn't there."""
    if recipe.hub.repo_id is not None:
        on_main(lambda: reach(recipe.hub))


def save_pushers(recipe: Recipe) -> list["SavePusher"]:
    """What sends the saves of a training, if the recipe asks for it."""
    asks = recipe.hub.repo_id is not None and recipe.hub.hub_strategy == "every_save"
    return [SavePusher(recipe)] if asks else []


def push_result(run: str | os.PathLike[str], recipe: Recipe, *, after: Sequence["SavePusher"] = ()) -> None:
    """Push a run that has ended, if its recipe says so and that wasn't done; in one process alone.

    Waits for `after` first, which may still be sending.

    Raises:
        HubError: If it can't be pushed as asked; names what is safe, and how to go on.
        PushError: If the push failed.
    """
    if not wants_push(recipe) or not PartialState().is_main_process:
        return
    for pusher in after:
        pusher.wait()
    try:
        pushed = push_run(Path(run), recipe.hub, trust_remote_code=recipe.model.trust_remote_code)
    except HubError as error:
        again = f"the run is finished and whole: {os.fspath(run)}; the same command, or `hfft push`, pushes it"
        raise type(error)(f"{error}\n{again}") from error
    _LOG.info(pushed.in_words)


class SavePusher(TrainerCallback):
    """Sends the model of each checkpoint in the background; skips one while the last is still under way.

    The repository's root then holds what a run would end with if it ended there: config, weights, processor. A failure
    is logged and ends nothing, since the result is pushed at the end.
    """

    def __init__(self, recipe: Recipe) -> None:
        """The repository must exist when the first save comes."""
        self._recipe = recipe
        self._sending: Future[None] | None = None

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the weights aside, as the folder may be removed by a later save, and send them."""
        if state.is_world_process_zero and (self._sending is None or self._sending.done()):
            self._begin(args, state, model)
        meet()

    def _begin(self, args: Any, state: Any, model: Any) -> None:
        phase, step = Path(args.output_dir).name, state.global_step
        aside = TemporaryDirectory(prefix="hfft-")
        try:
            processor = load_processor(self._recipe.model, model.config)
            _take_aside(Path(args.output_dir) / f"checkpoint-{step}", Path(aside.name), model, processor)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            _LOG.warning(f"{phase}, step {step}: not pushed, as it can't be put aside: {error}")
            aside.cleanup()
            return
        title = f"Training in progress: {phase}, step {step}"
        self._sending = HfApi().run_as_future(self._send, aside, title)

    def wait(self) -> None:
        """Let what is under way arrive."""
        if self._sending is not None:
            self._sending.result()

    def _send(self, aside: "TemporaryDirectory[str]", title: str) -> None:
        with aside as folder:
            files = [File(path.name, path) for path in sorted(Path(folder).iterdir())]
            try:
                send(connection(), reach(self._recipe.hub), files, title)
            except HubError as error:
                _LOG.warning(f"{title}: not pushed, and training goes on: {error}")


def _take_aside(checkpoint: Path, aside: Path, model: Any, processor: Any) -> None:
    """Put a plain model into a folder: a checkpoint's, by links, or an adapted one, merged in a copy on the CPU."""
    if hasattr(model, "peft_config"):
        with quiet():
            merge(_copy_on_cpu(model)).save_pretrained(aside)
    else:
        for path in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.index.json"), checkpoint / "config.json"]:
            try:
                os.link(path, aside / path.name)
            except OSError:  # another file system
                shutil.copyfile(path, aside / path.name)
    with quiet():
        processor.save_pretrained(aside)


def _copy_on_cpu(model: Any) -> Any:
    """A copy of the model whose tensors are on the CPU; the device, which may be full, holds no second one."""
    tensors = [*model.parameters(), *model.buffers()]
    known = {id(tensor): tensor.detach().cpu().clone() for tensor in tensors}
    for tensor in model.parameters():
        known[id(tensor)] = torch.nn.Parameter(known[id(tensor)], requires_grad=False)
    return copy.deepcopy(model, known)

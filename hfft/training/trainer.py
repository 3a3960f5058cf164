"""The subclass of transformers.Trainer: groups from the plan, frozen parts held, checkpoints whole and continued."""

import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from hfft.data.images.batches import EpochOrder
from hfft.errors import TrainingError, first_line
from hfft.model.adapters import restore_adapter
from hfft.model.checkpoint import restore_weights
from hfft.model.config import quiet
from hfft.model.freezing import Freeze
from hfft.replay.dataset import ReplayedData
from hfft.runs.record import Group
from hfft.system.distributed import meet
from hfft.system.files import publish_folder, read_json
from hfft.system.signals import patient
from hfft.training.averaging import UNAVERAGED, MovingAverage, remove_others
from hfft.training.failures import Diverged, EvaluationOutOfMemory, is_out_of_memory
from hfft.training.losses import ImageLoss

_ASIDE = ".partial"

_LOG = get_logger(__name__)


class PhaseTrainer(Trainer):
    """Trains one phase.

    Attributes:
        chances: How often each training image comes, (N,); each once per epoch when None.
        average: The phase's mean of checkpoints, which stay on disk for it.
        moving: The phase's moving average, a callback too.
    """

    chances: torch.Tensor | None = None
    average: Mapping[str, float] | None = None
    moving: MovingAverage | None = None

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        groups: Sequence[Group],
        freeze: Freeze,
        loss: ImageLoss,
        floats: Callable[[torch.Tensor], torch.Tensor],
        replayed: ReplayedData | None = None,
        **data: Any,
    ) -> None:
        """Set up the phase of a model that `prepare_phase` has set up.

        Args:
            model: The network.
            args: Settings of the phase.
            groups: The optimizer's parameter groups.
            freeze: Holds what is frozen.
            loss: Called with the model's outputs.
            floats: Pixels of a batch to what the model takes.
            replayed: Feeds recorded activations, where the data sets hold those.
            **data: Data sets, collator, metrics and callbacks, as Trainer takes them.
        """
        self._groups = groups
        self._floats = floats
        self._freeze = freeze
        self._replayed = replayed
        self._is_saving = False
        self.folder = Path(args.output_dir or ".")
        super().__init__(model=model, args=args, compute_loss_func=loss, **data)
        self.model_accepts_loss_kwargs = False  # the loss counts images itself; models must not scale it again

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer that the arguments name, over the plan's groups."""
        if self.optimizer is None:
            network: Any = self.model if model is None else model
            parameters = dict(network.named_parameters())
            grouped = {name for group in self._groups for name in group.names}
            lost = [name for name, one in parameters.items() if one.requires_grad and name not in grouped]
            if lost:
                raise TrainingError(f"{len(lost)} tensors that train are in no group of the optimizer: {lost[0]}")
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, network)
            groups = []
            for one in self._groups:
                tensors = [parameters[name] for name in one.names]
                groups.append({"params": tensors, "lr": one.learning_rate, "weight_decay": one.weight_decay})
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "pixel_values": self._floats(inputs["pixel_values"])}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch; Diverged where its loss is no number, which the Trainer would leave out of its log."""
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            rate = self._get_learning_rate()
            raise Diverged(f"the loss is {loss:g} at step {self.state.global_step + 1}, learning rate {rate:.3g}")
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Hold what is frozen, which the Trainer's `model.train()` has just released, then the usual loss."""
        self._freeze.hold()
        if self._replayed is not None:
            inputs = self._replayed.feed(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure, by the same buffers in all processes: each has taken statistics of its own images since.

        Raises:
            EvaluationOutOfMemory: Where there are too many validation images at once.
        """
        self._align_buffers()
        try:
            return super().evaluate(*args, **kwargs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise EvaluationOutOfMemory from error
            raise

    @torch.no_grad()
    def _align_buffers(self) -> None:
        """Give all processes the first one's buffers where they change; a checkpoint holds those."""
        network: Any = self.model
        if self.args.world_size > 1:
            for name, buffer in network.named_buffers():
                if name not in self._freeze.names:
                    torch.distributed.broadcast(buffer, 0)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        """Each image once per epoch, or by its chances, whatever the number of processes."""
        examples: Any = self.train_dataset if train_dataset is None else train_dataset
        processes = self.args.world_size
        uneven = processes > 1 and not self.args.dataloader_drop_last
        multiple = self.args.per_device_train_batch_size * processes if uneven else 1
        return EpochOrder(examples, seed=self.args.seed, multiple=multiple, chances=self.chances)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Every image: `dataloader_drop_last` is for training, and Trainer leaves a last batch out here too."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Let the moving average, if there is one, be what is evaluated and saved."""
        is_asked = self.control.should_evaluate or self.control.should_save
        with self._averaged() if is_asked else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self.moving is None:
            yield
            return
        self._align_buffers()  # those of the weights that train; an evaluation aligns those of the average
        with self.moving.applied():
            yield

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / _ASIDE) if self._is_saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save aside, then rename: a checkpoint folder that exists is whole, and holds numbers."""
        if not all(value.isfinite().all() for value in self._whole_network().parameters() if value.requires_grad):
            raise Diverged(f"weights are no numbers any more after step {self.state.global_step}")
        self._is_saving = True
        with quiet():
            super()._save_checkpoint(model, trial)
        self._is_saving = False
        state: Any = self.state
        state.stateful_callbacks = self._callback_states()
        meet()  # every rank saves its random state
        name, best = f"checkpoint-{self.state.global_step}", str(self._best_checkpoint())
        self.state.best_model_checkpoint = best
        if self.args.should_save:
            aside = self.folder / _ASIDE / name
            self.state.save_to_json(str(aside / "trainer_state.json"))
            if self.moving is not None:
                self.moving.save(aside)
            publish_folder(aside, self.folder / name)
            if self.average is None:
                rotate_checkpoints(str(self.folder), self.args.save_total_limit, best)
            else:
                remove_others(self.average, self.folder, self.state, self.args)
        meet()

    def _best_checkpoint(self) -> Path:
        """Found by its step, as the folder may have been moved; the last one before the first evaluation."""
        return self.folder / f"checkpoint-{self.state.best_global_step or self.state.global_step}"

    def _callback_states(self) -> dict[str, Any]:
        """States of callbacks by class, in their order; Trainer appends to those of several of one class at each save.

        Read in transformers 5.24, which restores the first of them.
        """
        found: dict[str, list[Any]] = {}
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        return {name: states[0] if len(states) == 1 else states for name, states in found.items()}

    def _whole_network(self) -> Any:
        """What a checkpoint is written from; for all processes together."""
        return self.model

    def load_weights(self, checkpoint: Path) -> None:
        """Put the weights of one of the phase's checkpoints into the model."""
        restore(self.model, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Continue from a checkpoint; with a moving average, from the weights as they trained."""
        self.load_weights(Path(resume_from_checkpoint))
        if self.moving is not None:
            self.moving.resume(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the best weights of the phase, unless it ended before its first evaluation."""
        if self.state.best_global_step:
            self.load_weights(self._best_checkpoint())

    def train_to_end(self, title: str) -> None:
        """Train, from the newest whole checkpoint if there is one; leaves the best weights in the model and on disk.

        The first Ctrl-C or SIGTERM waits until the step is saved.
        """
        with patient():
            scaler, average = ["scaler.pt"] if self.accelerator.scaler else [], [UNAVERAGED] if self.moving else []
            unfinished = newest_checkpoint(self.folder, also=(*scaler, *average))
            if unfinished is None:
                self.train()
            else:
                _LOG.info(f"{title}: continues from {unfinished.name}")
                state = TrainerState.load_from_json(str(unfinished / "trainer_state.json"))
                if _was_stopped(state):  # Trainer would go on to the next evaluation
                    self.state = state
                    self.load_weights(self._best_checkpoint())
                else:
                    self.train(resume_from_checkpoint=str(unfinished))
            if not self._best_checkpoint().is_dir():
                with self._averaged():
                    self._save_checkpoint(self.model, trial=None)
            if self.moving is not None:
                self.load_weights(self._best_checkpoint())


def restore(model: Any, folder: str | Path) -> None:
    """Load a checkpoint of a phase into its model, plain or adapted."""
    (restore_adapter if hasattr(model, "peft_config") else restore_weights)(model, folder)


def clear_partial(folder: Path) -> None:
    """Remove what a killed process was still writing."""
    shutil.rmtree(folder / _ASIDE, ignore_errors=True)


def _was_stopped(state: TrainerState) -> bool:
    """Whether a callback had ended the phase before its last step when the state was saved."""
    callbacks: Any = state.stateful_callbacks
    control = callbacks.get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state.global_step < state.max_steps


def newest_checkpoint(folder: Path, *, also: Sequence[str] = ()) -> Path | None:
    """The checkpoint of a phase with the highest step whose files all open; damaged ones are skipped with a warning.

    Some phases need more files than others, such as float16's loss scale.
    """
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    for _, path in sorted(found.items(), reverse=True):
        problem = damage(path, also=also)
        if problem is None:
            return path
        _LOG.warning(f"{path}: not whole ({problem}); the one before is tried")
    return None


def damage(folder: Path, *, also: Sequence[str] = (), weights_only: bool = False) -> str | None:
    """Why a checkpoint can't be continued by this many processes, or its weights be read; None where that works."""
    try:
        weights = [*folder.glob("*.safetensors")]
        if not weights:
            return "no weights"
        config = "adapter_config.json" if (folder / "adapter_model.safetensors").exists() else "config.json"
        read_json(folder / config)
        for path in weights:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        if weights_only:
            return None
        read_json(folder / "trainer_state.json")
        processes = PartialState().num_processes
        random = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
        # Trainer goes on without the scaler's and the random states, silently.
        for name in ("optimizer.pt", "scheduler.pt", *also, *random):
            with zipfile.ZipFile(folder / name) as archive:
                broken = archive.testzip()
            if broken is not None:
                return f"{name}: {broken} is damaged"
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return first_line(error)
    return None

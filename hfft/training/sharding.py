"""The trainer of a phase, plain or under FSDP 2, which spreads the network over the processes.

Accelerate shards a network in place and for good. So a phase works on a copy, and what the rest of hfft sees, saves
and opens again is the whole network, into which the weights are gathered for a checkpoint and when the phase ends.
"""

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32, get_mixed_precision_context_manager
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from hfft.errors import TrainingError
from hfft.model.anatomy import block_paths
from hfft.model.freezing import Freeze
from hfft.replay.dataset import ReplayedData
from hfft.replay.split_point import SplitPoint
from hfft.runs.record import Group
from hfft.training.phase_data import PhaseData
from hfft.training.solved_head import HeadTrainer
from hfft.training.trainer import PhaseTrainer, restore


class Shards:
    """A network that accelerate spreads over the processes, and its whole copy.

    Attributes:
        whole: The copy, on the CPU while the phase trains.
        network: What is trained.
    """

    def __init__(self, model: Any) -> None:
        """Take a copy of a network that `prepare_phase` has set up; the network itself becomes the whole."""
        model.train()  # LeViT keeps tensors of a backward pass, which can't be copied, as long as it evaluates
        self.network = copy.deepcopy(model)
        self.whole = model.eval().cpu()
        self._frozen: Collection[str] = ()

    def set_up(self, accelerator: Accelerator, frozen: Collection[str], split_point: SplitPoint | None) -> None:
        """Tell accelerate how to spread the network, before it does; TrainingError where it doesn't.

        Args:
            accelerator: Of the phase's Trainer.
            frozen: Names of the tensors that don't change in the phase: they are not gathered for a checkpoint.
            split_point: Where a replayed phase begins: what lies in front of it is not spread, as no step needs it.
        """
        if not accelerator.is_fsdp2:
            raise TrainingError(f"FSDP was asked for, and accelerate trains {accelerator.distributed_type} instead")
        self._frozen = frozen
        network: Any = self.network
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = _block_classes(network)
        plugin.cpu_ram_efficient_loading = False  # which takes buffers for shards
        plugin.mixed_precision_policy = None  # autocast is what one process and DDP have
        plugin.ignored_modules = None
        if split_point is not None:
            plugin.ignored_modules = [module.cpu() for module in split_point.bypassed_modules]
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()  # torch 2.14 shards no weights in channels-last order
        if accelerator.native_amp:
            handler: Any = accelerator.autocast_handler
            autocast: Any = get_mixed_precision_context_manager(True, handler)
            network.forward = convert_outputs_to_fp32(autocast(network.forward))
        # Units of their own for embeddings are made for language models; some classifiers raise where asked for them.
        network.get_input_embeddings = network.get_output_embeddings = lambda: None

    @torch.no_grad()
    def gather(self, *, everything: bool = False) -> Any:
        """The whole network with the present values of all that the phase changes, or of frozen tensors too.

        For all processes together. Statistics of BatchNorm that trains are those of the first process, as under DDP.
        """
        self.align()
        present = _tensors(self.network)
        for name, wanted in _tensors(self.whole).items():
            if everything or name not in self._frozen:
                tensor = present[name]
                wanted.copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        return self.whole

    @torch.no_grad()
    def spread(self) -> None:
        """Put the whole network's values of all that the phase changes into the shards.

        Frozen ones stay as they are, so that the proof at the end of the phase compares what was trained with.
        """
        present, wanted = _tensors(self.network), _tensors(self.whole)
        for name, tensor in present.items():
            if name not in self._frozen:
                tensor.copy_(_as(tensor, wanted[name]))

    @torch.no_grad()
    def align(self) -> None:
        """Give all processes the first one's buffers where they change."""
        for name, buffer in self.network.named_buffers():
            if name not in self._frozen:
                torch.distributed.broadcast(buffer, 0)

    @torch.no_grad()
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """An optimizer's state as one process would save it; for all processes together."""
        state = optimizer.state_dict()
        return {**state, "state": {number: _whole(own) for number, own in state["state"].items()}}

    @torch.no_grad()
    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Put a state from `optimizer_state`, or of one process, into the optimizer of the shards."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tensors = {
            number: {name: _as(parameters[number], value) for name, value in own.items()}
            for number, own in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": tensors})


class ShardedTrainer(PhaseTrainer):
    """Trains a phase on shards; leaves the files that a PhaseTrainer leaves."""

    shards: Shards

    def _align_buffers(self) -> None:
        self.shards.align()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole network, just as one process does; `_save_checkpoint` has gathered it."""
        self.model = self.shards.whole
        self._save(output_dir)
        self.model = self.shards.network

    def _whole_network(self) -> Any:
        return self.shards.gather()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save; callbacks that hear of it get the whole network, as in one process, and not a shard."""
        super()._save_checkpoint(model, trial)
        self.callback_handler.model = self.shards.whole

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.callback_handler.model = self.model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write whole files under the names that one process gives them; Trainer would write the weights again."""
        state, schedule = self.shards.optimizer_state(self.optimizer), cast(Any, self.lr_scheduler)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        self.shards.load_optimizer_state(self.optimizer, state)
        schedule = cast(Any, self.lr_scheduler)
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def load_weights(self, checkpoint: Path) -> None:
        """Put a checkpoint's weights into the whole network, and from there into the shards."""
        restore(self.shards.whole, checkpoint)
        self.shards.spread()


def make_trainer(
    model: Any,
    data: PhaseData,
    replayed: ReplayedData | None,
    arguments: TrainingArguments,
    *,
    groups: Sequence[Group],
    freeze: Freeze,
    shards: Shards | None,
) -> PhaseTrainer:
    """The trainer of a phase, over its images or what is recorded of them; of shards under FSDP 2.

    Without groups there is no optimizer: a head is solved. Arguments that would contradict the recipe are changed.
    """
    if replayed is not None:  # rows of a file that is mapped into memory: no work for others
        arguments.dataloader_num_workers, arguments.dataloader_prefetch_factor = 0, None
        arguments.dataloader_persistent_workers, arguments.dataloader_multiprocessing_context = False, None
    arguments.report_to = []  # a Trainer's own would begin an experiment for each phase: training/reporting.py
    source = data if replayed is None else replayed
    loss = data.loss(arguments.label_smoothing_factor)
    if data.is_multi_label:
        arguments.label_smoothing_factor = 0.0  # Trainer's own, which it would warn of; the loss has it
    kind = ShardedTrainer if shards is not None else PhaseTrainer if groups else HeadTrainer
    trainer = kind(
        model,
        arguments,
        groups=groups,
        freeze=freeze,
        loss=loss,
        replayed=replayed,
        floats=data.floats,
        train_dataset=source.train,
        eval_dataset=source.validation,
        data_collator=source.collate,
        compute_metrics=data.measure,
        preprocess_logits_for_metrics=data.reduce,
    )
    trainer.chances = data.chances
    if isinstance(trainer, HeadTrainer):
        trainer.metrics = data.metrics
    if shards is not None and isinstance(trainer, ShardedTrainer):
        shards.set_up(trainer.accelerator, freeze.names, None if replayed is None else replayed.split_point)
        trainer.shards = shards
    for replaced in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    return trainer


def _whole(values: dict[str, Any]) -> dict[str, Any]:
    return {name: one.full_tensor().cpu() if isinstance(one, DTensor) else one for name, one in values.items()}


def _as(tensor: torch.Tensor, value: Any) -> Any:
    """A whole value as the part of it that this process has of a tensor; one of another shape as it is."""
    if not (isinstance(tensor, DTensor) and isinstance(value, torch.Tensor) and value.shape == tensor.shape):
        return value
    value = value.contiguous().to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _block_classes(network: Any) -> list[str]:
    """Names of the classes of the blocks; torch's own stand for many other things too."""
    kinds = {type(network.get_submodule(name)) for name in block_paths(network)}
    return sorted(kind.__name__ for kind in kinds if not kind.__module__.startswith("torch."))

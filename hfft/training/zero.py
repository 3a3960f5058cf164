"""A phase under DeepSpeed ZeRO-2: gradients and the optimizer's state are spread over the processes, weights are not.

DeepSpeed keeps what trains in buffers of its own and leaves hooks on it, so that the phase works on a copy here too.
Its settings are made from the phase's. It computes in float32, as its bfloat16 would be that of all weights, frozen
ones too; autocast is what one process and DDP have.
"""

import importlib
import logging
import math
import warnings
from collections.abc import Collection
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import convert_outputs_to_fp32
from transformers import TrainingArguments

from hfft.errors import TrainingError
from hfft.replay.split_point import SplitPoint
from hfft.training.sharding import Shards, is_like

_BUCKET = 2**24  # numbers that are sent together; DeepSpeed takes memory for as many, by default for 2 GB


class Partitions(Shards):
    """A network whose gradients and moments DeepSpeed spreads over the processes, and its whole copy."""

    def __init__(self, model: Any, arguments: TrainingArguments) -> None:
        """Take a copy of a network to train.

        Args:
            model: As `prepare_phase` left it; becomes the whole.
            arguments: Of the phase.
        """
        super().__init__(model)
        self._arguments = arguments
        self._accelerator: Accelerator | None = None

    def set_up(self, accelerator: Accelerator, frozen: Collection[str], split_point: SplitPoint | None) -> None:
        """Tell accelerate what DeepSpeed is to do.

        Args:
            accelerator: Of the phase's Trainer.
            frozen: Names of the tensors that don't change in the phase: they are not copied for a checkpoint.
            split_point: Not needed, as each process has all weights.

        Raises:
            TrainingError: If accelerate doesn't train under DeepSpeed.
        """
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise TrainingError(
                f"DeepSpeed was asked for, and accelerate trains {accelerator.distributed_type} instead"
            )
        for handler in logging.getLogger("DeepSpeed").handlers:
            handler.setLevel(logging.ERROR)  # it warns of every optimizer but Adam
        warnings.filterwarnings("ignore", r"`torch\.distributed\.all_gather_into_tensor` is deprecated", FutureWarning)
        self._frozen, self._accelerator = frozen, accelerator
        accelerator.gradient_accumulation_steps = self._arguments.gradient_accumulation_steps
        asked = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
        asked |= dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto")
        stage = {"stage": 2, "reduce_bucket_size": _BUCKET}
        config = HfTrainerDeepSpeedConfig({**asked, "zero_optimization": stage, "steps_per_print": math.inf})
        config.trainer_config_process(self._arguments)
        plugin: Any = accelerator.state.deepspeed_plugin
        plugin.hf_ds_config, plugin.deepspeed_config = config, config.config
        for parameter in self.network.parameters():
            parameter.data = parameter.data.contiguous()  # DeepSpeed 0.19.8 sends none in channels-last order
        if self._arguments.bf16:
            autocast: Any = torch.autocast(accelerator.device.type, torch.bfloat16)
            self.network.forward = convert_outputs_to_fp32(autocast(self.network.forward))

    def gather_all(self) -> Any:
        """The whole network with the present values of every tensor, frozen ones too; DeepSpeed lets go of its own."""
        whole = super().gather_all()
        assert self._accelerator is not None
        self._accelerator.free_memory()
        return whole

    def spread(self) -> None:
        """Put the whole network's values of all that the phase changes into what is trained.

        Frozen ones stay as they are, so that the proof at the end of the phase compares what was trained with.
        """
        super().spread()
        engine: Any = getattr(self._accelerator, "deepspeed_engine_wrapped", None)
        if engine is not None:  # else the phase had ended, and nothing is trained any more
            engine.engine.optimizer.refresh_fp32_params()

    @torch.no_grad()
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """An optimizer's state as one process would save it; for all processes together."""
        full = _deepspeed().safe_get_full_optimizer_state
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for parameters, partition, group in _groups(optimizer):
            own = optimizer.state[partition]
            _link(parameters, partition, optimizer)
            numbers = list(range(len(state), len(state) + len(parameters)))
            for number, parameter in zip(numbers, parameters, strict=True):
                state[number] = {
                    name: full(parameter, name).cpu() if is_like(partition, value) else value
                    for name, value in own.items()
                }
            groups.append({**group, "params": numbers})
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Put a state from `optimizer_state`, or of one process, into this process's part of the optimizer."""
        put = _deepspeed().safe_set_full_optimizer_state
        for (parameters, partition, group), saved in zip(_groups(optimizer), state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
            values = [state["state"].get(number, {}) for number in saved["params"]]
            optimizer.state[partition] = {
                name: torch.zeros_like(partition) if is_like(parameters[0], value) else value
                for name, value in values[0].items()
            }
            _link(parameters, partition, optimizer)
            for parameter, own in zip(parameters, values, strict=True):
                for name, value in own.items():
                    if is_like(parameter, value):
                        put(parameter, value.to(parameter.device), name)


def _deepspeed() -> Any:
    return importlib.import_module("deepspeed.utils")  # of an extra


def _groups(optimizer: Any) -> list[tuple[list[torch.nn.Parameter], torch.Tensor, dict[str, Any]]]:
    """Of each group: the parameters, this process's part of all their numbers, and the settings."""
    groups = zip(optimizer.optimizer.bit16_groups, optimizer.param_groups, strict=True)
    return [(parameters, group["params"][0], group) for parameters, group in groups]


def _link(parameters: list[torch.nn.Parameter], partition: torch.Tensor, optimizer: Any) -> None:
    """Tell parameters where in the optimizer's state their moments are.

    DeepSpeed 0.19.8 does so once, after the first group's first step, when other groups have no moments yet.
    """
    _deepspeed().lazy_init_hp_params_optimizer_state(parameters, partition, optimizer.state)

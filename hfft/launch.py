"""Whether the launch gave what it was asked for: as many processes, and nothing that hfft can't train under."""

import os
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.logging import get_logger

from hfft.errors import RunError

_LOG = get_logger(__name__)

_COUNTS = {  # environment variable -> who sets it
    "WORLD_SIZE": "the launcher",
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
_HOW = "docs/scaling.md says how to launch"


def check_launch(state: PartialState) -> None:
    """Refuse to run with less than was asked for, and say what is left unused.

    Raises:
        RunError: If there are fewer processes than launcher, srun or mpirun were told to start, each of which would
            train alone; or if the launcher was asked for FSDP or DeepSpeed, whose checkpoints can't be continued here,
            and which on a CPU silently train whole copies.
    """
    wanted, who = max((_count(os.environ.get(name)), who) for name, who in _COUNTS.items())
    if state.num_processes == 1 and (of_launcher := _launcher_count()) > wanted:
        wanted, who = of_launcher, "accelerate launch"
    if state.num_processes < wanted:
        raise RunError(
            f"{who} was asked for {wanted} processes and {state.num_processes} of them would train alone; "
            f"on a CPU --cpu starts one: use recipes/accelerate/cpu2.yaml. {_HOW}"
        )
    for name, flag in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(flag, "false").lower() == "true":
            raise RunError(
                f"{name} was asked for, and hfft doesn't train under it yet: use recipes/accelerate/ddp.yaml, with "
                f"activation_checkpointing or an adapter where memory is short. {_HOW}"
            )
    visible = torch.cuda.device_count()
    if state.num_processes == 1 and visible > 1:
        _LOG.info(
            f"{visible} GPUs are visible and one is used; all of them: "
            f"accelerate launch --multi_gpu --num_processes {visible} -m hfft train ..."
        )


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 1


def _launcher_count() -> int:
    """How many processes the `accelerate launch` above this process was told to start; 1 if there is none."""
    parent = psutil.Process().parent()
    try:
        command = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return 1
    names = [Path(word).name for word in command]
    starts = [n for n, name in enumerate(names) if name in ("accelerate-launch", "accelerate.commands.launch")]
    starts += [n + 1 for n, name in enumerate(names[:-1]) if (name, names[n + 1]) == ("accelerate", "launch")]
    if not starts:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    asked = launch_command_parser().parse_args(command[min(starts) + 1 :])
    count = asked.num_processes
    if count is None and (asked.config_file is not None or (Path(default_config_file).is_file() and not asked.cpu)):
        config: Any = load_config_from_file(asked.config_file)
        count = config.num_processes
    return count or 1

"""The processes of one launch at work: as many as were asked for, under nothing that hfft can't train under."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import DistributedType, PartialState
from accelerate.logging import get_logger

from hfft.errors import RunError
from hfft.system.distributed import join
from hfft.system.liveness import watched
from hfft.system.progress import bars

_LOG = get_logger(__name__)

_COUNTS = {  # environment variable -> who sets it
    "WORLD_SIZE": "the launcher",
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
_HOW = "docs/scaling.md says how to launch"
_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What `accelerate launch` may ask for by its variables, and hfft doesn't do: what is allowed, and the reason. The
# first value counts where a variable isn't set, but for FSDP_VERSION, which is 1 then.
_UNTRIED = "it was never tried"
_Asked = dict[str, tuple[tuple[str, ...], str]]
_ALWAYS: _Asked = {
    _MIXED_PRECISION: (tuple(_PRECISIONS), "the recipe's precision counts"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "training.torch_compile compiles"),
    "ACCELERATE_DYNAMO_MODE": (("default", "none"), "training.torch_compile_mode says so"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": (("false",), _UNTRIED),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": (("false",), _UNTRIED),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": (("false",), _UNTRIED),
    "ACCELERATE_USE_MEGATRON_LM": (("false",), "it is for language models"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false",), "only images are divided"),
}
_FSDP_ASKED: _Asked = {
    "FSDP_VERSION": (("2",), "version 1 keeps no names of weights that hfft could save by"),
    "FSDP_STATE_DICT_TYPE": (("FULL_STATE_DICT",), "checkpoints are whole files, which one process opens too"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "weights on the CPU were never tried"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        ("false",),
        "it renames the network's modules; activation_checkpointing in the recipe does the same without",
    ),
}


@contextmanager
def launched(*, timeout: int | None = None, shows_bars: bool = True) -> Iterator[None]:
    """Work together with the other processes of the launch, which watch each other meanwhile.

    Args:
        timeout: Seconds that a collective operation waits for a process; 2 hours when None.
        shows_bars: Whether progress bars are shown.

    Raises:
        RunError: If the launch isn't what was asked for, or asks for what hfft doesn't do.
        TrainingError: If another process ended or stopped.
    """
    state = join(timeout)
    check_launch(state)
    with watched(state), bars(shown=shows_bars):
        yield


def check_launch(state: PartialState) -> None:
    """Refuse to run with less than was asked for: fewer processes, each alone, or FSDP that isn't active.

    A GPU that is left unused is logged.
    """
    wanted, who = max((_count(os.environ.get(name)), who) for name, who in _COUNTS.items())
    if state.num_processes == 1 and (of_launcher := _launcher_count()) > wanted:
        wanted, who = of_launcher, "accelerate launch"
    if state.num_processes < wanted:
        raise RunError(
            f"{who} was asked for {wanted} processes and {state.num_processes} of them would train alone; "
            f"on a CPU --cpu starts one: use recipes/accelerate/cpu2.yaml. {_HOW}"
        )
    if is_fsdp_asked():
        _check_asked(_FSDP_ASKED, "use recipes/accelerate/fsdp2.yaml")
        is_alone = state.num_processes == 1 or state.distributed_type == DistributedType.NO
        if is_alone or state.distributed_type == DistributedType.MULTI_CPU:
            raise RunError(
                f"FSDP was asked for, and is not active: {'in one process' if is_alone else 'on CPUs'} accelerate "
                "trains whole copies of the network and doesn't say so; use several GPUs, or "
                f"recipes/accelerate/cpu2.yaml. {_HOW}"
            )
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each process keeps a whole copy on the CPU
    visible = torch.cuda.device_count()
    if state.num_processes == 1 and visible > 1:
        _LOG.info(
            f"{visible} GPUs are visible and one is used; all of them: "
            f"accelerate launch --multi_gpu --num_processes {visible} -m hfft train ..."
        )


def check_launch_options(precisions: Mapping[str, str]) -> None:
    """Refuse what this launch asks of accelerate that would silently count more than the recipe.

    Mixed precision doesn't, and where phases train in another one a line says so.

    Args:
        precisions: Phase to `float32`, `bfloat16` or `float16`, in which it trains.
    """
    _check_asked(_ALWAYS, "leave it out of the launch, or of accelerate's config file")
    asks_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    if asks_cpu and torch.accelerator.is_available():
        raise RunError(
            "cpu (ACCELERATE_USE_CPU): the launch asks for the CPU, and this process sees an accelerator, which hfft "
            "trains on; hide it, as with CUDA_VISIBLE_DEVICES=''"
        )
    asked = (os.environ.get(_MIXED_PRECISION) or "no").lower()
    others = [f"{name} trains in {found}" for name, found in precisions.items() if found != _PRECISIONS[asked]]
    if asked != "no" and others:
        _LOG.warning(
            f"mixed_precision ({_MIXED_PRECISION}): the launch asks for {asked}, and the recipe counts: "
            f"{', '.join(others)}; precision=bfloat16 or training.fp16=true change it"
        )


def spread_by() -> str | None:
    """What spreads weights over the processes of this launch, in words; None where nothing does."""
    return "FSDP 2" if is_fsdp_asked() else None


def is_fsdp_asked() -> bool:
    """Whether `accelerate launch` asks for shards."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _check_asked(table: _Asked, advice: str) -> None:
    for variable, (allowed, reason) in table.items():
        found = os.environ.get(variable) or ("1" if variable == "FSDP_VERSION" else allowed[0])
        if found.upper() not in map(str.upper, allowed):
            option = variable.removeprefix("ACCELERATE_").lower()
            raise RunError(
                f"{option}: found {found}; allowed: {', '.join(allowed)}, as {reason}: {advice} ({variable}). {_HOW}"
            )


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 1


def _launcher_count() -> int:
    """How many processes the `accelerate launch` above this process asks for; 1 if there is none."""
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

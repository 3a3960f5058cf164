"""What this process runs on: its cores, its device, and the versions that a run is recorded with."""

import operator
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

_RECORDED = (
    *("torch", "torchvision", "transformers", "datasets", "accelerate", "evaluate", "peft"),
    *("huggingface_hub", "safetensors", "numpy", "pillow", "timm"),
    *("simplejpeg", "pillow-heif", "onnx", "onnxruntime", "onnxruntime-gpu"),
)


def cpus_per_process() -> int:
    """Processor cores that one process of a launch can count on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def has_native_bfloat16() -> bool:
    """Whether this process's device multiplies bfloat16 numbers itself: CUDA from sm_80 on, AVX512_BF16, AMX."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    if torch.accelerator.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def package_versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, as far as they are installed."""
    found: dict[str, str] = {}
    for name in _RECORDED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_arithmetic(device: torch.device, *, to_the_bit: bool) -> dict[str, Any]:
    """What a float32 computation depends on, apart from versions and batch size.

    `to_the_bit` names what changes the last bits too: instructions and threads of a CPU, the accelerator's name.
    """
    is_cpu = device.type == "cpu"
    places = ("mkldnn.matmul", "mkldnn.conv") if is_cpu else ("cuda.matmul", "cudnn.conv")  # TensorFloat-32, bfloat16
    found = {place: operator.attrgetter(f"{place}.fp32_precision")(torch.backends) for place in places}
    if to_the_bit:
        found |= {"hardware": torch.backends.cpu.get_cpu_capability() if is_cpu else hardware(device)}
        found |= {"threads": torch.get_num_threads()} if is_cpu else {}
    return {"device": device.type, **found}


def describe_environment() -> dict[str, Any]:
    """Content of environment.json: versions, hardware, processes, command, and the current folder's git commit."""
    state = PartialState()
    commit = ""
    with suppress(OSError):  # no git here
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip()
    return {
        "hfft": version("hfft"),
        "python": platform.python_version(),
        "packages": package_versions(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": cpus_per_process(),
        "device": str(state.device),
        "hardware": hardware(torch.device(str(state.device))),
        "processes": state.num_processes,
        "command": sys.argv,
        "git_commit": commit or None,
    }


def hardware(device: torch.device) -> str:
    """What the device is called by its maker, or what kind of processor it is where nobody says."""
    if device.type != "cpu":
        backend = torch.get_device_module(device.type)
        return str(backend.get_device_name(device)) if hasattr(backend, "get_device_name") else device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

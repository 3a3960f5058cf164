"""`hfft` under accelerate's FSDP 2 on CPUs: `accelerate launch --config_file fsdp2.yaml -m fsdp_on_cpu train RECIPE`.

Where there is no GPU, accelerate 1.15 quietly makes FSDP to DDP: AcceleratorState asks for a distributed type such as
MULTI_GPU, and PartialState finds MULTI_CPU. What this module replaces, in its own process, is that answer alone; the
device is named by accelerate's own variable. Trainer, accelerate's fsdp2_prepare_model, torch's fully_shard and hfft
are the real ones, on a mesh of CPUs that talk by gloo. What fsdp2_prepare_model has made of a network is printed.
"""

import os
import sys
from typing import Any

import accelerate.accelerator
import torch
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def believe_in_accelerators() -> None:
    """Let accelerate take CPUs for what FSDP runs on."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def tell_of_shards() -> None:
    """Print what each network is made of after accelerate has prepared it, in the main process."""
    prepare = accelerate.accelerator.fsdp2_prepare_model

    def prepare_and_tell(accelerator: Any, model: Any) -> Any:
        model = prepare(accelerator, model)
        units = sum(isinstance(module, FSDPModule) for module in model.modules())
        parameters = list(model.parameters())
        spread = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        whole = sum(parameter.numel() for parameter in spread)
        here = sum(parameter.to_local().numel() for parameter in spread)
        if accelerator.is_main_process:
            told = f"{len(spread)} of {len(parameters)} tensors, {here} of {whole} numbers here, {units} units"
            os.write(1, f"spread: {told}\n".encode())
        return model

    accelerate.accelerator.fsdp2_prepare_model = prepare_and_tell


if __name__ == "__main__":
    believe_in_accelerators()
    tell_of_shards()
    from hfft.cli import main

    sys.exit(main())

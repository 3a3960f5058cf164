"""`hfft` under DeepSpeed on CPUs: `accelerate launch --config_file deepspeed_zero2.yaml -m zero_on_cpu train RECIPE`.

Where there is no GPU, accelerate 1.15 takes several processes for MULTI_CPU, and hfft asks for that itself. What this
module replaces, in its own process, are those two answers and the device; DeepSpeed is told of CPUs by its own
variable. Trainer, accelerate's preparation, DeepSpeed's engine and hfft are the real ones, and the processes talk by
gloo. What DeepSpeed has made of a network is printed.
"""

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState


def believe_in_accelerators() -> None:
    """Let accelerate take CPUs for what DeepSpeed runs on."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    begin: Any = PartialState.__init__
    PartialState.__init__ = lambda self, cpu=False, **more: begin(self, False, **more)
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def tell_of_partitions() -> None:
    """Print how each network is trained after accelerate has prepared it, in the main process."""
    prepare: Any = Accelerator._prepare_deepspeed

    def prepare_and_tell(self: Accelerator, *given: Any) -> Any:
        prepared = prepare(self, *given)
        engine = next((one for one in prepared if hasattr(one, "zero_optimization_stage")), None)
        if engine is None:  # a data loader
            return prepared
        here = sum(group["params"][0].numel() for group in engine.optimizer.param_groups)
        trained = sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)
        if self.is_main_process:
            told = f"ZeRO stage {engine.zero_optimization_stage()}, moments of {here} of {trained} numbers here"
            os.write(1, f"{told}\n".encode())
        return prepared

    Accelerator._prepare_deepspeed = prepare_and_tell


if __name__ == "__main__":
    believe_in_accelerators()
    tell_of_partitions()
    from hfft.cli import main

    sys.exit(main())

"""Shards a tiny network of each family named and trains one step; run by two processes, prints what went wrong.

`accelerate launch --config_file fsdp2.yaml --num_processes 2 -m shard_families vit convnext`
"""

import copy
import os
import sys
from typing import Any

import fsdp_on_cpu
import tiny
import torch
from accelerate import Accelerator

from hfft.errors import ModelError
from hfft.model.freezing import Freeze
from hfft.recipe.spec import AdapterSpec, PhaseSpec
from hfft.training.plan import prepare_phase
from hfft.training.sharding import Shards

PHASES = {
    "all": PhaseSpec(name="all", unfreeze="all", arguments={}),
    "lora": PhaseSpec(name="lora", adapter=AdapterSpec(on="all"), arguments={}),
}


def problem(family: str, spec: PhaseSpec, accelerator: Accelerator) -> str | None:
    """What is wrong with a step of a sharded network of the family, beside that of a plain one; None if nothing."""
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, tiny.SIDE, tiny.SIDE)
    model = prepare_phase(tiny.build(family), spec, pixels[:1])
    plain = copy.deepcopy(model.train()).eval()
    shards = Shards(model)
    shards.network.eval()
    shards.set_up(accelerator, Freeze(shards.network).names, None)
    sharded, optimizer = accelerator.prepare(shards.network, _optimizer(shards.network))
    logits = step(sharded, optimizer, pixels)
    expected = step(plain, _optimizer(plain), pixels)
    if not torch.allclose(logits, expected, atol=1e-5):
        return f"logits differ by {float((logits - expected).abs().max()):.1e}"
    got, wanted = shards.gather(everything=True).state_dict(), plain.state_dict()
    off = [name for name, value in wanted.items() if not torch.allclose(got[name], value, rtol=1e-4, atol=1e-5)]
    return f"{', '.join(off[:3])} differ after a step" if off else None


def step(network: Any, optimizer: Any, pixels: torch.Tensor) -> torch.Tensor:
    logits = network(pixel_values=pixels).logits
    logits.square().mean().backward()
    optimizer.step()
    return logits.detach()


def _optimizer(network: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([value for value in network.parameters() if value.requires_grad], lr=0.01)


def main() -> None:
    fsdp_on_cpu.believe_in_accelerators()
    accelerator = Accelerator()
    for family in sys.argv[1:]:
        for name, spec in PHASES.items():
            try:
                found = problem(family, spec, accelerator)
            except ModelError:  # an architecture that adapters don't fit
                continue
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            accelerator.free_memory()
            if accelerator.is_main_process:
                os.write(1, f"{family} {name}: {found or 'as a plain one'}\n".encode())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

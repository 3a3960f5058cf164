"""Cost and memory of a phase on many devices, from shapes alone: the tables of docs/scaling.md.

    python scripts/scaling_table.py

Nothing is run: networks are built without weights, multiplications are counted by torch's FlopCounterMode and kept
activations by hfft's plan. Per image and step: forward through all, backward through what trains and what lies behind
its first layer; with replay only the part from the boundary on. Per device, in float32 with AdamW:

- DDP: all weights; gradients, their copy in buckets, and two moments of what trains; activations.
- FSDP 2: weights, gradients and moments divided by the number of devices; two gathered blocks; activations.
"""

import argparse
from functools import partial

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification

from hfft.model.anatomy import dissect
from hfft.recipe.spec import AdapterSpec, PhaseSpec
from hfft.training.plan import activation_bytes, plan_phase, prepare_phase

LARGE_VIT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
NETWORKS = {
    "ViT-B/16": ("vit", {}),
    "ViT-L/16": ("vit", LARGE_VIT),
    "ConvNeXt-B": ("convnext", {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}),
    "ConvNeXt-L": ("convnext", {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]}),
}
PHASES = {
    "head": PhaseSpec(name="head", unfreeze="head", arguments={}),
    "last 4 blocks": PhaseSpec(name="last", unfreeze={"blocks": 4}, arguments={}),
    "LoRA on attention and MLP": PhaseSpec(name="lora", adapter=AdapterSpec(on="all", r=8), arguments={}),
    "all": PhaseSpec(name="all", unfreeze="all", arguments={}),
}
SIDE, GIB = 224, 2**30


def multiplications(network: torch.nn.Module) -> dict[str, float]:
    """Billions of multiplications of one image, for the whole network and up to each part's begin."""
    anatomy, reached = dissect(network), {}
    modules = dict(network.named_modules())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:

        def note(part: str, *_: object) -> None:
            reached.setdefault(part, counter.get_total_flops() / 2e9)

        for part in anatomy.parts:
            first = next((name.rpartition(".")[0] for name in part.tensors), None)
            if first is not None:
                modules[first].register_forward_pre_hook(partial(note, part.name))
        network(pixel_values=torch.empty(1, 3, SIDE, SIDE, device="meta"))
        return {**reached, "": counter.get_total_flops() / 2e9}


def rows(name: str, batch: int, devices: int) -> list[list[str]]:
    """The phases of one network."""
    kind, changes = NETWORKS[name]
    found = []
    for title, spec in PHASES.items():
        with torch.device("meta"):
            config = AutoConfig.for_model(kind, num_labels=100, **changes)
            network = AutoModelForImageClassification.from_config(config)
        counts = multiplications(network)
        blocks = [part.name for part in dissect(network).blocks]
        largest = max(
            sum(network.get_parameter(n).numel() for n in part.tensors if n in dict(network.named_parameters()))
            for part in dissect(network).blocks
        )
        begin = {"head": counts["head"], "last 4 blocks": counts[blocks[-4]]}.get(title, 0.0)
        network = prepare_phase(network, spec, torch.empty(1, 3, SIDE, SIDE, device="meta"))
        plan = plan_phase(network, spec, images=1000)
        kept = activation_bytes(network, (batch, 3, SIDE, SIDE)) or 0
        weights, trained = 4 * plan.total, 4 * plan.trainable
        # The backward pass of what trains costs twice its forward pass; LoRA's leaves out the gradients of weights.
        behind = counts[""] - begin
        backward = behind if title.startswith("LoRA") else 2 * behind
        found.append(
            [
                name,
                title,
                f"{plan.trainable / 1e6:.2f} of {plan.total / 1e6:.0f}",
                f"{counts[''] + backward:.1f}",
                f"{behind + backward:.1f}" if begin else "",
                f"{trained / 2**20:,.0f}",
                f"{(weights + 4 * trained + kept) / GIB:.1f}",
                f"{((weights + 3 * trained) / devices + 8 * largest + kept) / GIB:.1f}",
            ]
        )
    return found


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="images per device")
    parser.add_argument("--devices", type=int, default=8, help="that FSDP 2 shards over")
    arguments = parser.parse_args()
    table = Table(
        "network",
        "phase",
        "trains (millions)",
        "GMAC per image",
        "with replay",
        "MiB of gradients per step",
        "DDP (GiB)",
        f"FSDP 2, {arguments.devices} devices (GiB)",
        box=box.MARKDOWN,
    )
    for name in NETWORKS:
        for row in rows(name, arguments.batch, arguments.devices):
            table.add_row(*row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()

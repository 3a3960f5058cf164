"""Print as Markdown what hfft can do with each family that AutoModelForImageClassification maps.

    python scripts/family_table.py

Nothing is looked up: each family is built tiny from its config (tests/tiny.py), trained for one step and compared
tensor by tensor. Timings and accuracies are no part of it.
"""

import sys
import warnings
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hfft.errors import ModelError, TrainingError
from hfft.model.adapters import attach, check_adapter, head_modules, merge
from hfft.model.anatomy import REFUSED, dissect
from hfft.model.freezing import Freeze, set_trainable, trainable_names, unused_parameters
from hfft.recipe.spec import AdapterSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny  # pyright: ignore[reportMissingImports]

OK = "ok"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Row:
    """One line of the table; the last three are `ok`, or what went wrong.

    Attributes:
        family: Model type, with `+` and a word for another class of the same type.
        blocks: How many blocks `{blocks: N}` can release.
        head: The layers with one output per class.
        batchnorm: How many BatchNorm layers there are, whose statistics a phase must hold.
        unfreeze: With the last block released, one step changes the released tensors and no other.
        adapter: LoRA on all layers trains, and merged into the weights gives the same logits.
        proof: The proof holds after a step in training mode, and fails when one number of a frozen tensor changes.
    """

    family: str
    blocks: int
    head: str
    batchnorm: int
    unfreeze: str
    adapter: str
    proof: str


def row(family: str) -> Row:
    """Build the family, try all three, and say how it went."""
    model = tiny.build(family)
    anatomy = dissect(model)
    return Row(
        family,
        len(anatomy.blocks),
        ", ".join(head_modules(anatomy)),
        sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()),
        unfreeze(shaken(tiny.build(family))),
        adapter(shaken(tiny.build(family))),
        proof(shaken(tiny.build(family))),
    )


def unfreeze(model: PreTrainedModel) -> str:
    """Release the last block and take one step."""
    released = trainable_names(model, dissect(model), {"blocks": 1})
    set_trainable(model, released)
    released -= unused_parameters(model, pixels())  # CLIP's last norm isn't used, so nothing can change it
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    step(model, Freeze(model))
    changed = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    return OK if changed == released else f"changed: {len(changed)}, released: {len(released)}"


def adapter(model: PreTrainedModel) -> str:
    """Attach LoRA to every layer that can carry it, take one step, and merge."""
    try:
        adapted = attach(model, AdapterSpec(on="all"))
        check_adapter(adapted, pixels())
    except ModelError as error:
        return str(error)
    step(shaken(adapted, 0.1), Freeze(adapted))
    adapted.eval()
    with torch.inference_mode():
        logits = adapted(pixel_values=pixels()).logits
        difference = (merge(adapted)(pixel_values=pixels()).logits - logits).abs().max().item()
    scale = max(1.0, logits.abs().max().item())
    return OK if difference <= 1e-5 * scale else f"merged logits differ by {difference:.1e}"


def proof(model: PreTrainedModel) -> str:
    """Prove that nothing frozen moved in one step, then move one number."""
    set_trainable(model, trainable_names(model, dissect(model), {"blocks": 1}))
    freeze = Freeze(model)
    step(model, freeze)
    try:
        freeze.prove()
    except TrainingError as error:
        return str(error)
    frozen = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    with torch.no_grad():
        frozen.view(-1)[0] += 1
    try:
        freeze.prove()
    except TrainingError:
        return OK
    return "a changed tensor went unnoticed"


def step(model: nn.Module, freeze: Freeze) -> None:
    """One step in training mode; weight decay moves a tensor whose gradient happens to be all zero, too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model.train()
    freeze.hold()
    nn.functional.cross_entropy(model(pixel_values=pixels()).logits, torch.tensor([0, 1])).backward()
    optimizer.step()


def shaken(model: Model, size: float = 0.02) -> Model:
    """The model with noise on all that trains: weight decay couldn't move a zero, and an adapter starts as nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * size)
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def pixels() -> torch.Tensor:
    """Two images of noise, the same at each call."""
    return torch.randn(2, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))


def markdown(rows: list[Row]) -> str:
    """The table, then the reasons behind every `no` in it, then the families that are refused."""
    names = [field.name for field in fields(Row)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    notes = []
    for line in rows:
        cells = [str(cell) for cell in astuple(line)]
        notes += [f"- {line.family}, {name}: {cells[k]}" for k, name in enumerate(names) if k > 3 and cells[k] != OK]
        cells[4:] = [cell if cell == OK else "no" for cell in cells[4:]]
        lines.append(f"| {' | '.join(cells)} |")
    count = len({line.family.partition("+")[0] for line in rows})
    refused = [f"- {family}: {reason}" for family, reason in REFUSED.items()]
    summary = f"{count} families in {len(rows)} classes; {len(refused)} families are refused, each with its reason:"
    return "\n".join([*lines, "", *notes, "", summary, "", *refused])


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    print(markdown([row(family) for family in tiny.CONFIGS]))

"""A head phase without steps: for each weight decay the head of least loss, and of these the best on validation.

The head that later phases start from, https://hf.co/papers/2202.10054.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import TrainerState

from hfft.errors import TrainingError
from hfft.replay.dataset import ReplayedData
from hfft.replay.store import Recording
from hfft.system.distributed import on_main
from hfft.training.logistic import LinearHead, head_path, held_out_logits
from hfft.training.losses import LabelSetLoss
from hfft.training.trainer import PhaseTrainer

WEIGHT_DECAYS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
"""A solved phase's steps: one for each, the strongest first."""
_ROWS = 512  # at once
_PATIENCE = 3  # weight decays without improvement, after which weaker ones are not tried
_FOLDS = 5  # of the training images, where there are no others to choose by

_LOG = get_logger(__name__)


def solvable_head(model: nn.Module) -> nn.Linear | None:
    """The linear layer that is all that trains; None where that is something else, or more."""
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    linear = [module for module in model.modules() if type(module) is nn.Linear and module.bias is not None]
    return next((layer for layer in linear if {id(layer.weight), id(layer.bias)} == trainable), None)


@torch.no_grad()
def head_inputs(model: Any, layer: nn.Linear, replayed: ReplayedData, view: Recording) -> torch.Tensor:
    """What enters the head in evaluation mode, (N, D) float32 on the network's device, of a recorded view.

    Called while the split point is bypassed.
    """
    if model.get_submodule(replayed.split_point.path) is layer:  # which hooks don't see: it takes what was fed
        return view.rows(range(len(view)))[0].to(model.device, torch.float32)
    found: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().float()))
    model.eval()
    for rows in torch.arange(len(view)).split(_ROWS):
        activations = tuple(tensor.to(model.device) for tensor in view.rows(rows.tolist()))
        model(pixel_values=replayed.split_point.feed(activations))
    hook.remove()
    return torch.cat(found)


def ends_in(model: Any, layer: nn.Linear, replayed: ReplayedData) -> bool:
    """Whether one vector of each image enters the layer, and the logits are what leaves it."""
    with torch.no_grad(), replayed.split_point.bypassed():
        row = tuple(tensor.to(model.device) for tensor in replayed.train.views[0].rows([0]))
        left: list[Any] = []
        hook = layer.register_forward_hook(lambda _, args, output: left.append(output))
        logits = model.eval()(pixel_values=replayed.split_point.feed(row)).logits
        hook.remove()
    return len(left) == 1 and left[0].ndim == 2 and torch.equal(left[0], logits)


class HeadTrainer(PhaseTrainer):
    """Solves a head, and logs, evaluates and saves as a training does: one evaluation for each weight decay.

    Nothing is saved before the end: a phase that was killed is solved again, to the same bits.

    Attributes:
        metrics: By name, from probabilities (N, K) and labels.
    """

    metrics: Mapping[str, Callable[[np.ndarray, np.ndarray], float]]

    def train_to_end(self, title: str) -> None:
        """Leave the best head in the model and on disk."""
        layer = solvable_head(self.model)  # pyright: ignore[reportArgumentType]
        assert layer is not None  # or the phase would take steps
        begun = time.monotonic()
        path = self._path(layer, title)  # which the main process walks
        state: TrainerState = self.state
        state.max_steps = state.num_train_epochs = len(WEIGHT_DECAYS)
        self.callback_handler.on_train_begin(self.args, state, self.control)
        metric = str(self.args.metric_for_best_model).removeprefix("eval_")
        sign = 1 if self.args.greater_is_better else -1
        best, best_head, best_rank, value = 0, None, (-math.inf, -math.inf), math.nan
        for step in range(1, len(WEIGHT_DECAYS) + 1):
            head, found = on_main(lambda: next(path))
            state.global_step, state.epoch = step, float(step)
            self._about = {"weight_decay": head.weight_decay, "lbfgs_steps": head.steps, "slope": head.slope}
            if self.eval_dataset is not None:
                _put(layer, head)
                found = {name.removeprefix("eval_"): number for name, number in self.evaluate().items()}
            else:
                self.log({f"folds_{name}": number for name, number in found.items()})
            rank = (sign * found[metric], -found.get("log_loss", 0.0))
            if rank > best_rank:  # of equal ones, the strongest decay stays
                best, best_head, best_rank, value = step, head, rank, found[metric]
            elif step - best >= _PATIENCE:
                break
        assert best_head is not None
        tried, self._about = state.global_step, {}
        _put(layer, best_head)
        state.global_step = state.best_global_step = best
        state.best_metric = value
        self.args.save_only_model = True
        self._save_checkpoint(self.model, trial=None)
        self.callback_handler.on_save(self.args, state, self.control)
        state.global_step = tried
        seconds = time.monotonic() - begun
        images: Any = self.train_dataset
        self.log({"train_runtime": seconds, "train_samples_per_second": round(len(images) / seconds, 3)})
        self.callback_handler.on_train_end(self.args, state, self.control)
        where = "validation" if self.eval_dataset is not None else f"the images of other folds ({_FOLDS})"
        chosen = f"weight decay {best_head.weight_decay:g}, the best of {tried}"
        _LOG.info(f"{title}: solved in {seconds:.1f} s; {chosen}: {metric} {value:.4f} on {where}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the weight decay at hand, and how far the solver came."""
        super().log({**logs, **self._about}, start_time)

    _about: Mapping[str, float] = {}

    def _path(self, layer: nn.Linear, title: str) -> Iterator[tuple[LinearHead, dict[str, float]]]:
        """The heads, each with its metrics over folds of the images where there are no validation images."""
        data: Any = self.train_dataset
        assert self._replayed is not None
        model: Any = self.model
        views = [head_inputs(model, layer, self._replayed, view) for view in data.views]  # (N, D) each
        if views[0].device.type != "cuda":
            views = [view.cpu() for view in views]  # MPS has no float64
        device = views[0].device
        labels = torch.from_numpy(np.asarray(data.labels)).to(device)  # (N,) or (N, K)
        if not all(bool(view.isfinite().all()) for view in views):
            raise TrainingError(f"{title}: what enters the head is infinite or no number for some images")
        _LOG.info(f"{title}: solves the head on {len(views)} x {len(labels):,} images")
        classes, truth = layer.out_features, labels.cpu()
        if self.chances is not None:  # an image counts as often as it would be drawn
            shares = labels if labels.is_floating_point() else nn.functional.one_hot(labels, classes)
            labels = shares * (self.chances / self.chances.mean()).to(device, torch.float32)[:, None]
        loss: Any = self.compute_loss_func
        solve = partial(head_path, classes=classes, weight_decays=WEIGHT_DECAYS, loss=loss)
        folds = self._fold_metrics(views, labels, truth, solve) if self.eval_dataset is None else repeat({})
        heads = solve(torch.cat(views), torch.cat([labels] * len(views)))
        for head, found in zip(heads, folds, strict=False):
            yield head.cpu(), found

    def _fold_metrics(
        self, views: list[torch.Tensor], labels: torch.Tensor, truth: torch.Tensor, solve: Any
    ) -> list[dict[str, float]]:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.args.seed))
        logits = held_out_logits(views, labels, order % _FOLDS, solve)
        if isinstance(self.compute_loss_func, LabelSetLoss):
            shares = logits.sigmoid()
        else:
            shares, truth = logits.softmax(dim=2), truth if truth.ndim == 1 else truth.argmax(dim=1)
        return [
            {name: float(measure(one, truth.numpy())) for name, measure in self.metrics.items()}
            for one in shares.numpy()
        ]


@torch.no_grad()
def _put(layer: nn.Linear, head: LinearHead) -> None:
    layer.weight.copy_(head.weight)
    layer.bias.copy_(head.bias)

"""One pass over some images through the frozen part of a network, into recordings, shared by all processes."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from hfft.data.images.batches import Examples
from hfft.data.images.workers import dead_workers_named
from hfft.replay.dataset import ActivationDataset
from hfft.replay.store import RecordingFiles
from hfft.system.distributed import meet
from hfft.system.machine import cpus_per_process
from hfft.system.progress import bar

_CORES, _MOST_THREADS = 4, 4  # one thread writes per so many cores; each holds a file in memory

Tensors = Sequence[torch.Tensor]
Compute = Callable[[Tensors], Sequence[Tensors]]
"""Pixels or activations of B examples -> for each recording the tensors of B rows; B never changes."""


@dataclass(frozen=True, kw_only=True)
class FrozenPass:
    """What a phase computes activations with, and of which images: `train`, and `validation` if there is any.

    Attributes:
        network: As the phase trains it, on the device.
        floats: Pixels of a batch to what the network takes.
        autocast: The type that the phase computes in; None is float32.
        batch_size: Images per forward pass of training.
    """

    network: Any
    splits: Mapping[str, Examples]
    floats: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    autocast: torch.dtype | None
    batch_size: int
    workers: int
    title: str

    def pixels(self, count: int) -> torch.Tensor:
        """The first training images, over again where there are fewer, (count, C, H, W), on the device."""
        examples = self.splits["train"]
        images = [examples[number]["pixel_values"] for number in range(min(count, len(examples)))]
        pixels = torch.stack([images[number % len(images)] for number in range(count)])
        return self.floats(pixels.to(self.device))


def record_activations(
    recordings: Sequence[RecordingFiles],
    compute: Compute,
    examples: Examples | ActivationDataset,
    *,
    batch: int,
    workers: int,
    title: str,
) -> int:
    """Write what is missing of recordings that were planned together; to finish them is left to the caller.

    The examples are the images, or what enters an earlier split point; the last batch is filled up with copies.

    Returns:
        Images that all processes together computed; OSError in every process, if one of them couldn't write.
    """
    state = PartialState()
    first, stop = (len(examples) * (state.process_index + end) // state.num_processes for end in (0, 1))
    own = [span for span in recordings[0].spans if first <= span.start < stop]
    missing = {files: files.missing(own) for files in recordings}
    spans = [span for span in own if any(span in those for those in missing.values())]
    batches = [range(begin, min(begin + batch, span.stop)) for span in spans for begin in span[::batch]]
    problem: str | None = None
    threads = min(max(cpus_per_process() // _CORES, 1), _MOST_THREADS)
    pending: deque[Future[None]] = deque()
    try:
        with (
            dead_workers_named(),
            ThreadPoolExecutor(threads, "hfft-recording") as pool,
            bar(title, sum(map(len, batches))) as shown,
        ):
            outputs = _outputs(batches, compute, examples, batch=batch, workers=workers)
            for span in spans:
                blocks = [files.blocks(span) for files in recordings]
                for begin in range(0, len(span), batch):
                    for block, tensor in zip(chain(*blocks), chain(*next(outputs)), strict=True):
                        block[begin : begin + batch] = tensor[: len(span) - begin]
                    shown.update(min(batch, len(span) - begin))
                complete = [pair for pair in zip(recordings, blocks, strict=True) if span in missing[pair[0]]]
                pending.extend(pool.submit(files.write, span, tensors) for files, tensors in complete)
                while len(pending) > threads:  # no more files are held in memory
                    pending.popleft().result()
            for write in pending:
                write.result()
    except OSError as error:
        problem = str(error)
    meet()  # one of them may have a file more to write
    gathered = gather_object([(problem, sum(map(len, batches)))])
    problems = [found for found, _ in gathered if found is not None]
    if problems:
        raise OSError(problems[0])
    return sum(count for _, count in gathered)


def _outputs(
    batches: Sequence[range], compute: Compute, examples: Examples | ActivationDataset, *, batch: int, workers: int
) -> Iterator[Sequence[Tensors]]:
    """What is computed from each batch; one batch is computed while the last one is written."""
    device = torch.device(str(PartialState().device))
    pins = device.type == "cuda"
    sampler = [list(rows) for rows in batches]
    loader = DataLoader(examples, batch_sampler=sampler, collate_fn=_inputs, num_workers=workers, pin_memory=pins)

    def computed(inputs: Tensors) -> Sequence[Tensors]:
        return compute([_filled(tensor.to(device, non_blocking=pins), batch) for tensor in inputs])

    with ThreadPoolExecutor(1) as ahead:
        waiting: deque[Future[Sequence[Tensors]]] = deque()
        for inputs in loader:
            waiting.append(ahead.submit(computed, inputs))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        for last in waiting:
            yield last.result()


def _inputs(examples: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    rows = [example.get("activations") or (example["pixel_values"],) for example in examples]
    return [torch.stack(leaf) for leaf in zip(*rows, strict=True)]  # each (B, ...)


def _filled(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat([tensor, tensor[-1:].expand(batch - len(tensor), *tensor.shape[1:])])

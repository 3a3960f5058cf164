"""One pass over some images through the frozen part of a network, into recordings, shared by all processes."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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

Compute = Callable[[Sequence[torch.Tensor]], Sequence[Sequence[torch.Tensor]]]
"""Pixels or activations of B examples -> for each recording the tensors of B rows; B never changes."""


@dataclass(frozen=True, kw_only=True)
class FrozenPass:
    """What a phase computes activations with, and of which images.

    Attributes:
        network: As the phase trains it, on the device.
        splits: `train`, and `validation` if there is any.
        floats: Pixels of a batch to what the network takes.
        autocast: The type that the phase computes in; None is float32.
        batch_size: Images per forward pass of training.
        workers: Processes that read images.
        title: Of the phase.
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
    """Write what is missing of some recordings of the same images; to finish them is left to the caller.

    Args:
        recordings: Planned with this batch size.
        compute: The frozen part.
        examples: The images, or what enters an earlier split point, in the order of the rows.
        batch: Images per forward pass; the last batch is filled up with copies of its last image.
        workers: Processes that read images.
        title: Of the progress bar.

    Returns:
        Images that were computed, by all processes together.

    Raises:
        OSError: In every process, if one of them couldn't write.
    """
    state = PartialState()
    first, stop = (len(examples) * (state.process_index + end) // state.num_processes for end in (0, 1))
    writers = [
        _Writer(files, files.missing([span for span in files.spans if first <= span.start < stop]))
        for files in recordings
    ]
    begins = sorted({begin for writer in writers for span in writer.spans for begin in span[::batch]})
    problem: str | None = None
    computed = 0
    threads = min(max(cpus_per_process() // _CORES, 1), _MOST_THREADS)
    pending: deque[Future[None]] = deque()
    try:
        with dead_workers_named(), ThreadPoolExecutor(threads, "hfft-recording") as pool:
            for rows, outputs in _pass(begins, compute, examples, batch=batch, workers=workers, title=title):
                complete = (writer.add(rows, tensors) for writer, tensors in zip(writers, outputs, strict=True))
                pending.extend(pool.submit(write) for write in complete if write is not None)
                computed += len(rows)
                while len(pending) > threads:  # no more files are held in memory
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
    except OSError as error:
        problem = str(error)
    meet()  # one of them may have a file more to write
    gathered = gather_object([(problem, computed)])
    problems = [found for found, _ in gathered if found is not None]
    if problems:
        raise OSError(problems[0])
    return sum(count for _, count in gathered)


class _Writer:
    """Gathers the rows of a file."""

    def __init__(self, files: RecordingFiles, spans: Sequence[range]) -> None:
        self.spans = spans
        self._files = files
        self._blocks: list[torch.Tensor] = []

    def add(self, rows: range, tensors: Sequence[torch.Tensor]) -> Callable[[], None] | None:
        """Copy a batch into memory; returns what writes the file, once its rows are complete."""
        span = next((span for span in self.spans if rows.start in span), None)
        if span is None:
            return None
        if rows.start == span.start:
            self._blocks = [torch.empty(block.shape, dtype=block.dtype) for block in self._files.blocks(span)]
        for block, tensor in zip(self._blocks, tensors, strict=True):
            block[rows.start - span.start : rows.stop - span.start] = tensor[: len(rows)]
        return partial(self._files.write, span, self._blocks) if rows.stop == span.stop else None


def _pass(
    begins: Sequence[int],
    compute: Compute,
    examples: Examples | ActivationDataset,
    *,
    batch: int,
    workers: int,
    title: str,
) -> Iterator[tuple[range, Sequence[Sequence[torch.Tensor]]]]:
    """The rows of each batch, and what is computed from them; one batch is computed while the last one is written."""
    spans = [range(begin, min(begin + batch, len(examples))) for begin in begins]
    batches = [list(span) for span in spans]
    device = torch.device(str(PartialState().device))
    pins = device.type == "cuda"
    loader = DataLoader(examples, batch_sampler=batches, collate_fn=_inputs, num_workers=workers, pin_memory=pins)

    def computed(inputs: Sequence[torch.Tensor]) -> Sequence[Sequence[torch.Tensor]]:
        return compute([_filled(tensor.to(device, non_blocking=pins), batch) for tensor in inputs])

    with bar(title, sum(map(len, spans))) as shown, ThreadPoolExecutor(1) as ahead:
        waiting: deque[tuple[range, Future[Any]]] = deque()
        for span, inputs in zip(spans, loader, strict=True):
            waiting.append((span, ahead.submit(computed, inputs)))
            while len(waiting) > (span is not spans[-1]):
                done, outputs = waiting.popleft()
                yield done, outputs.result()
                shown.update(len(done))


def _inputs(examples: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    rows = [example.get("activations") or (example["pixel_values"],) for example in examples]
    return [torch.stack(leaf) for leaf in zip(*rows, strict=True)]  # each (B, ...)


def _filled(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat([tensor, tensor[-1:].expand(batch - len(tensor), *tensor.shape[1:])])

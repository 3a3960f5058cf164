"""One pass over some images through the frozen part of a network, into recordings, shared by all processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from hfft.data.batches import Examples
from hfft.distributed import meet
from hfft.progress import bar
from hfft.training.activations import RecordedExamples
from hfft.training.recordings import Recorder
from hfft.training.workers import dead_workers_named

Compute = Callable[[Sequence[torch.Tensor]], Sequence[Sequence[torch.Tensor]]]
"""Pixels or activations of B examples -> for each recorder the tensors of B rows that it writes; B never changes."""


def fill(
    recorders: Sequence[Recorder],
    compute: Compute,
    examples: Examples | RecordedExamples,
    *,
    batch: int,
    workers: int,
    title: str,
) -> int:
    """Write what is missing of some recordings of the same images; to finish them is left to the caller.

    Args:
        recorders: Made with this batch size.
        compute: The frozen part.
        examples: The images, or what enters an earlier cut, in the order of the rows.
        batch: Images per forward pass; the last batch is filled up with copies of its last image.
        workers: Processes that read images.
        title: Shown beside the progress.

    Returns:
        Images that were computed, by all processes together.

    Raises:
        OSError: In every process, if one of them couldn't write.
    """
    state = PartialState()
    first, stop = (len(examples) * (state.process_index + end) // state.num_processes for end in (0, 1))
    writers = [
        _Writer(recorder, recorder.missing([span for span in recorder.spans if first <= span.start < stop]))
        for recorder in recorders
    ]
    begins = sorted({begin for writer in writers for span in writer.spans for begin in span[::batch]})
    problem: str | None = None
    computed = 0
    try:
        with dead_workers_named():
            for rows, outputs in _pass(begins, compute, examples, batch=batch, workers=workers, title=title):
                for writer, tensors in zip(writers, outputs, strict=True):
                    writer.add(rows, tensors)
                computed += len(rows)
    except OSError as error:
        problem = str(error)
    meet()  # one of them may have a file more to write
    shares = gather_object([(problem, computed)])
    problems = [found for found, _ in shares if found is not None]
    if problems:
        raise OSError(problems[0])
    return sum(count for _, count in shares)


class _Writer:
    """Gathers batches until the rows of a file are complete."""

    def __init__(self, recorder: Recorder, spans: Sequence[range]) -> None:
        self.spans = spans
        self._recorder = recorder
        self._batches: list[Sequence[torch.Tensor]] = []

    def add(self, rows: range, tensors: Sequence[torch.Tensor]) -> None:
        span = next((span for span in self.spans if rows.start in span), None)
        if span is None:
            return
        self._batches.append([tensor[: len(rows)].cpu() for tensor in tensors])
        if rows.stop == span.stop:
            self._recorder.write(span, [torch.cat(leaf) for leaf in zip(*self._batches, strict=True)])
            self._batches = []


def _pass(
    begins: Sequence[int],
    compute: Compute,
    examples: Examples | RecordedExamples,
    *,
    batch: int,
    workers: int,
    title: str,
) -> Iterator[tuple[range, Sequence[Sequence[torch.Tensor]]]]:
    """The rows of each batch, and what is computed from them."""
    spans = [range(begin, min(begin + batch, len(examples))) for begin in begins]
    batches = [list(span) for span in spans]
    loader = DataLoader(examples, batch_sampler=batches, collate_fn=_inputs, num_workers=workers)
    device, images = PartialState().device, sum(map(len, spans))

    def computed(inputs: Sequence[torch.Tensor]) -> Sequence[Sequence[torch.Tensor]]:
        return compute([_filled(tensor, batch).to(device) for tensor in inputs])

    with bar(title, images) as shown, ThreadPoolExecutor(1) as ahead:
        waiting: list[tuple[range, Future[Any]]] = []  # one batch is computed while the one before is written
        for span, inputs in zip(spans, loader, strict=True):
            waiting.append((span, ahead.submit(computed, inputs)))
            if len(waiting) > 1:
                done, outputs = waiting.pop(0)
                yield done, outputs.result()
                shown.update(len(done))
        for done, outputs in waiting:
            yield done, outputs.result()
            shown.update(len(done))


def _inputs(examples: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    rows = [example.get("activations") or (example["pixel_values"],) for example in examples]
    return [torch.stack(leaf) for leaf in zip(*rows, strict=True)]  # each (B, ...)


def _filled(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat([tensor, tensor[-1:].expand(batch - len(tensor), *tensor.shape[1:])])

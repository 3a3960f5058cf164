"""Near duplicates: pairs of similar thumbnails, found in far less than quadratic time, then compared closely."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
from PIL import Image

from hfft.system.distributed import warn

# Thumbnails whose correlation is higher may show one picture. Among 2,624 solar cells, photographed alike, the most
# similar two have 0.9983; the same cells saved as JPEG of quality 50 or at half size stay above 0.9988.
CORRELATION = 0.999
# Then their pixels must agree, in means of 2 x 2 of at most 128 x 128 pixels, and up to brightness and contrast: a
# scratch of 2 x 20 pixels changes a 300 x 300 photo by 27 levels, a JPEG of quality 30 by 6.
DIFFERENCE = 16.0
_PLAIN = 3.0  # standard deviation in gray levels, below which a thumbnail says too little
_DIRECTIONS = 12  # that thumbnails are projected on; the first _GRID of them make the grid
_GRID = 4
_HALF = 64  # cells on each side of 0
_STRIDES = (2 * _HALF) ** np.arange(_GRID, dtype=np.int64)
_CHUNK = 4096  # thumbnails
_PAIRS = 1 << 20  # that are compared at once
_CROWD = 64  # thumbnails in a cell, from which on those alike are found through one of them
_ROUNDS = 200
_MOST_PAIRS = 200_000_000  # candidates that are compared
_MOST_OPENED = 50_000  # pairs of images that are opened


def similar_pairs(thumbnails: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Pairs of thumbnails with a correlation above `CORRELATION`, (P, 2), the smaller index first, sorted.

    Two thumbnails of mean 0 and length 1 with that correlation lie within sqrt(2 - 2 * CORRELATION) of each other,
    and so do their projections on any direction. So it is enough to compare those in neighboring cells of a grid of
    that width, which leaves out no pair; directions of low spatial frequency spread pictures most. In a crowded cell,
    such as the frames of a fixed camera fill, pictures that are like one of them are paired with that one alone.
    Plain thumbnails, of (N, S, S) uint8, have no pairs. The pairs are of places in `rows`, the numbers of those
    compared, (R,).
    """
    projected, usable = _project(thumbnails, rows)
    radius = float(np.sqrt(2 - 2 * CORRELATION)) * 1.001
    # Number of each one's cell; projections are within -1 and 1.
    keys = (np.floor(projected[:, :_GRID] / radius).astype(np.int64) + _HALF) @ _STRIDES
    absorbed, found = _crowds(thumbnails, rows[usable], keys)
    found = [usable[pairs] for pairs in found]
    left = np.flatnonzero(~absorbed)
    projected, usable, keys = projected[left], usable[left], keys[left]
    for pairs in _neighbors(keys):
        near = ((projected[pairs[:, 0]] - projected[pairs[:, 1]]) ** 2).sum(axis=1) <= radius**2
        pairs = usable[pairs[near]]
        for start in range(0, len(pairs), _CHUNK):
            part = pairs[start : start + _CHUNK]
            first, second = (_unit(thumbnails[rows[part[:, side]]]) for side in (0, 1))
            found.append(part[(first * second).sum(axis=1) > CORRELATION])
    pairs = np.sort(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def is_same_picture(first: Image.Image, second: Image.Image) -> bool:
    """Whether two gray images show the same picture, saved in two ways."""
    side = max(32, min(128, min(*first.size, *second.size) // 2))
    small = [np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float64) for image in (first, second)]
    a, b = (pixels - pixels.mean() for pixels in small)  # (side, side)
    weaker, stronger = sorted((a, b), key=lambda pixels: float((pixels**2).sum()))
    scale = float((weaker * stronger).sum() / max((weaker**2).sum(), 1e-9))
    rest = stronger - scale * weaker
    even = side // 2 * 2
    means = rest[:even, :even].reshape(even // 2, 2, even // 2, 2).mean(axis=(1, 3))
    return scale > 0 and float(np.abs(means).max()) <= DIFFERENCE


def group(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected sets of the numbers in pairs; each sorted, in the order of their smallest."""
    parents: dict[int, int] = {}

    def root(number: int) -> int:
        while (parent := parents.setdefault(number, number)) != number:
            parents[number] = parents[parent]
            number = parent
        return number

    for first, second in pairs:
        a, b = sorted((root(first), root(second)))
        parents[b] = a
    members: dict[int, list[int]] = {}
    for number in sorted(parents):
        members.setdefault(root(number), []).append(number)
    return list(members.values())


def same_pictures(
    thumbnails: np.ndarray, rows: np.ndarray, gray: Callable[[int], Image.Image]
) -> list[tuple[int, int]]:
    """Pairs of images that show the same picture, as places in `rows`, the numbers of those compared, (R,).

    `thumbnails` are (N, S, S) uint8; `gray` gives the image of a number in mode L, for those that are alike.
    """
    found: list[tuple[int, int]] = []
    known: dict[int, int] = {}  # index -> a picture that it is the same as
    opened = 0
    alike: list[list[int]] = similar_pairs(thumbnails, rows).tolist()
    for first, pairs in groupby(alike, key=lambda pair: pair[0]):
        image: Image.Image | None = None
        for _, second in pairs:
            same = known.get(first, first)
            if same == known.get(second, second):
                continue
            if opened == _MOST_OPENED:
                warn(f"near duplicates: only {opened} pairs of images that are nearly alike were compared")
                return found
            opened += 1
            image = gray(int(rows[first])) if image is None else image
            if is_same_picture(image, gray(int(rows[second]))):
                found.append((first, second))
                known[second] = same
    return found


def _unit(thumbnails: np.ndarray) -> np.ndarray:
    """(N, S * S) float32 of mean 0 and length 1."""
    flat = thumbnails.reshape(len(thumbnails), int(np.prod(thumbnails.shape[1:]))).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _project(thumbnails: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projections of the rows that aren't plain, (M, D) float32, and their indices, (M,)."""
    basis = _low_frequencies(thumbnails.shape[1])
    parts, indices = [np.zeros((0, _DIRECTIONS), np.float32)], [np.zeros(0, np.int64)]
    for start in range(0, len(rows), _CHUNK):
        chunk = thumbnails[rows[start : start + _CHUNK]]
        usable = np.flatnonzero(chunk.std(axis=(1, 2)) >= _PLAIN)
        parts.append(_unit(chunk[usable]) @ basis)
        indices.append(usable + start)
    return np.concatenate(parts), np.concatenate(indices)


def _low_frequencies(side: int) -> np.ndarray:
    """The first cosine transforms in two dimensions but the mean, (side * side, D), orthonormal."""
    steps = (np.arange(side) + 0.5) * np.pi / side
    waves = [np.cos(steps * frequency) for frequency in range(5)]
    order = sorted(((a, b) for a in range(5) for b in range(5) if a + b > 0), key=lambda ab: (ab[0] + ab[1], ab))
    columns = [np.outer(waves[a], waves[b]).ravel() for a, b in order[:_DIRECTIONS]]
    return np.stack([column / np.linalg.norm(column) for column in columns], axis=1).astype(np.float32)


def _crowds(thumbnails: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """In crowded cells: which of M rows are like an earlier one, (M,) bool, and each with that one, (P, 2) arrays."""
    absorbed, pairs = np.zeros(len(keys), dtype=bool), []
    order = np.argsort(keys, kind="stable")
    _, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    for cell in np.flatnonzero(counts > _CROWD):
        members = order[starts[cell] : starts[cell] + counts[cell]]
        for _ in range(_ROUNDS):
            if len(members) <= _CROWD:
                break
            leader, members = members[0], members[1:]
            unit = _unit(thumbnails[rows[leader : leader + 1]])[0]
            parts = np.split(members, range(_CHUNK, len(members), _CHUNK))
            alike = np.concatenate([_unit(thumbnails[rows[part]]) @ unit > CORRELATION for part in parts])
            absorbed[members[alike]] = True
            pairs.append(np.stack([np.full(alike.sum(), leader), members[alike]], axis=1))
            members = members[~alike]
    return absorbed, pairs


def _neighbors(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of points in the same or neighboring cells, each once, (P, 2) at a time."""
    order = np.argsort(keys, kind="stable")
    occupied, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * _GRID, indexing="ij"), axis=-1).reshape(-1, _GRID) @ _STRIDES
    left = _MOST_PAIRS
    for step in sorted(step for step in steps.tolist() if step >= 0) if len(keys) else ():
        places = np.searchsorted(occupied, occupied + step)
        there = np.flatnonzero((places < len(occupied)) & (occupied[places % len(occupied)] == occupied + step))
        for cell in _batches(counts[there] * counts[places[there]]):
            here, other = there[cell], places[there[cell]]
            for pairs in _products(starts[here], counts[here], starts[other], counts[other]):
                if left <= 0:
                    warn("near duplicates: so many images are nearly alike that not all were compared with each other")
                    return
                pairs = pairs[pairs[:, 0] < pairs[:, 1]] if step == 0 else pairs
                left -= len(pairs)
                yield order[pairs]


def _batches(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Indices in runs whose sizes add up to `_PAIRS` or little more."""
    if len(sizes):
        bounds = np.flatnonzero(np.diff(np.cumsum(sizes) // _PAIRS)) + 1
        yield from np.split(np.arange(len(sizes)), bounds)


def _products(
    starts: np.ndarray, counts: np.ndarray, other_starts: np.ndarray, other_counts: np.ndarray
) -> Iterator[np.ndarray]:
    """Every point of a cell with every point of its neighbor, (P, 2), `_PAIRS` or little more at a time."""
    rows = np.repeat(np.arange(len(starts)), counts)  # which run each place of the first kind is in
    firsts = starts[rows] + np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    for part in _batches(other_counts[rows]):
        amounts = other_counts[rows[part]]
        total = int(amounts.sum())
        within = np.arange(total) - np.repeat(np.cumsum(amounts) - amounts, amounts)
        seconds = np.repeat(other_starts[rows[part]], amounts) + within
        yield np.stack([np.repeat(firsts[part], amounts), seconds], axis=1)

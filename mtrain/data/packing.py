"""Decides which samples share a row, from their lengths alone.

The one thing to know: planning works on the histogram of lengths, not on samples. Filling a row
greedily with the largest length that still fits is repeated for as many rows as the histogram
allows at once, so the work is bounded by the number of distinct lengths, plus one pass over the
samples to hand them out.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["Units", "plan_packs", "plan_singles"]


@dataclass(frozen=True, slots=True)
class Units:
    """Groups of samples, each trained on as one row: packs, or single samples.

    `sample_ids` int64 [num_samples]; unit u holds sample_ids[starts[u] : ends[u]].
    """

    sample_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.sample_ids[self.starts[index] : self.ends[index]]


def plan_singles(num_samples: int, *, shuffle: bool, seed: int, epoch: int) -> Units:
    """One sample a unit, in order or in the permutation of (seed, epoch)."""
    order = _order(num_samples, shuffle=shuffle, rng=np.random.default_rng([seed, epoch]))
    return Units(order, np.arange(num_samples), np.arange(1, num_samples + 1))


def plan_packs(
    lengths: np.ndarray,
    *,
    packing_length: int,
    strategy: str,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> Units:
    """Pack every sample exactly once into rows of at most packing_length tokens.

    Args:
        lengths: Tokens of every sample, int [num_samples], each at least 1.
        packing_length: Tokens of a row.
        strategy: "binpack" fills rows tightly; "sequential" closes a row when the next sample does
            not fit, so it keeps the order.
        shuffle: Draw which samples meet, and the order of the rows, from (seed, epoch). Otherwise
            in order of the samples (binpack: of each row's first one).
        seed: Same seed, same plan, on every rank.
        epoch: Each epoch has its own plan.

    Raises:
        ValueError: A sample is longer than a row.
    """
    longest = int(lengths.max(initial=0))
    if longest > packing_length:
        raise ValueError(
            f"--packing_length {packing_length} is shorter than the longest sample ({longest} "
            "tokens); raise it or lower --max_length"
        )
    rng = np.random.default_rng([seed, epoch])
    order = _order(len(lengths), shuffle=shuffle, rng=rng)
    if strategy == "sequential":
        return _pack_in_order(lengths, order, packing_length)
    units = _pack_tightly(lengths, order, packing_length)
    if shuffle:
        rows = rng.permutation(len(units))
    else:
        rows = np.argsort(np.minimum.reduceat(units.sample_ids, units.starts))
    return Units(units.sample_ids, units.starts[rows], units.ends[rows])


def _order(num_samples: int, *, shuffle: bool, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(num_samples) if shuffle else np.arange(num_samples)


def _pack_in_order(lengths: np.ndarray, order: np.ndarray, packing_length: int) -> Units:
    ends_in_tokens = np.cumsum(lengths[order], dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(order):
        used = ends_in_tokens[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends_in_tokens, used + packing_length, side="right")))
    edges = np.array(bounds)
    return Units(order, edges[:-1], edges[1:])


def _pack_tightly(lengths: np.ndarray, order: np.ndarray, packing_length: int) -> Units:
    by_length = order[np.argsort(lengths[order], kind="stable")]
    counts = np.bincount(lengths, minlength=packing_length + 1)
    next_sample = np.concatenate([[0], np.cumsum(counts)[:-1]])
    pieces: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    sizes: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for pattern, num_rows in _row_patterns(counts.tolist(), packing_length):
        columns = []
        for length, repeats in pattern:
            first = next_sample[length]
            next_sample[length] += num_rows * repeats
            taken = by_length[first : next_sample[length]]
            columns.append(taken.reshape(num_rows, repeats))
        rows = np.concatenate(columns, axis=1)
        pieces.append(rows.ravel())
        sizes.append(np.full(num_rows, rows.shape[1]))
    ends = np.cumsum(np.concatenate(sizes))
    return Units(np.concatenate(pieces), np.concatenate([[0], ends[:-1]])[: len(ends)], ends)


def _row_patterns(
    counts: list[int], packing_length: int
) -> list[tuple[list[tuple[int, int]], int]]:
    """Use up a histogram: (pattern, number of rows) pairs; a pattern is (length, repeats) pairs.

    A pattern holds until one of its lengths runs out, so there are at most two a length.
    """
    fitting = _LargestFitting(counts)
    patterns = []
    while length := fitting.find(packing_length):
        pattern, space = [], packing_length
        while length:
            repeats = min(space // length, counts[length])
            pattern.append((length, repeats))
            space -= repeats * length
            length = fitting.find(min(space, length - 1))
        num_rows = min(counts[length] // repeats for length, repeats in pattern)
        for length, repeats in pattern:
            counts[length] -= num_rows * repeats
            if counts[length] == 0:
                fitting.remove(length)
        patterns.append((pattern, num_rows))
    return patterns


class _LargestFitting:
    """The largest length that is still there and not over a bound, in amortised constant time.

    A union-find over lengths: a used-up length points to the next smaller one; 0 means none.
    """

    def __init__(self, counts: list[int]) -> None:
        self._next = [length if count else length - 1 for length, count in enumerate(counts)]
        self._next[0] = 0

    def find(self, bound: int) -> int:
        links = self._next
        while links[bound] != bound:
            links[bound] = links[links[bound]]
            bound = links[bound]
        return bound

    def remove(self, length: int) -> None:
        self._next[length] = length - 1

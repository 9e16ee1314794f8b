"""How many bits the weights of each layer have, so that all fit into a size and the output has the least noise.

Noise of layers adds up, as that of :func:`lightning_quant.tuning.candidates` does, so that this is a knapsack with one
choice for each layer. It is solved exactly, layer by layer, with all sums that no other one beats in both size and
noise (Nemhauser and Ullmann 1969, https://doi.org/10.1287/mnsc.15.9.494), while these are few enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Sums that are kept. Of more, those are dropped that are smaller than their neighbours by the least.
_MOST_SUMS = 20_000


@dataclass(frozen=True, kw_only=True)
class WeightCosts:
    """What the weights of one layer take and cost.

    Attributes:
        name: Of the layer.
        sizes: Bits -> bytes.
        noises: Bits -> noise of the output over its signal, where only these weights are rounded. The same bits.
    """

    name: str
    sizes: Mapping[int, int]
    noises: Mapping[int, float]


def least_size(layers: Sequence[WeightCosts]) -> int:
    """Bytes of all weights, each with the bits that take fewest."""
    return sum(min(layer.sizes.values()) for layer in layers)


def choose_bits(layers: Sequence[WeightCosts], max_bytes: int) -> dict[str, int]:
    """Bits of each layer with the least sum of noises whose sizes sum up to ``max_bytes`` at most.

    Exact, as long as there are no more than some thousand sums that none beats; beyond that the size is still kept to.

    Args:
        layers: Each with at least one width.
        max_bytes: The bound. If even the fewest bytes are more, each layer has those.

    >>> first = WeightCosts(name="a", sizes={8: 100, 4: 50}, noises={8: 0.0, 4: 2.0})
    >>> second = WeightCosts(name="b", sizes={8: 100, 4: 50}, noises={8: 0.0, 4: 1.0})
    >>> choose_bits([first, second], 150)
    {'a': 8, 'b': 4}
    """
    least = [min(layer.sizes.values()) for layer in layers]
    behind = np.cumsum([0, *least[::-1]])[::-1]  # bytes that the layers from this one on take at least
    room = max(max_bytes, int(behind[0]))
    sizes, noises = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []  # for each sum: the one that it extends, and the width
    for number, layer in enumerate(layers):
        widths = sorted(layer.sizes, reverse=True)  # of equal ones the most bits are taken
        extended = np.concatenate([sizes + layer.sizes[width] for width in widths])
        noisy = np.concatenate([noises + layer.noises[width] for width in widths])
        parents, chosen = np.tile(np.arange(len(sizes)), len(widths)), np.repeat(widths, len(sizes))
        kept = np.flatnonzero(extended <= room - behind[number + 1])
        kept = _unbeaten(extended, noisy, kept)
        sizes, noises = extended[kept], noisy[kept]
        history.append((parents[kept], chosen[kept]))
    place = int(np.argmin(noises))
    found = {}
    for layer, (parents, chosen) in zip(reversed(layers), reversed(history), strict=True):
        found[layer.name] = int(chosen[place])
        place = int(parents[place])
    return {layer.name: found[layer.name] for layer in layers}


def _unbeaten(sizes: np.ndarray, noises: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Places of the sums that no other one is better than in one way and as good as in the other, by size."""
    order = among[np.lexsort((noises[among], sizes[among]))]
    best = np.minimum.accumulate(noises[order])
    order = order[np.concatenate([[True], noises[order][1:] < best[:-1]])]
    if len(order) <= _MOST_SUMS:
        return order
    # one of each stretch of sizes, the last and so the least noisy; the smallest of all stays
    stretches = (sizes[order] - sizes[order[0]]) * _MOST_SUMS // (sizes[order[-1]] - sizes[order[0]] + 1)
    last = np.concatenate([stretches[1:] != stretches[:-1], [True]])
    last[0] = True
    return order[last]

"""Cross-layer equalization: scale channels between two layers so that both have weights that fill their ranges.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
https://arxiv.org/abs/1906.04721, section 4.1. Between ``W1`` and ``W2`` with something positively homogeneous between
them, row ``i`` of ``W1`` (and its bias) is divided by ``s_i`` and column ``i`` of ``W2`` multiplied by it, with
``s_i = sqrt(r1_i * r2_i) / r2_i`` of the ranges ``r = max|w|`` (equation 11): afterwards both ranges are
``sqrt(r1_i * r2_i)``. The float function stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from lightning_quant.backends.flow import Flow, Pair
from lightning_quant.backends.weighted import WeightedLayer
from lightning_quant.corrections.recording import Calls, changed, note, observe_again

#: Pairs in a chain pull at each other: as the paper, all are scaled in turn until none moves.
_ROUNDS = 200
#: The largest ratio of two scales of one channel that counts as none.
_STANDS = 1e-4


def cross_layer_equalization(prepared: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """A copy with the ranges of weights equalized between layers; its float function is the same.

    Pairs are convolutions (dense, grouped, depthwise, transposed) and linear layers of which the second alone reads the
    first, through nothing, a ReLU, LeakyReLU or PReLU, a pooling or an average of positions. Where a layer has one
    scale for each output channel, its columns and the ranges of activations are what gains.

    Args:
        prepared: From :func:`lightning_quant.prepare` for ``static``, by ``fx``, ``eager`` or ``pt2e``. Not changed.
        batches: Inputs, each a tensor, a tuple of positional or a dict of keyword arguments. Activations are observed
            again on them, and on nothing else.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        ConfigError: There is no batch; the method or the backend is another one; a user's own observer cannot begin
            again.
    """
    return changed(prepared, batches, _equalize)


def _equalize(graph_module: fx.GraphModule, calls: Calls) -> None:
    done = equalize(graph_module)
    note(graph_module, "cross_layer_equalization", done, "pairs of layers")
    if done:
        observe_again(graph_module, calls)


def equalize(graph_module: fx.GraphModule) -> int:
    """Change the weights of one graph. Gives the number of pairs."""
    pairs = Flow(graph_module).pairs()
    # by float64, and rounded once at the end
    weights = {layer.key: layer.grouped().double().cpu() for pair in pairs for layer in (pair.first, pair.second)}
    outputs = {pair.first.key: torch.ones(pair.first.output_channels, dtype=torch.float64) for pair in pairs}
    for _ in range(_ROUNDS):
        moved = max((_scale(pair, weights, outputs) for pair in pairs), default=0.0)
        if moved < _STANDS:
            break
    _store(pairs, weights, outputs)
    return len(pairs)


def _scale(pair: Pair, weights: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> float:
    """Scale one pair. Gives by how much, at the most, as the logarithm of a ratio."""
    first, second = weights[pair.first.key], weights[pair.second.key]
    given = ranges_of_outputs(first)
    read = ranges_of_inputs(second).reshape(-1, pair.positions).amax(1)
    live = (given > 0) & (read > 0)  # a channel that is not used has no range
    scale = torch.where(live, torch.sqrt(given * read) / torch.where(live, read, 1.0), 1.0)
    weights[pair.first.key] = first / scale.reshape(first.shape[0], -1, 1, 1)
    weights[pair.second.key] = second * scale.repeat_interleave(pair.positions).reshape(second.shape[0], 1, -1, 1)
    outputs[pair.first.key] /= scale
    return float(scale.log().abs().max())


def ranges_of_outputs(grouped: torch.Tensor) -> torch.Tensor:
    """``(output channels,)``, the largest absolute weight of each, of ``(groups, outputs, inputs, taps)``."""
    return grouped.abs().amax((2, 3)).reshape(-1)


def ranges_of_inputs(grouped: torch.Tensor) -> torch.Tensor:
    """``(input channels,)``, the largest absolute weight that reads each, of ``(groups, outputs, inputs, taps)``."""
    return grouped.abs().amax((1, 3)).reshape(-1)


def _store(pairs: Sequence[Pair], weights: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
    layers: dict[str, WeightedLayer] = {x.key: x for pair in pairs for x in (pair.first, pair.second)}
    for key, layer in layers.items():
        if key in outputs:
            layer.scale_normal(outputs[key])
        layer.set_weight(layer.ungrouped(weights[key]))
        if layer.bias is not None and key in outputs:
            layer.set_bias(layer.bias.double().cpu() * outputs[key])

"""What corrections have changed in a graph, as tensors and numbers that one process sends to the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lightning_quant import observers
from lightning_quant.backends.graph import Correction, Normal, info, with_info
from lightning_quant.backends.graph import observers as observers_of
from lightning_quant.backends.norms import norms
from lightning_quant.backends.weighted import weighted_layers


@dataclass(frozen=True)
class Changes:
    """All that a correction may change, of one graph.

    Attributes:
        layers: Key of a layer -> weight, bias, and the scale that its weight is fixed to.
        norms: Node of a normalization -> its vectors.
        searches: Observer of an activation that counts -> how its range is searched, and the percentile.
        normals: What is known of the outputs of layers, which are scaled.
        corrected: What was noted.
    """

    layers: dict[str, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
    norms: dict[str, tuple[torch.Tensor, ...]]
    searches: dict[str, tuple[str, float]]
    normals: dict[str, Normal]
    corrected: tuple[Correction, ...]


def changes_of(graph_module: nn.Module) -> Changes:
    """Of a prepared graph, on the CPU."""
    assert isinstance(graph_module, fx.GraphModule)
    layers = {}
    for layer in weighted_layers(graph_module):
        tensors = (layer.weight, layer.bias, layer.fixed_scale)
        weight, bias, scale = (None if x is None else x.detach().cpu().clone() for x in tensors)
        assert weight is not None
        layers[layer.key] = (weight, bias, scale)
    return Changes(
        layers=layers,
        norms={norm.node: tuple(x.cpu().clone() for x in norm.vectors()) for norm in norms(graph_module)},
        searches={name: (x.search, x.percentile) for name, x in _counting(graph_module).items()},
        normals=info(graph_module).normals,
        corrected=info(graph_module).corrected,
    )


def make(graph_module: nn.Module, changes: Changes) -> None:
    """Change a graph of the same model, in place, as another one was: to the bit."""
    assert isinstance(graph_module, fx.GraphModule)
    for layer in weighted_layers(graph_module):
        weight, bias, scale = changes.layers[layer.key]
        if scale is not None:
            layer.fix_ranges(scale)
        if not torch.equal(weight, layer.weight.cpu()):
            layer.set_weight(weight)
        if bias is not None and (layer.bias is None or not torch.equal(bias, layer.bias.cpu())):
            layer.set_bias(bias)
    for norm in norms(graph_module):
        norm.set_vectors(changes.norms[norm.node])
    for name, observer in _counting(graph_module).items():
        observer.search, observer.percentile = changes.searches[name]
    with_info(graph_module, replace(info(graph_module), normals=changes.normals, corrected=changes.corrected))


def _counting(graph_module: nn.Module) -> dict[str, Any]:
    found = observers_of(graph_module)
    return {name: observer for name, observer in found.items() if observers.is_histogram(observer)}

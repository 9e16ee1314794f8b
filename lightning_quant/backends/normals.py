"""How the outputs of layers are distributed into which a batch norm was folded, known without any data.

A batch norm gives each channel its own mean, ``beta``, and standard deviation, ``gamma``. Once it is folded into the
layer before it, both are gone from the graph: they are written down when a graph is made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_quant.backends.graph import Normal, Prepared, info, with_info


def normals_of(model: nn.Module, known: Prepared) -> dict[str, Normal]:
    """Name of each layer into which a batch norm was folded -> how its output is distributed.

    A layer that was folded with several batch norms, each for another call, is left out: its name says not which.

    Args:
        model: In float: what the graph stands for.
        known: Of the graph, with what was fused in it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # a ScriptModule has no get_submodule
    found: dict[str, Normal] = {}
    names = [group.members[0] for group in known.fused]
    for group in known.fused:
        layer, following = group.members[:2]
        norm = modules.get(known.origins.get(following, following))
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and names.count(layer) == 1:
            found[layer] = _normal(norm)
    return found


def _normal(norm: Any) -> Normal:
    """What a batch norm gives if its running statistics are those of its input."""
    with torch.no_grad():
        mean = torch.zeros(norm.num_features) if norm.bias is None else norm.bias
        gamma = torch.ones(norm.num_features) if norm.weight is None else norm.weight
        deviation = gamma.abs().double().cpu()
        if norm.running_var is not None:
            # of a channel that is nearly constant, eps is most of what it divides by
            variance = norm.running_var.double().cpu()
            deviation = deviation * torch.sqrt(variance / (variance + norm.eps))
        return Normal(mean.double().cpu().clone(), deviation.clone())


def scale_normal(graph_module: nn.Module, layer: str, factor: torch.Tensor) -> None:
    """Let what is known of a layer's output, if anything is, be that of ``factor`` times this output.

    Args:
        graph_module: Prepared. Copies of it keep what they know.
        layer: Its name.
        factor: ``(channels,)``.
    """
    known = info(graph_module)
    normal = known.normals.get(layer)
    if normal is None:
        return
    factor = factor.detach().double().cpu()
    scaled = Normal(normal.mean * factor, normal.deviation * factor.abs())
    with_info(graph_module, replace(known, normals=known.normals | {layer: scaled}))

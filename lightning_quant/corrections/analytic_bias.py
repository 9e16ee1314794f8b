"""Bias correction without data: the means that rounded weights are multiplied by come from folded batch norms.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
https://arxiv.org/abs/1906.04721, section 4.2.1: with ``e`` the error of a rounded weight, ``E[y_q] = E[y] + e E[x]``,
where ``E[x]`` of each channel is that of a clipped normal distribution (appendix C, see
:mod:`lightning_quant.corrections.moments`). ``e E[x]``, summed over the taps of a kernel, is taken off the bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from lightning_quant.backends.flow import Flow
from lightning_quant.backends.graph import info, is_graph
from lightning_quant.backends.weighted import WeightedLayer
from lightning_quant.config import CorrectionName
from lightning_quant.corrections.moments import Moments, moments
from lightning_quant.corrections.recording import changed_without_data, note, refuse_second
from lightning_quant.errors import ConfigError

NAME: CorrectionName = "analytic_bias_correction"


def analytic_bias_correction(prepared: nn.Module, batches: Iterable[Any] = ()) -> nn.Module:
    """A copy in which the shift that rounding the weights makes is taken off the biases, without any data.

    Corrected are layers that read what a layer with a folded batch norm gives: through nothing, a ReLU, ReLU6 or
    Hardtanh, dropouts, averages of positions, flattenings, and sums of two such paths, which are taken for
    independent. All others stay as they are: those that read the input of the model (or of their graph, where the model
    is several), that are behind a max pooling, a SiLU or a product, that are called more than once, or that have no
    place for a bias. Zeros around a padded image count as what is inside of it.

    Args:
        prepared: From :func:`lightning_quant.prepare` for ``static``, by ``fx``, ``eager`` or ``pt2e``. Its observers
            may have seen no data yet. Not changed: the copy has other biases, and biases where there were none.
        batches: Not looked at: what all corrections are given.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        ConfigError: No layer could be corrected; another correction made up for errors of rounding already; the method
            or the backend is another one.
    """
    corrected = correct_known(prepared, batches)
    check_changed(module for module in corrected.modules() if is_graph(module))
    return corrected


def correct_known(prepared: nn.Module, batches: Iterable[Any] = ()) -> nn.Module:
    """As :func:`analytic_bias_correction`, also where no layer could be corrected.

    Of a model of several graphs, one may have no batch norms: :func:`check_changed` asks all of them.
    """
    return changed_without_data(prepared, correct_biases)


def check_changed(graphs: Iterable[nn.Module]) -> None:
    """Refuse a correction that changed nothing in any graph of a model.

    Raises:
        ConfigError: It was made, and no layer was corrected.
    """
    found = list(graphs)
    changes = [one.changes for graph in found for one in info(graph).corrected if one.name == NAME]
    if not changes or any(changes):
        return
    folded = any(info(graph).normals for graph in found)
    why = (
        "no layer with weights in int8 reads what one with a folded batch norm gives, through what keeps means known"
        if folded
        else "no batch norm was folded into a layer, so that no mean is known"
    )
    raise ConfigError(
        f"{NAME}: {why}, and no bias was corrected. Use bias_correction, which measures the means on data."
    )


def correct_biases(graph_module: fx.GraphModule) -> None:
    """Change the biases of one graph."""
    refuse_second(graph_module, NAME)
    flow = Flow(graph_module)
    known = moments(graph_module)
    done = 0
    for layer in flow.layers:
        source = flow.data_of(flow.nodes[layer.key])
        given = known.get(source.name) if source is not None else None
        mean = None if given is None else _mean_of_inputs(layer, given)
        if mean is None or len(layer.nodes) != 1 or not layer.can_have_bias or layer.quantization is None:
            continue
        shift = _shift(layer, mean)
        if not bool(shift.any()):  # its weight is rounded already
            continue
        before = layer.bias
        layer.set_bias(-shift if before is None else before.double() - shift)
        done += 1
    note(graph_module, NAME, done, f"of {len(flow.layers)} layers")


def _mean_of_inputs(layer: WeightedLayer, given: Moments) -> torch.Tensor | None:
    """``(input channels,)``; None: the channels of what it reads are not those of its weight."""
    dimensions = 0 if layer.is_linear else layer.weight.dim() - 2
    positions, rest = divmod(layer.input_channels, len(given.mean))
    if given.dimensions != dimensions or rest or (positions > 1 and not given.flattened):
        return None
    return given.mean.repeat_interleave(positions)


def _shift(layer: WeightedLayer, mean: torch.Tensor) -> torch.Tensor:
    """``(output channels,)``, float64: what rounding the weight adds to the mean of what the layer gives."""
    assert layer.quantization is not None
    weight = layer.weight
    error = layer.grouped(layer.quantization.rounded(weight).double() - weight.double()).sum(3)
    shift = (error * mean.reshape(layer.groups, 1, -1)).sum(2).reshape(-1)
    # each input of a transposed convolution meets all taps, for as many outputs as its stride makes of it
    return shift / math.prod(layer.stride) if layer.transposed else shift

"""GPTQ: weights of a calibrated model rounded one input after the other, those behind it making up for the error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from lightning_quant.corrections.bias import Reached, match_means
from lightning_quant.corrections.compensated_rounding import Inputs, compensated_rounding
from lightning_quant.corrections.grids import grid_of, keep
from lightning_quant.corrections.products import POSITIONS, drawn, product_of
from lightning_quant.corrections.recording import Calls, changed, note, refuse_second
from lightning_quant.errors import ConfigError


def gptq(prepared: nn.Module, batches: Iterable[Any], *, positions: int = POSITIONS, seed: int = 0) -> nn.Module:
    """A copy whose weights and biases make up for errors of rounding, their own and those of what they read.

    From the first layer to the last, each linear layer and convolution (dense, grouped or depthwise) is given the
    weight that gives, of its inputs as the model is quantized so far, nearest to what it gives in float, as far as
    these inputs tell; that is rounded one input after the other, and what is not yet rounded takes up the error
    (GPTQ: Frantar et al. 2022, https://arxiv.org/abs/2210.17323). Then its bias is corrected, as by
    :func:`lightning_quant.bias_correction`, which other layers are too.

    Unlike :func:`lightning_quant.adaround` it trains nothing, and a weight may move by more than one step.

    Args:
        prepared: From :func:`lightning_quant.prepare` for ``static``, by ``fx``, ``eager`` or ``pt2e``; its observers
            have seen data. Not changed: the copy has other weights, other biases, and biases where there were none. A
            layer that is called more than once stays as it is.
        batches: Inputs, each a tensor, a tuple of positional or a dict of keyword arguments. They are held at one layer
            all together.
        positions: At how many positions of its output a layer is looked at.
        seed: Draws these. The global generators of random numbers are left alone.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        CalibrationError: An observer saw no data.
        ConfigError: There is no batch; another correction made up for errors of rounding already; the method or the
            backend is another one; ``positions`` is too small.

    >>> from lightning_quant import convert, prepare
    >>> data = torch.randn(64, 4)
    >>> prepared = prepare(nn.Linear(4, 2), method="static", example_inputs=data)
    >>> _ = prepared(data)
    >>> int8 = convert(gptq(prepared, [data]))
    """
    if positions < 1:
        raise ConfigError(f"gptq(positions={positions!r}): give 1 or more.")
    return changed(prepared, batches, lambda graph, calls: _compensate(graph, calls, positions, seed))


def _compensate(graph_module: fx.GraphModule, calls: Calls, positions: int, seed: int) -> None:
    refuse_second(graph_module, "gptq")
    generator = torch.Generator().manual_seed(seed)
    rounded: list[str] = []

    def visit(reached: Reached) -> None:
        if _round(reached, positions, generator):
            rounded.append(reached.layer.key)

    match_means(graph_module, calls, visit)
    note(graph_module, "gptq", len(rounded), "layers")


def _round(reached: Reached, positions: int, generator: torch.Generator) -> bool:
    """Round the weight of a layer. Whether it has one that can be rounded so."""
    layer, node = reached.layer, reached.rounded.nodes[reached.number]
    quantization, product = layer.quantization, product_of(reached.rounded, node)
    if quantization is None or product is None or quantization.axis not in (None, 0):
        return False
    weight = layer.weight
    sources: Any = reached.floats.data_of(reached.floats.nodes[reached.number]), reached.rounded.data_of(node)
    batches = [(values[sources[0]], values_q[sources[1]]) for values, values_q in reached.runs]
    read = list(drawn(product, weight, batches, positions, generator))
    inputs = Inputs(floating=torch.cat([x for x, _ in read], 1), quantized=torch.cat([x for _, x in read], 1))
    rows = product.rows(weight)
    grid = grid_of(quantization, rows, inputs.quantized.square().mean(1, keepdim=True))
    stored: Any = reached.rounded.weight_of(node)
    stored.rounded.copy_(keep(layer, grid, compensated_rounding(rows, inputs, grid)))
    return True

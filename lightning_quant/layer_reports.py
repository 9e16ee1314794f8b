"""What int8 costs each layer of a LightningModule, with the names that its user knows."""

from __future__ import annotations

import copy
import heapq
import math
from dataclasses import replace
from typing import Any

from torch import fx

from lightning_quant._torch_ao import quiet
from lightning_quant.analysis.layers import SAMPLES, LayerReport, float_layers_of, layers_of
from lightning_quant.arguments import batch_size
from lightning_quant.backends.graph import info
from lightning_quant.backends.state import unchanged
from lightning_quant.capture import Capture
from lightning_quant.errors import first_line
from lightning_quant.exporters import smaller
from lightning_quant.parts import Quantized, join

#: Layers whose histograms a report keeps: the worst ones.
HISTOGRAMS = 12

_PROGRAMS = (
    "graphs of backend 'torchscript' are programs, which show no values from within. Use backend='fx' or 'eager' to "
    "see the SQNR and the ranges of each layer"
)
_RANGES_AT_RUN_TIME = "method='dynamic' takes the ranges of activations while it runs: there are no clipping points"


def layer_reports(quantized: Quantized, captured: Capture) -> tuple[tuple[LayerReport, ...], dict[str, str]]:
    """Every layer with weights of every target, on the batch with which it was captured.

    Args:
        quantized: The int8 model and what it was made from. Not changed.
        captured: Its targets.

    Returns:
        The layers, in the order in which they run; and target -> what cannot be seen of its layers, and why. Only the
        worst of them have their histograms.
    """
    found: list[LayerReport] = []
    unseen: dict[str, str] = {}
    calls = {target.name: target.call for target in captured.targets}
    for name, converted in quantized.converted.items():
        prepared, known = quantized.prepared[name], info(converted)
        call = calls[name]
        data = known.interface.flatten(call.args, call.keywords)
        kept = {
            part: (quantized.float_module.get_submodule(join(name, part)), converted.get_submodule(part))
            for part in known.kept
        }
        try:
            with quiet(), unchanged(quantized.float_module), unchanged(quantized.module):
                if (batch_size(data) or 0) > SAMPLES:
                    data = smaller(converted, data, SAMPLES)
                if isinstance(prepared, fx.GraphModule):
                    layers = layers_of(prepared, converted, data, kept=kept)
                    if known.method == "dynamic":
                        unseen[name or "forward"] = _RANGES_AT_RUN_TIME
                else:
                    module = quantized.float_module.get_submodule(name)
                    own = copy.deepcopy(call)
                    layers = float_layers_of(module, lambda m=module, c=own: m(*c.args, **c.keywords))
                    unseen[name or "forward"] = _PROGRAMS
        except Exception as error:  # whatever the user's code in the parts that are kept raises: files are no worse
            unseen[name or "forward"] = f"{type(error).__name__}: {first_line(error)}"
            continue
        found += [replace(layer, name=join(name, layer.name) if layer.name else name or "forward") for layer in layers]
    return tuple(_with_histograms(found, HISTOGRAMS)), unseen


def cost_db(layer: LayerReport) -> float:
    """By what layers are sorted, the worst first: the SQNR of a layer alone; of its weight, where that is not known."""
    known = [x for x in (layer.alone_db, layer.weight_db) if x is not None and not math.isnan(x)]
    return known[0] if known else math.inf


def _with_histograms(layers: list[LayerReport], most: int) -> list[LayerReport]:
    worst = set(heapq.nsmallest(most, range(len(layers)), key=lambda index: cost_db(layers[index])))

    def without(spread: Any) -> Any:
        return None if spread is None else replace(spread, counts=())

    return [
        layer if index in worst else replace(layer, reads=without(layer.reads), weight=without(layer.weight))
        for index, layer in enumerate(layers)
    ]

"""The graph of a target in the form in which float and int8 can be run side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lightning_quant._torch_ao import RECURRENT_MODULES, is_fake_quantize, is_observer
from lightning_quant.analysis.side_by_side import Graph
from lightning_quant.backends import backend_of, reference_graph
from lightning_quant.backends.embeddings import Int8Table, StoredTable, Table
from lightning_quant.backends.graph import info
from lightning_quant.backends.int8_weight import int8_weight
from lightning_quant.qat_modules import WITH_BATCH_NORM


def graph_of(prepared: fx.GraphModule, converted: nn.Module, kept: dict[str, tuple[nn.Module, nn.Module]]) -> Graph:
    """What :func:`lightning_quant.analysis.side_by_side.run_both` runs. The arguments are not changed.

    Args:
        prepared: Calibrated or trained.
        converted: The int8 graph of it.
        kept: What it keeps -> what runs there in float, and in int8.

    Raises:
        CalibrationError: An observer saw no data.
    """
    known = info(prepared)
    floating, int8 = ({name: pair[side] for name, pair in kept.items()} for side in (0, 1))
    if known.config.backend == "pt2e":
        backend: Any = backend_of(known.config)
        return Graph(backend.unfolded(prepared))
    if known.method == "dynamic":
        swapped = {name: part for name, part in converted.named_modules() if _is_dynamic(part)}
        return Graph(_copied(prepared, floating), int8={**int8, **swapped}, floating=floating)
    base = reference_graph(prepared, dict(floating))
    before = _quiet_copy(prepared, floating)
    layers, weights = {}, {}
    for node in base.graph.nodes:
        if node.op != "call_module" or node.target in kept:
            continue
        name = str(node.target)
        module, own = base.get_submodule(name), _submodule(before, name)
        if (layer := int8_weight(module)) is not None and own is not None:
            layers[name], weights[name] = layer, _float_weight(own)
        elif own is not None and (isinstance(module, StoredTable) or name in known.swapped):
            floating[name], int8[name] = own, module
        elif isinstance(own, (nn.RNNBase, nn.RNNCellBase)) and isinstance(
            part := _submodule(converted, name), RECURRENT_MODULES
        ):
            int8[name] = part
    return Graph(base, weights, layers, floating, int8)


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _is_dynamic(module: nn.Module) -> bool:
    return isinstance(module, Int8Table) or ".quantized.dynamic." in type(module).__module__


def _copied(prepared: fx.GraphModule, floating: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A copy in eval mode on the CPU, in which ``floating`` stands in the places of what it keeps."""
    kept: dict[int, Any] = {
        id(part): twin for name, twin in floating.items() if (part := _submodule(prepared, name)) is not None
    }
    twin: fx.GraphModule = copy.deepcopy(prepared, kept)
    return twin.cpu().eval()


def _quiet_copy(prepared: fx.GraphModule, floating: Mapping[str, nn.Module]) -> fx.GraphModule:
    """:func:`_copied`, which observes and rounds nothing."""
    twin = _copied(prepared, floating)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Table):
            module.fake_quantize = False
        if is_fake_quantize(module):
            module.disable_observer()
            module.disable_fake_quant()
        elif is_observer(module):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, nn.Identity())
    return twin


def _float_weight(layer: Any) -> torch.Tensor:
    """The weight of a layer of a prepared graph, with its batch norm folded in."""
    layer = inner_layer(layer)
    weight: torch.Tensor = layer.weight.detach()
    if isinstance(layer, WITH_BATCH_NORM):
        norm = layer.bn
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = weight * factor.reshape([-1] + [1] * (weight.dim() - 1))
    return weight.detach()


def inner_layer(module: Any) -> Any:
    """The layer of what is fused."""
    return module[0] if isinstance(module, nn.Sequential) and not hasattr(module, "weight") else module

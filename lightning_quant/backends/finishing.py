"""The last look at the weights before torch.ao converts: their ranges are those of the weights as they are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from lightning_quant import learned_scale, qat_modules
from lightning_quant._torch_ao import FakeQuantizeBase, ObserverBase
from lightning_quant.backends.constants import fold_weights, is_constant, is_layer, value_of
from lightning_quant.backends.graph import check_seen, info
from lightning_quant.backends.hiding import restore
from lightning_quant.backends.swapping import put_quantized


def observe_weights(prepared: fx.GraphModule) -> None:
    """Give the buffers of per-channel ranges their shapes, so that copies of the model always fit each other."""
    with torch.no_grad():
        for module in prepared.modules():
            fake_quantize = getattr(module, "weight_fake_quant", None)
            if isinstance(fake_quantize, FakeQuantizeBase):
                fake_quantize(module.weight)
        for node in prepared.graph.nodes:
            fed_by = node.args[0] if node.op == "call_module" and node.args else None
            if isinstance(fed_by, fx.Node) and is_constant(prepared, fed_by):
                module = prepared.get_submodule(str(node.target))
                if isinstance(module, FakeQuantizeBase):
                    module(value_of(prepared, fed_by))


def folded_weight(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight of a layer with its batch norm folded in, and the factor of each channel; None: it has none."""
    weight: torch.Tensor = module.weight
    if not isinstance(module, qat_modules.WITH_BATCH_NORM):
        return weight, None
    norm: Any = module.bn
    factor: torch.Tensor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor.reshape([-1] + [1] * (weight.dim() - 1)), factor


def float_weights(prepared: nn.Module) -> dict[str, torch.Tensor]:
    """Name of each layer of a prepared graph -> the weight that becomes int8, in float."""
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, module in prepared.named_modules():
            layer: Any = module
            if not isinstance(getattr(layer, "weight", None), torch.Tensor) and isinstance(module, nn.Sequential):
                layer = next(iter(module), None)  # of what is fused, the first one has the weight
            if isinstance(getattr(layer, "weight", None), torch.Tensor):
                found[name] = folded_weight(layer)[0].detach()
    return found


def finished(prepared: fx.GraphModule, kept: dict[str, nn.Module] | None) -> fx.GraphModule:
    """A copy in eval mode on the CPU, with the weights' ranges those of the weights as they are."""
    check_seen(prepared)
    kept = kept or {}
    # not copied with the rest: they are those of the caller, or hold graphs of their own
    twin = copy.deepcopy(prepared, {id(prepared.get_submodule(name)): module for name, module in kept.items()})
    twin.cpu().eval()
    restore(twin)
    put_quantized(twin, info(prepared).swapped)
    with torch.no_grad():
        module: Any
        for module in twin.modules():
            fake_quantize = getattr(module, "weight_fake_quant", None)
            if not isinstance(fake_quantize, FakeQuantizeBase):
                continue
            weight, factor = folded_weight(module)
            if factor is not None:
                learned_scale.fold(fake_quantize, factor)
            fake_quantize.enable_observer()
            fake_quantize(weight)
        _store_computed_weights(twin)
    for node in twin.graph.nodes:
        if node.op == "call_module":
            # the model's own layers, which a linked graph calls where they stay float, have none
            called: Any = twin.get_submodule(str(node.target))
            called.qconfig = getattr(called, "qconfig", None)
    return twin


#: What models ask of a weight besides its values.
_OF_TENSORS = ("device", "dtype", "shape", "ndim")


def _replace_argument(user: fx.Node, node: fx.Node, value: Any) -> None:
    def replaced(argument: fx.Node) -> Any:
        return value if argument is node else argument

    user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), replaced)


def _store_computed_weights(prepared: fx.GraphModule) -> None:
    """Compute the weights that the graph computes from parameters, and take their ranges as they are now."""

    def is_weight(node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        if not isinstance(prepared.get_submodule(str(node.target)), FakeQuantizeBase | ObserverBase):
            return False
        return any(is_layer(user) and user.args[1:2] == (node,) for user in node.users)

    fold_weights(prepared, is_weight)
    module: Any
    for node in prepared.graph.nodes:
        if is_weight(node):
            module = prepared.get_submodule(str(node.target))
            if isinstance(module, FakeQuantizeBase):
                module.enable_observer()
                module(value_of(prepared, node.args[0]))
        elif node.target is getattr and node.args[0].op == "get_attr" and node.args[1] in _OF_TENSORS:
            # the weight will be packed, and has none of this then; packed weights are on the CPU
            value = torch.device("cpu") if node.args[1] == "device" else value_of(prepared, node)
            for user in list(node.users):
                _replace_argument(user, node, value)
    for node in reversed(list(prepared.graph.nodes)):
        if node.target is getattr and not node.users:
            prepared.graph.erase_node(node)
    prepared.recompile()

"""The neutral form: float arithmetic between explicit quantize and dequantize operators, weights stored as int8.

:func:`to_qdq` takes the reference graph of a backend. What it gives is an ordinary module that torch runs. It never
invents qparams: it stores the ones that it finds. :func:`to_program` makes of it the ``torch.export`` program that
every file but TorchScript is written from.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

# registers torch.ops.quantized_decomposed, of which the reference graph is made
from lightning_quant._torch_ao import quiet
from lightning_quant.backends.graph import place_of
from lightning_quant.backends.int8_weight import int8_weight
from lightning_quant.errors import ExportError
from lightning_quant.exporters.torch_export import capture

_OPS = torch.ops.quantized_decomposed
_DEQUANTIZERS = (_OPS.dequantize_per_channel.default, _OPS.dequantize_per_tensor.default)


def to_qdq(reference: fx.GraphModule) -> fx.GraphModule:
    """A copy of a reference graph with its weights stored as int8."""
    graph_module = copy.deepcopy(reference)
    for name in dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"):
        module = graph_module.get_submodule(name)
        if (layer := int8_weight(module)) is not None:
            parent, _, child = name.rpartition(".")
            setattr(graph_module.get_submodule(parent), child, layer)
    _store_functional_weights(graph_module)
    _name_weights(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.delete_all_unused_submodules()
    return graph_module


def _store_functional_weights(graph_module: fx.GraphModule) -> None:
    """Run every quantize operator that stands on a constant, and store what it gives."""
    quantizers = (_OPS.quantize_per_channel.default, _OPS.quantize_per_tensor.default)
    for number, node in enumerate(list(graph_module.graph.nodes)):
        if node.target not in quantizers or any(n.op != "get_attr" for n in node.all_input_nodes):
            continue
        args = fx.node.map_arg(node.args, lambda n: _attribute(graph_module, str(n.target)))
        value = node.target(*args)
        name = f"_int8_weight_{number}"
        graph_module.register_buffer(name, value.detach())
        with graph_module.graph.inserting_before(node):
            stored = graph_module.graph.get_attr(name)
        node.replace_all_uses_with(stored)
        graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    used = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    for registry in (graph_module._parameters, graph_module._buffers):
        for name in [name for name in registry if name not in used]:
            del registry[name]


def _name_weights(graph_module: fx.GraphModule) -> None:
    """Let the integers of a weight in an exported graph have the name of its layer, not ``_frozen_param3``."""
    for node in list(graph_module.graph.nodes):
        if node.op != "get_attr" or "." in str(node.target):
            continue
        dequantizers = [user for user in node.users if user.target in _DEQUANTIZERS and user.args[0] is node]
        places = {place_of(layer) for dequantize in dequantizers for layer in dequantize.users}
        place = places.pop() if len(places) == 1 else ""
        if not place:
            continue
        parents = place.split(".")
        owner: nn.Module = graph_module
        for name in parents:
            if not isinstance(getattr(owner, name, None), nn.Module):
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        if hasattr(owner, "weight"):
            continue
        owner.register_buffer("weight", _attribute(graph_module, str(node.target)))
        with graph_module.graph.inserting_before(node):
            named = graph_module.graph.get_attr(f"{place}.weight")
        named.meta = node.meta
        node.replace_all_uses_with(named)
        graph_module.graph.erase_node(node)
        delattr(graph_module, str(node.target))


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def to_program(
    module: nn.Module,
    inputs: tuple[Any, ...],
    free_dims: tuple[tuple[int, ...], ...],
    state: tuple[Any, ...] = (),
    *,
    one_sample: bool = False,
) -> torch.export.ExportedProgram:
    """``module`` as a ``torch.export`` program with a free batch dimension.

    Args:
        module: In the neutral form; takes the data by position.
        inputs: Example data with at least two samples: the first dimension of every tensor that has as many rows as
            the first one becomes the batch.
        free_dims: For each input, other dimensions that are free; empty: none are.
        state: What it takes behind them, of sizes that are fixed.
        one_sample: The batch is not free, and 1.

    Raises:
        ExportError: It cannot be captured with a free batch dimension.
    """
    batch = None if one_sample else torch.export.Dim("batch", min=1)
    shapes = (*dynamic_shapes(inputs, batch, free_dims), *(None for _ in state))
    try:
        with quiet(), warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", module="torch.export")
            program = capture(module, (*inputs, *state), shapes)
    except RuntimeError as error:  # torch.export's own errors, and those of the operators that it runs
        raise ExportError(
            f"torch.export cannot capture the model with a free batch dimension: {error}\nLeave the part that it names "
            "out with QuantConfig(targets=...), or the format out of ExportConfig(formats=...)."
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of the user's code and folders of this machine, in files for others
    return program


def dynamic_shapes(inputs: tuple[Any, ...], batch: Any, free_dims: tuple[tuple[int, ...], ...]) -> Any:
    """``inputs`` with ``{0: batch}`` for each tensor with as many rows as the first one, ``None`` for others.

    Args:
        inputs: Example data.
        batch: A dimension of ``torch.export``; None: it is not free.
        free_dims: For each input, other dimensions that are free; empty: none are.
    """
    tensors = [x for x in tree_flatten(inputs)[0] if isinstance(x, torch.Tensor) and x.dim()]
    size = tensors[0].shape[0] if tensors else 0

    def shape(x: Any) -> Any:
        if batch is None or not isinstance(x, torch.Tensor) or not x.dim() or x.shape[0] != size:
            return None
        return {0: batch}

    shapes = tuple(tree_map(shape, inputs))
    for number, dims in enumerate(free_dims):
        if dims and isinstance(inputs[number], torch.Tensor):
            free = {dim: torch.export.Dim.AUTO for dim in dims if dim or not shapes[number]}
            shapes = (*shapes[:number], {**free, **(shapes[number] or {})}, *shapes[number + 1 :])
    return shapes

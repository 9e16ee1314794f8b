"""What a user of eager mode writes by hand, in a traced graph: stubs, and modules in the place of functions."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lightning_quant._torch_ao import DeQuantStub, QuantStub, quantized_modules
from lightning_quant.backends.constants import is_layer
from lightning_quant.backends.eager_operators import (
    ACTIVATIONS,
    FIXED,
    FUNCTIONALS,
    OBSERVED,
    OTHER,
    RELUS,
    SCALAR,
    TENSOR,
    VALUE,
    activation_of,
    is_number,
    parts_and_dim,
)
from lightning_quant.backends.islands import asks_for_size, kind_of
from lightning_quant.backends.rewriting import graph_module_has


class Functional(nn.Module):
    """One operation of ``FloatFunctional``, which eager mode swaps for the int8 one, as a module that can be called.

    Attributes:
        operation: The name of the method.
        functional: ``FloatFunctional``, observed once the model is prepared; ``QFunctional`` once it is converted.
    """

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation
        self.functional: nn.Module = quantized_modules.FloatFunctional()

    def forward(self, *args: Any) -> Any:
        """The method of that name."""
        return getattr(self.functional, self.operation)(*args)

    def extra_repr(self) -> str:
        """Its name."""
        return self.operation


def make_modules(graph_module: fx.GraphModule, int8: set[fx.Node]) -> list[str]:
    """Make modules of what eager mode can only swap as modules.

    Args:
        graph_module: Changed in place.
        int8: The nodes that run in int8, for all of which :func:`is_able` holds or which are layers. Kept up to date.

    Returns:
        Names of the modules that need a range of their own.
    """
    names: list[str] = []
    for node in list(graph_module.graph.nodes):
        if node not in int8:
            continue
        kind = kind_of(graph_module, node)
        if kind in FUNCTIONALS:
            name = _make_functional(graph_module, node, FUNCTIONALS[kind], int8)
            # the scale of a sum or product with a number follows from that of the tensor
            names += [] if FUNCTIONALS[kind] in SCALAR else [f"{name}.functional"]
        elif kind in ACTIVATIONS:
            bound = activation_of(node, kind)
            assert bound is not None
            data, module = bound
            name = add_module(graph_module, node.name, module.train(graph_module.training))
            node.op, node.target, node.args, node.kwargs = "call_module", name, (data,), {}
            names += [name] if type(module) in (*OBSERVED, *FIXED) else []
        elif kind in (*OBSERVED, *FIXED):
            names.append(str(node.target))
    return names


def _make_functional(graph_module: fx.GraphModule, node: fx.Node, operation: str, int8: set[fx.Node]) -> str:
    args: tuple[Any, ...] = node.args
    if operation == "cat":
        found = parts_and_dim(node)
        assert found is not None
        args = found
    elif operation in SCALAR and is_number(args[0]):
        args = (args[1], args[0])
    if operation == "add" and len(node.users) == 1:
        follower = next(iter(node.users))
        if follower in int8 and kind_of(graph_module, follower) in RELUS:
            operation = "add_relu"
            follower.replace_all_uses_with(node)
            graph_module.graph.erase_node(follower)
            int8.discard(follower)
    name = add_module(graph_module, node.name, Functional(operation))
    node.op, node.target, node.args, node.kwargs = "call_module", name, args, {}
    return name


def add_module(graph_module: fx.GraphModule, stem: str, module: nn.Module) -> str:
    """Register ``module`` under a name that is free, and give that name."""
    name, number = f"int8_{stem}", 0
    while graph_module_has(graph_module, name):
        number += 1
        name = f"int8_{stem}_{number}"
    graph_module.add_submodule(name, module)
    return name


def insert_stubs(graph_module: fx.GraphModule, int8: set[fx.Node]) -> list[str]:
    """Let float data be quantized where int8 nodes read it, and int8 data be dequantized where others do.

    Args:
        graph_module: Changed in place. Each tensor is quantized or dequantized once, for all its readers.
        int8: The nodes that run in int8.

    Returns:
        The names of the stubs.
    """
    graph, names = graph_module.graph, []
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if node.meta.get(VALUE) != TENSOR:
            continue
        if node in int8:
            readers = [
                user
                for user in node.users
                if user not in int8 and not (asks_for_size(graph_module, user) and user.meta.get(VALUE) == OTHER)
            ]
            module: nn.Module = DeQuantStub()
            stem = f"dequantize_{node.name}"
        else:
            # the weight and the bias of a functional layer are no data
            readers = [user for user in node.users if user in int8 and (not is_layer(user) or user.args[0] is node)]
            module = QuantStub()
            stem = f"quantize_{node.name}"
        if not readers:
            continue
        name = add_module(graph_module, stem, module)
        # after all inputs, which have to come first
        with graph.inserting_after(inputs[-1] if node.op == "placeholder" else node):
            stub = graph.call_module(name, (node,))
        stub.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, stub)
        names.append(name)
    return names

"""Operators between layers that eager quantized tensors have, and the modules that eager mode needs for some of them.

An int8 tensor in eager mode carries its scale and zero point with it. What only moves values, or gives one of those
that it took, is the ordinary function: it keeps both. What computes new values needs to be told the scale of its
result, so it has to be a module that is swapped for an int8 one: ``FloatFunctional`` for ``+``, ``*``, ``cat`` and
``matmul``, ``nn.Hardswish`` and its like for activations.

The table was found by running each operator on int8 tensors beside float ones (see the tests). What is missing has no
kernel (replication padding, ``adaptive_max_pool``, ``sum``), or a wrong one: ``stack`` gives every tensor the scale of
the first, and ``avg_pool2d`` with ``divisor_override`` forgets the zero point.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant._torch_ao import quantized_modules
from lightning_quant.backends.constants import is_layer
from lightning_quant.backends.islands import asks_for_size, kind_of
from lightning_quant.backends.rewriting import add_scalar, graph_module_has, mul_scalar

#: Key of ``node.meta``: what a node gives, one of the words below.
VALUE = "lightning_quant value"
TENSOR, TENSORS, OTHER = "a tensor of floating point", "several of them", "something else"

_SUMS = (operator.add, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_MATRIX_PRODUCTS = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm")
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_RELUS = (nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_")

#: Operator -> the method of ``FloatFunctional`` that it becomes.
_FUNCTIONALS: dict[Any, str] = {
    **dict.fromkeys(_SUMS, "add"),
    **dict.fromkeys(_PRODUCTS, "mul"),
    **dict.fromkeys(_MATRIX_PRODUCTS, "matmul"),
    **dict.fromkeys(_JOINS, "cat"),
    add_scalar: "add_scalar",
    mul_scalar: "mul_scalar",
}

#: Those of them that torch.ao does not observe.
SCALAR = ("add_scalar", "mul_scalar")

#: Function -> the module that it becomes, so that it can be observed, or swapped.
_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    F.hardswish: nn.Hardswish,
    F.elu: nn.ELU,
    F.leaky_relu: nn.LeakyReLU,
    **dict.fromkeys((torch.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, "tanh"), nn.Tanh),
    F.hardsigmoid: nn.Hardsigmoid,
}

#: Modules that are swapped for int8 ones with a scale of their own.
OBSERVED: tuple[type[nn.Module], ...] = (nn.Hardswish, nn.ELU, nn.LeakyReLU, nn.BatchNorm2d, nn.BatchNorm3d)

#: Modules that give int8 tensors of one scale, whatever they are given.
FIXED: tuple[type[nn.Module], ...] = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid)

#: They keep the scale of what they are given.
_KEEP: frozenset[Any] = frozenset(
    (
        *_RELUS,
        nn.ReLU6, nn.Hardtanh, F.relu6, F.hardtanh, torch.clamp, "clamp",
        torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.narrow,
        torch.repeat_interleave, torch.movedim, torch.clone, operator.getitem,
        "flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "narrow", "contiguous", "view",
        "expand", "expand_as", "repeat", "repeat_interleave", "movedim", "clone", "detach",
        torch.chunk, torch.split, "chunk", "split",
        F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
        F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
        torch.avg_pool1d, torch.adaptive_avg_pool1d, torch.mean, "mean",
        F.interpolate, F.pad, F.dropout, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten,
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Upsample, nn.UpsamplingNearest2d, nn.ZeroPad2d,
    )
)  # fmt: skip

_INTERPOLATIONS = (F.interpolate, nn.Upsample, nn.UpsamplingNearest2d)


class Functional(nn.Module):
    """One operation of ``FloatFunctional``, which eager mode swaps for the int8 one, as a module that can be called.

    Attributes:
        operation: The name of the method.
        functional: ``FloatFunctional``, observed once the model is prepared; ``QFunctional`` once it is converted.
    """

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation
        self.functional = quantized_modules.FloatFunctional()

    def forward(self, *args: Any) -> Any:
        """The method of that name."""
        return getattr(self.functional, self.operation)(*args)

    def extra_repr(self) -> str:
        """Its name."""
        return self.operation


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        several = isinstance(value, (tuple, list)) and bool(value) and all(_is_floating(x) for x in value)
        n.meta[VALUE] = TENSOR if _is_floating(value) else TENSORS if several else OTHER
        n.meta[_DIMS] = value.dim() if isinstance(value, torch.Tensor) else None
        return value


_DIMS = "lightning_quant dims"


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def record_values(graph_module: fx.GraphModule, data: tuple[Any, ...]) -> None:
    """Note what each node gives: only tensors of floating point can be in int8, and sizes are computed with ``+`` too.

    Args:
        graph_module: In eval mode.
        data: Its inputs. They may be changed.
    """
    with torch.no_grad():
        _Recorder(graph_module).run(*data)


def is_able(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether there is an int8 kernel for what ``node`` computes, from values noted by :func:`record_values`."""
    if node.meta.get(VALUE) not in (TENSOR, TENSORS):
        return False
    kind = kind_of(graph_module, node)
    try:
        if kind in _FUNCTIONALS:
            return _has_functional(node, kind)
        if kind in _ACTIVATIONS:
            return _bound(node, kind) is not None
        if kind in (*OBSERVED, *FIXED):
            return len(node.all_input_nodes) == 1
        return kind in _KEEP and _has_kernel(graph_module, node, kind)
    except TypeError:  # not hashable: no operator of torch
        return False


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.meta.get(VALUE) == TENSOR


def _has_functional(node: fx.Node, kind: Any) -> bool:
    operation = _FUNCTIONALS[kind]
    if operation == "cat":
        return _parts_and_dim(node) is not None
    if node.kwargs or len(node.args) != 2:
        return False
    a: Any
    b: Any
    a, b = node.args
    if operation in SCALAR:
        # 0 would be the scale of the result
        number = b if _is_tensor(a) else a
        return _is_number(number) and (number != 0 or operation == "add_scalar") and (_is_tensor(a) or _is_tensor(b))
    if not _is_tensor(a) or not _is_tensor(b):
        return False
    if operation == "matmul":  # the kernel takes as many dimensions of both
        return a.meta[_DIMS] == b.meta[_DIMS] and a.meta[_DIMS] >= 2
    # a change in place is seen by everybody who reads the first operand
    return kind not in ("add_", "mul_") or len(a.users) == 1


def _parts_and_dim(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """The arguments of ``torch.cat``, if they are a list of tensors and a number."""
    values = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    parts, dim = values.pop("tensors", None), values.pop("dim", 0)
    if values or not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        return None
    found = [part for part in parts if isinstance(part, fx.Node) and _is_tensor(part)]
    return (found, dim) if len(found) == len(parts) and found else None


def _bound(node: fx.Node, kind: Any) -> tuple[fx.Node, nn.Module] | None:
    """What an activation function is given, and the module that it is."""
    module = _ACTIVATIONS[kind]
    values: dict[str, Any]
    if isinstance(kind, str) or kind in (torch.sigmoid, torch.tanh):
        values = {"input": node.args[0]} if len(node.args) == 1 and not node.kwargs else {}
    else:
        bound = inspect.signature(kind).bind(*node.args, **node.kwargs)
        values = dict(bound.arguments)
    data = values.pop("input", None)
    values.pop("inplace", None)
    if not isinstance(data, fx.Node) or not all(_is_number(x) for x in values.values()):
        return None
    return data, module(**values)


def _has_kernel(graph_module: fx.GraphModule, node: fx.Node, kind: Any) -> bool:
    """What the arguments say of an operator that keeps the scale."""
    settings: dict[str, Any] = dict(node.kwargs)
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if kind in _INTERPOLATIONS:
        mode = getattr(module, "mode", None) or settings.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
        # the kernels of one dimension are missing, and weighted means are not exact
        return mode in ("nearest", "nearest-exact") and node.meta[_DIMS] in (4, 5)
    if kind is F.pad:
        mode = settings.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        value = settings.get("value", node.args[3] if len(node.args) > 3 else None)
        # another value may lie outside of the range of the tensor
        return mode == "constant" and not value
    if kind in (F.avg_pool2d, F.avg_pool3d, nn.AvgPool2d, nn.AvgPool3d):
        divisor = node.args[6] if len(node.args) > 6 else settings.get("divisor_override")
        return divisor is None and getattr(module, "divisor_override", None) is None
    if kind in (torch.mean, "mean"):  # into another type, or of all, where a number is what is wanted
        return "dtype" not in settings and (len(node.args) > 1 or "dim" in settings)
    if kind is operator.getitem:
        # one of several is a tensor where these are; indices that are tensors choose by value
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(node.all_input_nodes) != 1:
            return False
        return source.meta.get(VALUE) == TENSOR or _is_split(graph_module, source)
    if kind == "view":  # as another type
        return not any(isinstance(x, torch.dtype) for x in node.args)
    return bool(node.meta[VALUE] == TENSOR) or kind in _SPLITS


_SPLITS = (torch.chunk, torch.split, "chunk", "split")


def _is_split(graph_module: fx.GraphModule, node: Any) -> bool:
    return isinstance(node, fx.Node) and kind_of(graph_module, node) in _SPLITS


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
        if kind in _FUNCTIONALS:
            name = _make_functional(graph_module, node, _FUNCTIONALS[kind], int8)
            # the scale of a sum or product with a number follows from that of the tensor
            names += [] if _FUNCTIONALS[kind] in SCALAR else [f"{name}.functional"]
        elif kind in _ACTIVATIONS:
            bound = _bound(node, kind)
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
        found = _parts_and_dim(node)
        assert found is not None
        args = found
    elif operation in SCALAR and _is_number(args[0]):
        args = (args[1], args[0])
    if operation == "add" and len(node.users) == 1:
        follower = next(iter(node.users))
        if follower in int8 and kind_of(graph_module, follower) in _RELUS:
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


def insert_stubs(
    graph_module: fx.GraphModule, int8: set[fx.Node], quantize: Callable[[], nn.Module], dequantize: type[nn.Module]
) -> list[str]:
    """Let float data be quantized where int8 nodes read it, and int8 data be dequantized where others do.

    Args:
        graph_module: Changed in place. Each tensor is quantized or dequantized once, for all its readers.
        int8: The nodes that run in int8.
        quantize: Makes a ``QuantStub``.
        dequantize: ``DeQuantStub``.

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
            module, stem = dequantize(), f"dequantize_{node.name}"
        else:
            # the weight and the bias of a functional layer are no data
            readers = [user for user in node.users if user in int8 and (not is_layer(user) or user.args[0] is node)]
            module, stem = quantize(), f"quantize_{node.name}"
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

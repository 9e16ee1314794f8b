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
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant.backends.islands import kind_of
from lightning_quant.backends.rewriting import add_scalar, mul_scalar

#: Key of ``node.meta``: what a node gives, one of the words below.
VALUE = "lightning_quant value"
TENSOR, TENSORS, OTHER = "a tensor of floating point", "several of them", "something else"

_SUMS = (operator.add, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_MATRIX_PRODUCTS = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm")
_JOINS = (torch.cat, torch.concat, torch.concatenate)
RELUS = (nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_")

#: Operator -> the method of ``FloatFunctional`` that it becomes.
FUNCTIONALS: dict[Any, str] = {
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
ACTIVATIONS: dict[Any, type[nn.Module]] = {
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
KEEP: frozenset[Any] = frozenset(
    (
        *RELUS,
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
        if kind in FUNCTIONALS:
            return _has_functional(node, kind)
        if kind in ACTIVATIONS:
            return activation_of(node, kind) is not None
        if kind in (*OBSERVED, *FIXED):
            return len(node.all_input_nodes) == 1
        return kind in KEEP and _has_kernel(graph_module, node, kind)
    except TypeError:  # not hashable: no operator of torch
        return False


def is_number(x: Any) -> bool:
    """Whether ``x`` is one, and no truth value."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.meta.get(VALUE) == TENSOR


def _has_functional(node: fx.Node, kind: Any) -> bool:
    operation = FUNCTIONALS[kind]
    if operation == "cat":
        return parts_and_dim(node) is not None
    if node.kwargs or len(node.args) != 2:
        return False
    a: Any
    b: Any
    a, b = node.args
    if operation in SCALAR:
        # 0 would be the scale of the result
        number = b if _is_tensor(a) else a
        return is_number(number) and (number != 0 or operation == "add_scalar") and (_is_tensor(a) or _is_tensor(b))
    if not _is_tensor(a) or not _is_tensor(b):
        return False
    if operation == "matmul":  # the kernel takes as many dimensions of both
        return a.meta[_DIMS] == b.meta[_DIMS] and a.meta[_DIMS] >= 2
    # a change in place is seen by everybody who reads the first operand
    return kind not in ("add_", "mul_") or len(a.users) == 1


def parts_and_dim(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """The arguments of ``torch.cat``, if they are a list of tensors and a number."""
    values = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    parts, dim = values.pop("tensors", None), values.pop("dim", 0)
    if values or not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        return None
    found = [part for part in parts if isinstance(part, fx.Node) and _is_tensor(part)]
    return (found, dim) if len(found) == len(parts) and found else None


def activation_of(node: fx.Node, kind: Any) -> tuple[fx.Node, nn.Module] | None:
    """What an activation function is given, and the module that it is."""
    module = ACTIVATIONS[kind]
    values: dict[str, Any]
    if isinstance(kind, str) or kind in (torch.sigmoid, torch.tanh):
        values = {"input": node.args[0]} if len(node.args) == 1 and not node.kwargs else {}
    else:
        bound = inspect.signature(kind).bind(*node.args, **node.kwargs)
        values = dict(bound.arguments)
    data = values.pop("input", None)
    values.pop("inplace", None)
    if not isinstance(data, fx.Node) or not all(is_number(x) for x in values.values()):
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

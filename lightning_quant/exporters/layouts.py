"""Where quantize and dequantize stand in a program, for each runtime: it fuses only the layout that it knows.

A pair (``x -> quantize -> dequantize``) is only ever dropped. Nothing here makes qparams: what a runtime quantizes is
what was observed.
"""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, TensorArgument

# registers torch.ops.quantized_decomposed
from lightning_quant._torch_ao import reference_modules  # noqa: F401

Program = torch.export.ExportedProgram

_QDQ = torch.ops.quantized_decomposed
_ATEN = torch.ops.aten
_QUANTIZE = (_QDQ.quantize_per_tensor.default, _QDQ.quantize_per_tensor.tensor)
_DEQUANTIZE = (_QDQ.dequantize_per_tensor.default, _QDQ.dequantize_per_tensor.tensor)
_DEQUANTIZE_WEIGHT = (*_DEQUANTIZE, _QDQ.dequantize_per_channel.default)
_CONVS = frozenset({
    _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default,
    _ATEN.conv1d.padding, _ATEN.conv2d.padding, _ATEN.conv3d.padding,
    _ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input,
    _ATEN.convolution.default,
})  # fmt: skip
_MATRIX_PRODUCTS = frozenset({_ATEN.linear.default, _ATEN.matmul.default, _ATEN.mm.default, _ATEN.bmm.default})
_KERNELS = _CONVS | _MATRIX_PRODUCTS | {_ATEN.embedding.default, _ATEN.scaled_dot_product_attention.default}


def _with_in_place(*names: str) -> frozenset[Any]:
    """The overloads of these functions, and of the twins that write into their input."""
    packets = [getattr(_ATEN, twin) for name in names for twin in (name, f"{name}_") if hasattr(_ATEN, twin)]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


_CLAMPS = _with_in_place("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max")
#: Functions that give values of their input, in another order or fewer of them.
_MOVES = _with_in_place(
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "numpy_T", "mT", "squeeze",
    "unsqueeze", "expand", "expand_as", "repeat", "slice", "select", "narrow", "split", "split_with_sizes", "chunk",
    "unbind", "contiguous", "clone", "alias", "detach", "dropout", "feature_dropout", "max_pool1d", "max_pool2d",
    "max_pool3d", "adaptive_max_pool2d", "upsample_nearest2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "roll", "flip", "index_select", "gather", "pad", "constant_pad_nd",
) | {operator.getitem}  # fmt: skip
_SUMS = _with_in_place("add", "cat")
_PRODUCT = _with_in_place("mul")
_GATES = _with_in_place("sigmoid", "hardsigmoid", "tanh")
_POOLS = _with_in_place(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Which steps of a program a runtime computes with integers, besides layers with integer weights.

    Attributes:
        combining: Steps of integers whose result is quantized too.
        reading: Steps that take integers and may give floats.
        convs_write_integers: There is an int8 convolution only where its output is quantized, directly or behind a
            ReLU; any other convolution is left in float.
        moved_again: Values that were moved behind a pair (pooled by their maximum, reshaped) have a pair of their own:
            the runtime only looks at what stands right before a layer.
    """

    combining: frozenset[Any] = frozenset()
    reading: frozenset[Any] = frozenset()
    convs_write_integers: bool = False
    moved_again: bool = False


_PRODUCTS = frozenset({_ATEN.matmul.default, _ATEN.mm.default, _ATEN.bmm.default})

#: Format -> how its runtime fuses; None: it has none of its own, and everything that is known stays in.
#: docs/architecture.md says how that was found.
LAYOUTS: dict[str, Layout | None] = {
    "pt2": None,
    "onnx": Layout(
        combining=_SUMS | _POOLS | _with_in_place("mul", "leaky_relu", "softmax"),
        reading=_PRODUCTS,
        convs_write_integers=True,
    ),
    "openvino": Layout(combining=_SUMS | _with_in_place("mul"), reading=_PRODUCTS | _POOLS),
    "aoti": Layout(combining=_SUMS, reading=_POOLS, moved_again=True),
}


def laid_out(program: Program, layout: Layout | None, in_float: Collection[str] = ()) -> Program:
    """A copy of ``program``, which shares its weights, with the pairs that a runtime fuses.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`.
        layout: One of ``LAYOUTS``.
        in_float: Layers, by the names of :func:`int8_layers`, that compute in float, with the values that their int8
            weights stand for.
    """
    shared = {id(tensor): tensor for tensor in (*program.state_dict.values(), *program.constants.values())}
    result = copy.deepcopy(program, shared)
    graph = result.graph
    found = _int8_calls(result)
    floating = set(in_float) & found.keys()
    if layout is not None:
        if not layout.moved_again:
            _drop(result, (q for q in _pairs(graph) if _moves_integers(q)))
        if layout.convs_write_integers:
            for name, calls in found.items():
                if any(call.target in _CONVS and not _writes_integers(call) for call in calls):
                    floating.add(name)
    for name in floating:
        _store_in_float(result, name)
    layers = {call for name, calls in found.items() if name not in floating for call in calls}
    if floating:
        _drop(result, (q for q in _pairs(graph) if not _touches(q, layers)))
    if layout is not None:
        while idle := [q for q in _pairs(graph) if _is_idle(q, layout, layers)]:
            _drop(result, idle)
    graph.eliminate_dead_code()
    graph.lint()
    result.graph_module.recompile()
    return result


def int8_layers(program: Program) -> dict[str, fx.Node]:
    """Layer -> its node (the first of several calls), in the order of the graph, for each with a weight in int8.

    The name is that of the weight's buffer without ``module.`` before it and ``.weight`` behind it.
    """
    return {name: calls[0] for name, calls in _int8_calls(program).items()}


def _int8_calls(program: Program) -> dict[str, list[fx.Node]]:
    names = _state_names(program)
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target not in _KERNELS:
            continue
        for dequantize in node.all_input_nodes:
            if dequantize.target in _DEQUANTIZE_WEIGHT:
                stored = dequantize.args[0]
                if isinstance(stored, fx.Node) and stored.name in names:
                    found.setdefault(_layer(names[stored.name]), []).append(node)
    return found


def _layer(buffer: str) -> str:
    return buffer.removeprefix("module.").removesuffix(".weight")


def _state_names(program: Program) -> dict[str, str]:
    """Placeholder -> the name in the program's state."""
    kinds = (InputKind.BUFFER, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR)
    return {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and isinstance(spec.arg, TensorArgument)
    }


def _pairs(graph: fx.Graph) -> list[fx.Node]:
    """The quantize nodes of activations of which every user dequantizes."""
    return [
        node
        for node in graph.nodes
        if node.target in _QUANTIZE and node.users and all(user.target in _DEQUANTIZE for user in node.users)
    ]


def _users_of_pair(quantize: fx.Node) -> list[fx.Node]:
    return [user for dequantize in quantize.users for user in dequantize.users]


def _drop(program: Program, pairs: Iterable[fx.Node]) -> None:
    renamed: dict[str, str] = {}
    for quantize in list(pairs):
        value = quantize.args[0]
        assert isinstance(value, fx.Node)
        for dequantize in list(quantize.users):
            dequantize.replace_all_uses_with(value)
            program.graph.erase_node(dequantize)
            renamed[dequantize.name] = value.name
        program.graph.erase_node(quantize)
    for spec in program.graph_signature.output_specs:
        while isinstance(spec.arg, TensorArgument) and spec.arg.name in renamed:
            spec.arg = TensorArgument(name=renamed[spec.arg.name])


def _moves_integers(quantize: fx.Node) -> bool:
    """Whether what is quantized is on a grid already: moved from where it was dequantized."""
    return _origin(quantize.args[0]).target in _DEQUANTIZE


def _origin(node: Any) -> fx.Node:
    """Where the values of a node come from, before they were moved."""
    assert isinstance(node, fx.Node)
    while node.target in _MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _readers(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """What computes with the values of ``nodes``, after they were moved."""
    found: list[fx.Node] = []
    waiting = list(nodes)
    while waiting:
        for user in waiting.pop().users:
            if user.target in _MOVES:
                waiting.append(user)
            else:
                found.append(user)
    return found


def _is_idle(quantize: fx.Node, layout: Layout, layers: set[fx.Node]) -> bool:
    """Whether no step computes with the integers of a pair."""
    source = quantize.args[0]
    assert isinstance(source, fx.Node)
    if layout.convs_write_integers:
        behind = source.args[0] if source.target in _CLAMPS else source
        if behind in layers and isinstance(behind, fx.Node) and _has_bias_inside(behind):
            return False
    return not any(reader in layers or _is_integer_step(reader, layout) for reader in _readers(quantize.users))


def _has_bias_inside(layer: fx.Node) -> bool:
    """Whether the bias is added by the kernel, which is one of integers only if it writes integers as well.

    A linear layer of more than two dimensions is a product and a sum.
    """
    return layer.target in _CONVS or layer.meta["val"].dim() == 2


def _is_integer_step(node: fx.Node, layout: Layout) -> bool:
    if node.target not in layout.combining and node.target not in layout.reading:
        return False
    if any(_origin(x).target not in _DEQUANTIZE for x in node.all_input_nodes):
        return False
    if not layout.convs_write_integers and _is_gated(node):  # it is inside of the kernel in front of it
        return False
    outputs = _readers([node])
    if len(outputs) == 1 and outputs[0].target in _CLAMPS:
        outputs = _readers(outputs)
    return node.target in layout.reading or all(reader.target in _QUANTIZE for reader in outputs)


def _is_gated(node: fx.Node) -> bool:
    """Whether a product is ``x * sigmoid(x)``, which runtimes compute as one activation."""
    if node.target not in _PRODUCT or len(node.all_input_nodes) != 2:
        return False
    one, other = (_in_front_of_pair(side) for side in node.all_input_nodes)
    orders = ((one, other), (other, one))
    return any(gate.target in _GATES and _in_front_of_pair(gate.args[0]) is value for gate, value in orders)


def _in_front_of_pair(node: Any) -> fx.Node:
    """The value that a pair rounds; any other value itself."""
    quantize = node.args[0] if node.target in _DEQUANTIZE else node
    value: fx.Node = quantize.args[0] if quantize.target in _QUANTIZE else node
    return value


def _writes_integers(layer: fx.Node) -> bool:
    """Whether what a convolution gives is quantized, by everything that reads it, directly or behind a ReLU."""
    users = list(layer.users)
    if len(users) == 1 and users[0].target in _CLAMPS:
        users = list(users[0].users)
    return bool(users) and all(user.target in _QUANTIZE for user in users)


def _touches(quantize: fx.Node, kernels: set[fx.Node]) -> bool:
    """Whether one of ``kernels`` is the nearest before or behind a pair."""
    after = _nearest(_users_of_pair(quantize), lambda node: list(node.users))
    return bool((_nearest([quantize], lambda node: node.all_input_nodes) | after) & kernels)


def _nearest(starts: Iterable[fx.Node], step: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    """The first kernels on every way from ``starts``."""
    seen: set[fx.Node] = set()
    found: set[fx.Node] = set()
    waiting = deque(starts)
    while waiting:
        node = waiting.popleft()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _KERNELS:
            found.add(node)
        else:
            waiting.extend(step(node))
    return found


def _store_in_float(program: Program, layer: str) -> None:
    """Let the weight of a layer be stored as the floats that it stands for."""
    names = _state_names(program)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    stored = next(placeholders[name] for name, buffer in names.items() if _layer(buffer) == layer)
    dequantizers = [user for user in stored.users if user.target in _DEQUANTIZE_WEIGHT]
    assert len(dequantizers) == len(stored.users), f"{layer}: its integers have another use"

    def value(argument: object) -> object:
        if not isinstance(argument, fx.Node):
            return argument
        name = names[argument.name]
        return program.state_dict[name] if name in program.state_dict else program.constants[name]

    first = dequantizers[0]
    weight = first.target(*(value(argument) for argument in first.args))
    target = program.state_dict if names[stored.name] in program.state_dict else program.constants
    target[names[stored.name]] = weight.detach()
    stored.meta["val"] = first.meta["val"]
    for dequantize in dequantizers:
        dequantize.replace_all_uses_with(stored)
        program.graph.erase_node(dequantize)

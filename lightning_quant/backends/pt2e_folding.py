"""Batch norms in exported graphs: fake quantized together with the layer before them, and folded into it.

torchao has both, and they are not used here, because of what they do to a batch norm
(``torchao/quantization/pt2e/qat_utils.py`` and ``export_utils.py``, the same in all versions up to 0.18;
https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/pt2e/qat_utils.py):

* the fusion of convolution and batch norm for training, and the switch between training and evaluation, replace its
  ``eps`` and ``momentum`` by 1e-5 and 0.1 (``TODO: allow setting eps``), and the ``p`` of a dropout by 0.5;
* ``convert_pt2e`` folds with the ``eps`` that was put there;
* the fusion divides the output of the convolution by ``gamma / sigma``, which is NaN where ``gamma`` is 0;
* a running variance that is shared, or a batch norm that is frozen alone, has no mode of its own.

Nothing that torchao does to batch norms finds one here: in training they are modules that the graph calls (see
:mod:`lightning_quant.backends.pt2e_capture`), and before anything is converted they are folded with their own numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_quant import learned_scale
from lightning_quant._torch_ao import is_fake_quantize, is_observer
from lightning_quant.backends.constants import value_of
from lightning_quant.backends.graph import place_of
from lightning_quant.fusion import FusedGroup

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Weighted:
    """Where an operator has its data and its weight, and the dimension of the weight that is the output's channels.

    Attributes:
        data: Position of the data among the arguments.
        weight: Position of the weight.
        bias: Position of the bias; None: it has none.
        axis: Of the weight; None: no int8 kernel takes one scale per channel.
    """

    data: int = 0
    weight: int = 1
    bias: int | None = 2
    axis: int | None = 0


CONVS = (
    _ATEN.conv1d.default, _ATEN.conv1d.padding, _ATEN.conv2d.default, _ATEN.conv2d.padding, _ATEN.conv3d.default,
    _ATEN.conv3d.padding,
)  # fmt: skip
TRANSPOSED = (_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input)
LINEAR = _ATEN.linear.default

#: The operators with weights. A product of matrices is one if its second factor is computed from parameters alone.
WEIGHTED: dict[Any, Weighted] = {
    **dict.fromkeys(CONVS, Weighted()),
    # pytorch/pytorch#47535
    **dict.fromkeys(TRANSPOSED, Weighted(axis=None)),
    LINEAR: Weighted(),
    _ATEN.matmul.default: Weighted(bias=None, axis=1),
    _ATEN.mm.default: Weighted(bias=None, axis=1),
    _ATEN.addmm.default: Weighted(data=1, weight=2, bias=0, axis=1),
}


def constants_of(graph_module: fx.GraphModule) -> frozenset[fx.Node]:
    """The nodes whose values depend on parameters and buffers alone."""
    found: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op.startswith("call") and inputs and all(x in found for x in inputs)):
            found.add(node)
    return frozenset(found)


def weighted(node: fx.Node, constants: Container[fx.Node]) -> Weighted | None:
    """How ``node`` computes with a stored weight, or None if it does not. ``constants`` are the stored values."""
    found = WEIGHTED.get(node.target) if node.op == "call_function" else None
    if found is None or len(node.args) <= found.weight:
        return None
    weight = node.args[found.weight]
    if not isinstance(weight, fx.Node) or weight not in constants or node.args[found.data] in constants:
        return None
    if found.axis == 1 and weight.meta["val"].dim() != 2:
        return None  # a batch of matrices
    return found


def _layer_before(norm: fx.Node, constants: Container[fx.Node]) -> fx.Node | None:
    """The layer with weights that a batch norm can be folded into: nothing else reads what it gives."""
    layer = norm.args[0]
    if not isinstance(layer, fx.Node) or len(layer.users) != 1 or weighted(layer, constants) is None:
        return None
    if layer.target in (*CONVS, *TRANSPOSED):
        return layer
    # channels of a linear layer are the last dimension, those of a batch norm the second
    return layer if layer.target is LINEAR and layer.meta["val"].dim() == 2 else None


def _is_norm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm)
    return node.target is _ATEN.batch_norm.default and node.args[5] is False


def groups(graph_module: fx.GraphModule) -> tuple[FusedGroup, ...]:
    """Layers with weights, and the batch norm and the ReLU after them, that run as one int8 kernel."""
    found = []
    constants = constants_of(graph_module)
    for node in graph_module.graph.nodes:
        if weighted(node, constants) is None:
            continue
        members = [place_of(node) or node.name]
        last = node
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is not None and _is_norm(graph_module, reader) and _layer_before(reader, constants) is node:
            members.append(str(reader.target) if reader.op == "call_module" else place_of(reader))
            last = reader
        reader = next(iter(last.users)) if len(last.users) == 1 else None
        if reader is not None and reader.target is _ATEN.relu.default:
            members.append(place_of(reader) or reader.name)
        if len(members) > 1:
            found.append(FusedGroup(tuple(members)))
    return tuple(found)


def observe_folded(graph_module: fx.GraphModule, *, per_channel: bool) -> None:
    """In training, let weights that have one scale be fake quantized as they will be with their batch norm folded in.

    With one scale for each channel and a symmetric range nothing has to be done: ``fq(w * s) / s == fq(w)``, because
    the scale of a channel is proportional to its largest weight.
    """
    constants = constants_of(graph_module)
    for norm in list(graph_module.graph.nodes):
        if not _is_norm(graph_module, norm):
            continue
        layer = _layer_before(norm, constants)
        module: Any = graph_module.get_submodule(str(norm.target)) if norm.op == "call_module" else None
        if layer is None or module is None or not module.affine or not module.track_running_stats:
            continue
        how = WEIGHTED[layer.target]
        if per_channel and how.axis is not None:
            continue
        weight: Any = layer.args[how.weight]
        with graph_module.graph.inserting_before(layer):
            tensors = tuple(graph_module.graph.get_attr(f"{norm.target}.{name}") for name in ("weight", "running_var"))
            options = (module.eps, layer.target in TRANSPOSED, groups_of(layer))
            scaled = graph_module.graph.call_function(scaled_weight, (weight, *tensors, *options))
            again = graph_module.graph.call_function(unscaled_weight, (scaled, weight, *tensors, *options))
        for node in (scaled, again):
            node.meta.update(val=weight.meta["val"], nn_module_stack=layer.meta.get("nn_module_stack", {}))
        layer.update_arg(how.weight, again)
    graph_module.recompile()


def groups_of(layer: fx.Node) -> int:
    """The groups of a convolution, transposed or not; of any other layer, 1."""
    convolves = layer.target in (*CONVS, *TRANSPOSED)
    groups: Any = layer.args[6] if convolves and len(layer.args) > 6 else 1
    return int(groups)


def stride_of(layer: fx.Node) -> tuple[int, ...]:
    """The stride of a convolution, transposed or not, by dimension; of any other layer, nothing."""
    if layer.target not in (*CONVS, *TRANSPOSED):
        return ()
    dimensions = layer.meta["val"].dim() - 2
    given: Any = layer.args[3] if len(layer.args) > 3 else (1,)
    return tuple(given) if len(given) == dimensions else tuple(given) * dimensions


def by_channel(x: torch.Tensor, weight: torch.Tensor, transposed: bool, groups: int) -> torch.Tensor:
    """``(channels,)`` in a shape that multiplies the outputs' channels of ``weight``."""
    if not transposed:
        return x.reshape([-1] + [1] * (weight.dim() - 1))
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]  # a transposed weight is (in, out / groups, ...)
    spread = x.reshape(groups, 1, outputs).expand(groups, inputs, outputs)
    return spread.reshape([weight.shape[0], outputs] + [1] * (weight.dim() - 2))


def _factor(
    weight: torch.Tensor, gamma: torch.Tensor, variance: torch.Tensor, eps: float, transposed: bool, groups: int
) -> torch.Tensor:
    return by_channel(gamma / torch.sqrt(variance + eps), weight, transposed, groups)


def scaled_weight(
    weight: torch.Tensor, gamma: torch.Tensor, variance: torch.Tensor, eps: float, transposed: bool, groups: int
) -> torch.Tensor:
    """``weight`` with the batch norm folded in."""
    return weight * _factor(weight, gamma, variance, eps, transposed, groups)


def unscaled_weight(
    scaled: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    transposed: bool,
    groups: int,
) -> torch.Tensor:
    """The reverse of :func:`scaled_weight`; a channel that is scaled by 0 has no quantization error."""
    factor = _factor(weight, gamma, variance, eps, transposed, groups)
    silent = factor == 0
    return torch.where(silent, weight, scaled / torch.where(silent, torch.ones_like(factor), factor))


def fold_batch_norms(graph_module: fx.GraphModule) -> None:
    """Fold every batch norm of a graph in eval mode into the layer before it, or make it a product and a sum.

    Each layer gets a weight, a bias and an observer of its own: it may share them with others whose batch norms differ.
    """
    with torch.no_grad():
        for number, norm in enumerate(list(graph_module.graph.nodes)):
            if not _is_norm(graph_module, norm):
                continue
            numbers = _numbers(graph_module, norm)
            if numbers is None:
                continue
            layer = _layer_before(norm, constants_of(graph_module))
            if layer is None:
                _write_out(graph_module, norm, number, *numbers)
            else:
                _fold(graph_module, norm, layer, number, *numbers)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _numbers(graph_module: fx.GraphModule, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(factor, shift)``, each ``(channels,)``: what a batch norm in eval mode does is ``x * factor + shift``."""
    if norm.op == "call_module":
        module: Any = graph_module.get_submodule(str(norm.target))
        gamma, beta, mean, variance, eps = (
            module.weight, module.bias, module.running_mean, module.running_var, module.eps
        )  # fmt: skip
    else:
        values = [value_of(graph_module, x) if isinstance(x, fx.Node) else None for x in norm.args[1:5]]
        gamma, beta, mean, variance = values
        eps = norm.args[7]
    if mean is None or variance is None:
        return None  # it normalises with the statistics of the batch also in evaluation
    factor = torch.rsqrt(variance.double() + eps)
    factor = factor if gamma is None else factor * gamma.double()
    shift = -mean.double() * factor
    shift = shift if beta is None else shift + beta.double()
    return factor.to(mean.dtype), shift.to(mean.dtype)


def _stored(graph_module: fx.GraphModule, name: str, value: torch.Tensor, before: fx.Node, like: Any = None) -> fx.Node:
    graph_module.register_buffer(name, value.detach().clone())
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(name)
    if like is not None:
        node.meta["val"] = like.meta["val"]
    return node


def _fold(
    graph_module: fx.GraphModule,
    norm: fx.Node,
    layer: fx.Node,
    number: int,
    factor: torch.Tensor,
    shift: torch.Tensor,
) -> None:
    how = WEIGHTED[layer.target]
    node: Any = layer.args[how.weight]
    source, observer = weight_source(graph_module, node)
    weight = value_of(graph_module, source)
    bias_node = layer.args[2] if len(layer.args) > 2 else None
    bias = value_of(graph_module, bias_node) if isinstance(bias_node, fx.Node) else torch.zeros_like(shift)
    scale = by_channel(factor, weight, layer.target in TRANSPOSED, groups_of(layer))
    folded = _stored(graph_module, f"folded_{number}_weight", weight * scale, layer, node)
    if observer is not None:
        name = f"folded_{number}_observer"
        own = copy.deepcopy(graph_module.get_submodule(str(observer.target)))
        seen: Any = observer.args[0]
        if seen.target is not scaled_weight:
            learned_scale.fold(own, factor)
        graph_module.add_submodule(name, own)
        with graph_module.graph.inserting_before(layer):
            observed = graph_module.graph.call_module(name, (folded,))
        observed.meta.update(observer.meta)
        folded = observed
    layer.update_arg(how.weight, folded)
    bias = _stored(graph_module, f"folded_{number}_bias", bias * factor + shift, layer)
    layer.args = (*layer.args[:2], bias, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    graph_module.graph.erase_node(norm)


def weight_source(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What gives a weight before it is scaled, and the observer or fake quantize between, if there is one."""
    observer = None
    while True:
        if node.op == "call_module" and is_observer(graph_module.get_submodule(str(node.target))):
            observer = node
        elif node.target is unscaled_weight or node.target is scaled_weight:
            pass
        else:
            return node, observer
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source


def _write_out(
    graph_module: fx.GraphModule, norm: fx.Node, number: int, factor: torch.Tensor, shift: torch.Tensor
) -> None:
    """``x * factor + shift``: torchao takes every batch norm operator for one that it has to fold."""
    first = norm.args[0]
    assert isinstance(first, fx.Node)
    shape = [1, -1] + [1] * (first.meta["val"].dim() - 2)
    scale = _stored(graph_module, f"norm_{number}_scale", factor.reshape(shape), norm)
    offset = _stored(graph_module, f"norm_{number}_shift", shift.reshape(shape), norm)
    with graph_module.graph.inserting_before(norm):
        product = graph_module.graph.call_function(_ATEN.mul.Tensor, (first, scale))
        result = graph_module.graph.call_function(_ATEN.add.Tensor, (product, offset))
    for node in (product, result):
        node.meta.update(norm.meta)
    norm.replace_all_uses_with(result)
    graph_module.graph.erase_node(norm)


def store_computed_weights(graph_module: fx.GraphModule) -> None:
    """Compute weights that the graph computes from parameters, and store them."""
    constants = constants_of(graph_module)
    for number, node in enumerate(list(graph_module.graph.nodes)):
        how = weighted(node, constants)
        if how is None:
            continue
        weight: Any = node.args[how.weight]
        source, observer = weight_source(graph_module, weight)
        if observer is None:
            source = weight
        if source.op == "get_attr":
            continue
        with torch.no_grad():
            value = value_of(graph_module, source)
        stored = _stored(graph_module, f"computed_{number}_weight", value, source, source)
        source.replace_all_uses_with(stored)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def observe_weights(graph_module: fx.GraphModule) -> frozenset[str]:
    """Let observers of weights see them as they are now. Returns the names of those observers."""
    names = set()
    constants = constants_of(graph_module)
    module: Any
    with torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.op != "call_module" or node.args[0] not in constants:
                continue
            module = graph_module.get_submodule(str(node.target))
            if not is_observer(module):
                continue
            used_as_weight = any(
                user.target is unscaled_weight or (user.target in WEIGHTED and _is_weight_of(user, node))
                for user in node.users
            )
            if not used_as_weight:
                continue
            names.add(str(node.target))
            if is_fake_quantize(module):
                module.enable_observer()
            module(value_of(graph_module, node.args[0]))
    return frozenset(names)


def _is_weight_of(layer: fx.Node, node: fx.Node) -> bool:
    return layer.args[WEIGHTED[layer.target].weight] is node

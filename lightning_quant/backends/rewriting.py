"""A traced graph in the one form that every backend quantizes: layers are modules, one for each call.

Functional layers with stored weights become modules with the same Parameters, products with stored matrices linear
layers, and what a kernel cannot do for a layer (padding with other values, output sizes) stands beside it.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant.backends.constants import fold_weights, is_constant, value_of
from lightning_quant.backends.kernels import plain_dilation
from lightning_quant.qconfig import CONV_FUNCTIONS, CONV_TRANSPOSE_FUNCTIONS, CONV_TRANSPOSES, CONVS, EMBEDDINGS


class Opaque(nn.Module):
    """A module that stays as it is: no pattern of torch.ao matches its type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self.module(*args, **kwargs)


@dataclass(frozen=True)
class Rewritten:
    """What :func:`rewrite` made.

    Attributes:
        origins: Module of the graph that stands for another one of the traced module -> that one's name.
        float_layers: Layers with weights that stay float for a reason of their own -> that reason.
    """

    origins: dict[str, str]
    float_layers: dict[str, str]


def rewrite(
    graph_module: fx.GraphModule, scopes: dict[str, tuple[str, type]], kept: Collection[str], *, training: bool
) -> Rewritten:
    """Bring a traced graph into the form that torch.ao fuses and lowers.

    Args:
        graph_module: Changed in place.
        scopes: Node name -> (qualified name, type) of the module in which it was traced.
        kept: Modules that are called as they are.
        training: It is to be trained: weights that are computed from parameters are computed at every step.
    """
    _write_out_functions(graph_module)
    if not training:
        fold_weights(graph_module)
    _drop_identities(graph_module)
    origins = _layers_of_functions(graph_module, scopes, training) | _embeddings_of_functions(graph_module, scopes)
    # a module that is kept may carry state: its calls are calls of the one module
    origins |= _separate_calls(graph_module, kept)
    origins |= _hide_batch_norms(graph_module, training)
    reasons = _hide_hooked(graph_module)
    _write_out_convolutions(graph_module)
    _keep_scalars_apart(graph_module.graph)
    graph_module.recompile()
    return Rewritten(origins, reasons)


def _write_out_functions(graph_module: fx.GraphModule) -> None:
    """Give functional layers the form that torch.ao lowers: all arguments by position, sizes as tuples, no words."""
    for node in graph_module.graph.nodes:
        if node.op == "call_method" and node.target == "view" and not _is_type(node.args[1:]):
            node.target = "reshape"  # int8 kernels give channels-last tensors, of which some views are none
        _write_out_move(graph_module, node)
        if node.op != "call_function":
            continue
        if node.target is torch.relu:
            node.target = F.relu
        elif node.target is F.linear:
            if len(node.args) < 3 and "bias" not in node.kwargs:
                node.kwargs = {**node.kwargs, "bias": None}
        elif node.target in (*CONV_FUNCTIONS, *CONV_TRANSPOSE_FUNCTIONS):
            _write_out(graph_module, node)
        else:
            _write_out_product(graph_module, node)


def _write_out_move(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Give what flattens and reshapes the one form that torch.ao's table of int8 operators has an entry for."""
    if node.op == "call_method" and node.target == "flatten":
        node.op, node.target = "call_function", torch.flatten
    elif node.op == "call_function" and node.target is torch.reshape:
        values = {**dict(zip(("input", "shape"), node.args, strict=False)), **node.kwargs}
        node.op, node.target = "call_method", "reshape"
        node.args, node.kwargs = (values["input"], values["shape"]), {}
    elif node.op == "call_module":
        module: Any = graph_module.get_submodule(str(node.target))
        if type(module) is nn.Flatten and not module._forward_hooks and not module._forward_pre_hooks:
            node.op, node.target = "call_function", torch.flatten
            node.args = (*node.args, *node.kwargs.values(), module.start_dim, module.end_dim)
            node.kwargs = {}


def _is_type(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], torch.dtype)


def _write_out_product(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Make the product of data and a stored matrix a linear layer."""
    if node.target is torch.addmm and len(node.args) == 3 and not node.kwargs:
        bias, data, matrix = node.args
    elif node.target in (torch.matmul, torch.mm, operator.matmul) and len(node.args) == 2 and not node.kwargs:
        bias, (data, matrix) = None, node.args
    else:
        return
    if not _is_stored(graph_module, matrix, 2) or not (bias is None or _is_stored(graph_module, bias, 1)):
        return
    if not isinstance(data, fx.Node) or is_constant(graph_module, data):
        return
    with graph_module.graph.inserting_before(node):
        weight = graph_module.graph.call_method("t", (matrix,))
    node.target, node.args, node.kwargs = F.linear, (data, weight, bias), {}


def _is_stored(graph_module: fx.GraphModule, value: Any, dims: int) -> bool:
    """Whether ``value`` is a tensor of so many dimensions that depends on parameters and buffers alone."""
    if not isinstance(value, fx.Node) or not is_constant(graph_module, value):
        return False
    with torch.no_grad():
        tensor = value_of(graph_module, value)
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim() == dims


#: Function -> the layer that it is.
LAYERS: dict[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    **dict(zip(CONV_FUNCTIONS, CONVS, strict=True)),
    **dict(zip(CONV_TRANSPOSE_FUNCTIONS, CONV_TRANSPOSES, strict=True)),
}


#: Functions that give their first argument back where ``training`` is false; stochastic depth is torchvision's.
_ONLY_IN_TRAINING = ("dropout", "feature_dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
                     "stochastic_depth")  # fmt: skip


def _drop_identities(graph_module: fx.GraphModule) -> None:
    """Take what does nothing out of the graph: it stands between layers that could be fused."""
    for node in list(graph_module.graph.nodes):
        if node.args and _does_nothing(graph_module, node):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _does_nothing(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return type(module) is nn.Identity and not module._forward_hooks
    if not callable(node.target) or getattr(node.target, "__name__", "") not in _ONLY_IN_TRAINING:
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # it has no signature, or another one
        return False
    given.apply_defaults()
    return given.arguments.get("training") is False


def _layers_of_functions(
    graph_module: fx.GraphModule, scopes: dict[str, tuple[str, type]], training: bool
) -> dict[str, str]:
    """Make functional layers with stored weights modules with the same Parameters, which fuse and train as modules do.

    They are in the mode of the graph: torch.ao folds no batch norm in evaluation into a layer in training.

    Returns:
        Name of each new module that has another name than the module whose Parameters it uses -> the latter.
    """
    origins: dict[str, str] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in LAYERS:
            continue
        names = ("input", "weight", "bias")
        values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        weight, bias = values["weight"], values.get("bias")
        stored = all(x is None or (isinstance(x, fx.Node) and x.op == "get_attr") for x in (weight, bias))
        if not stored or weight is None or any(isinstance(x, (fx.Node, str)) for x in node.args[3:]):
            continue
        if not isinstance(values["input"], fx.Node):
            continue
        tensor = operator.attrgetter(str(weight.target))(graph_module)
        offset = None if bias is None else operator.attrgetter(str(bias.target))(graph_module)
        layer = layer_with(LAYERS[node.target], tensor, offset, node.args[3:]).train(training)
        name, owner = _name_for(graph_module, weight, {weight, bias}, scopes.get(node.name, ("", None))[0])
        if name != owner:
            origins[name] = owner
        graph_module.add_submodule(name, layer)
        node.op, node.target, node.args, node.kwargs = "call_module", name, (values["input"],), {}
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)
    return {name: origin for name, origin in origins.items() if origin}


def _name_for(graph_module: fx.GraphModule, weight: fx.Node, used: Collection[Any], scope: str) -> tuple[str, str]:
    """The name for a layer with a stored weight, and that of the module whose weight it is.

    Args:
        graph_module: In which it will be.
        weight: The node that reads the weight.
        used: The nodes that read what the layer will have.
        scope: The module in which it was called.
    """
    owner, _, attribute = str(weight.target).rpartition(".")
    if str(weight.target).startswith("folded_"):
        owner, attribute = scope, "weight"
    stem = attribute.removesuffix("weight").rstrip("_")
    name = ".".join(x for x in (owner, stem) if x) or "function"
    if name != owner or not _is_free(graph_module, name, used):
        base, number = name, 0
        while graph_module_has(graph_module, name):
            number += 1
            name = f"{base}_call{number}"
    return name, owner


def _embeddings_of_functions(graph_module: fx.GraphModule, scopes: dict[str, tuple[str, type]]) -> dict[str, str]:
    """As :func:`_layers_of_functions`, for ``F.embedding`` and ``F.embedding_bag``."""
    origins: dict[str, str] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in (F.embedding, F.embedding_bag):
            continue
        values = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        data = {key: values.pop(key) for key in ("input", "offsets", "per_sample_weights") if key in values}
        weight = values.pop("weight")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not isinstance(data["input"], fx.Node):
            continue
        if any(isinstance(value, fx.Node) for value in values.values()):
            continue
        tensor = operator.attrgetter(str(weight.target))(graph_module)
        kind: Any = nn.Embedding if node.target is F.embedding else nn.EmbeddingBag
        with torch.device("meta"):
            layer = kind(*tensor.shape, **values)
        layer.weight = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        layer.is_view = True
        name, owner = _name_for(graph_module, weight, {weight}, scopes.get(node.name, ("", None))[0])
        if name != owner and owner:
            origins[name] = owner
        graph_module.add_submodule(name, layer)
        node.op, node.target, node.args, node.kwargs = "call_module", name, (data.pop("input"),), data
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)
    return origins


def graph_module_has(graph_module: nn.Module, name: str) -> bool:
    """Whether there is a submodule or another attribute of this name."""
    try:
        operator.attrgetter(name)(graph_module)
    except AttributeError:
        return False
    return True


def _is_free(graph_module: fx.GraphModule, name: str, used: Collection[Any]) -> bool:
    """Whether a graph has the module ``name`` for what the nodes ``used`` read of it, and for nothing else."""
    if any(True for _ in graph_module.get_submodule(name).children()):
        return False
    return not any(
        (node.op == "call_module" and node.target == name)
        or (node.op == "get_attr" and node.users and str(node.target).startswith(f"{name}.") and node not in used)
        for node in graph_module.graph.nodes
    )


def layer_with(kind: type[nn.Module], weight: Any, bias: torch.Tensor | None, settings: tuple[Any, ...]) -> Any:
    """A layer of ``torch.nn`` with these very tensors. ``settings`` are those of the function, behind the bias."""
    with torch.device("meta"):
        if kind is nn.Linear:
            layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        elif kind in CONV_TRANSPOSES:
            stride, padding, output_padding, groups, dilation = settings
            layer = kind(
                weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), stride, padding, output_padding,
                groups, bias is not None, dilation,
            )  # fmt: skip
        else:
            stride, padding, dilation, groups = settings
            layer = kind(
                weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), stride, padding, dilation, groups,
                bias is not None,
            )  # fmt: skip
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(layer, name, tensor if is_parameter else nn.Parameter(tensor, requires_grad=False))
    layer.is_view = True
    return layer


def _hide_hooked(graph_module: fx.GraphModule) -> dict[str, str]:
    """Keep layers with forward hooks as they are: what a hook changes, no kernel would know of."""
    reasons: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(node.target)
        if (module._forward_hooks or module._forward_pre_hooks) and not isinstance(module, Opaque):
            graph_module.add_submodule(str(node.target), Opaque(module))
            reasons[str(node.target)] = "it has forward hooks, which an int8 kernel would not run"
    return reasons


def _write_out_convolutions(graph_module: fx.GraphModule) -> None:
    """Give layers the form that torch.ao lowers: padding that its kernels have, no output sizes."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(node.target)
            if type(module) in (*CONVS, *CONV_TRANSPOSES):
                module = _without_idle_dilation(graph_module, node, module)
            if type(module) in CONVS:
                _pad_apart(graph_module, node, module)
            elif type(module) in CONV_TRANSPOSES:
                _size_apart(graph_module, node, module)
            elif isinstance(module, nn.LeakyReLU) and module.inplace:  # the int8 kernel warns that it cannot
                view = _view(module)
                view.inplace = False
                graph_module.add_submodule(str(node.target), view)


def _without_idle_dilation(graph_module: fx.GraphModule, node: fx.Node, conv: Any) -> Any:
    """Give a convolution the dilation that its kernel is asked about."""
    dilation = plain_dilation(conv.kernel_size, conv.dilation, conv.stride, getattr(conv, "output_padding", None))
    if dilation == tuple(conv.dilation):
        return conv
    view = _view(conv)
    view.dilation = dilation
    graph_module.add_submodule(str(node.target), view)
    return view


def _size_apart(graph_module: fx.GraphModule, node: fx.Node, conv: nn.Module) -> None:
    """Int8 kernels of transposed convolutions take no ``output_size``: one that is given keeps the layer in float."""
    sizes = [*node.args[1:], *node.kwargs.values()]
    if all(size is None for size in sizes):
        node.args, node.kwargs = node.args[:1], {}
    elif not isinstance(conv, Opaque):
        graph_module.add_submodule(str(node.target), Opaque(conv))


def _pad_apart(graph_module: fx.GraphModule, node: fx.Node, conv: Any) -> None:
    """Pad before a convolution that pads in a way that int8 kernels do not have: other values, or uneven sides."""
    if conv.padding_mode == "zeros":
        if not isinstance(conv.padding, str):
            return
        padding = _same_padding(conv.padding, conv.kernel_size, conv.dilation)
        if padding is not None:
            conv.padding = padding
            return
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    bare = _view(conv)
    bare.padding, bare.padding_mode = (0,) * len(conv.kernel_size), "zeros"
    graph_module.add_submodule(str(node.target), bare)
    with graph_module.graph.inserting_before(node):
        padded = graph_module.graph.call_function(
            F.pad, (node.args[0], list(conv._reversed_padding_repeated_twice)), {"mode": mode}
        )
    node.args = (padded, *node.args[1:])


def _view(module: nn.Module) -> Any:
    """Another module with the same Parameter and buffer objects."""
    twin: Any = copy.copy(module)
    for name, registry in list(vars(twin).items()):
        if isinstance(registry, dict):  # parameters, buffers, children and hooks: those of one are not the other's
            setattr(twin, name, copy.copy(registry))
    twin.is_view = True
    return twin


def _write_out(graph_module: fx.GraphModule, node: fx.Node) -> None:
    # torch's builtins have no signature to read: these are the documented ones
    transposed = node.target in CONV_TRANSPOSE_FUNCTIONS
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    defaults: dict[str, Any] = {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "output_padding": 0,
    }
    if transposed:
        names = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    family = CONV_TRANSPOSE_FUNCTIONS if transposed else CONV_FUNCTIONS
    dims = family.index(node.target) + 1
    values = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    for name in ("stride", "dilation", "output_padding", "padding"):
        if isinstance(values[name], int):
            values[name] = (values[name],) * dims
    if isinstance(values["padding"], str):
        weight = values["weight"]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return
        kernel = tuple(operator.attrgetter(str(weight.target))(graph_module).shape[2:])
        padding = _same_padding(values["padding"], kernel, values["dilation"])
        if padding is None:
            totals = [d * (k - 1) for k, d in zip(kernel, values["dilation"], strict=True)]
            sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
            with graph_module.graph.inserting_before(node):
                values["input"] = graph_module.graph.call_function(F.pad, (values["input"], sides))
            padding = (0,) * dims
        values["padding"] = padding
    weight = values["weight"]
    if any(d != 1 for d in values["dilation"]) and isinstance(weight, fx.Node) and is_constant(graph_module, weight):
        with torch.no_grad():
            kernel = tuple(value_of(graph_module, weight).shape[2:])
        extra = values["output_padding"] if transposed else None
        values["dilation"] = plain_dilation(kernel, values["dilation"], values["stride"], extra)
    node.args = tuple(values[name] for name in names)
    node.kwargs = {}


def _same_padding(word: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...] | None:
    """The padding that "same" or "valid" means, or None where it is not the same on both sides."""
    if word == "valid":
        return (0,) * len(kernel)
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


def add_scalar(x: Any, y: Any) -> Any:
    """``x + y``, of which one is a number."""
    return x + y


def mul_scalar(x: Any, y: Any) -> Any:
    """``x * y``, of which one is a number."""
    return x * y


_SCALAR_OPS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), add_scalar),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), mul_scalar),
}


def _keep_scalars_apart(graph: fx.Graph) -> None:
    """Compute ``x + 5`` and ``x * 10`` in float: torch.ao gives their output the range of their input."""
    for node in graph.nodes:
        plain = node.op in ("call_function", "call_method") and len(node.args) == 2 and not node.kwargs
        if plain and node.target in _SCALAR_OPS and any(isinstance(x, (int, float)) for x in node.args):
            node.op, node.target = "call_function", _SCALAR_OPS[node.target]


def _separate_calls(graph_module: fx.GraphModule, kept: Collection[str]) -> dict[str, str]:
    """Give every call of a reused module a module of its own, with the same weights, so that each gets its ranges."""
    origins: dict[str, str] = {}
    seen: set[str] = set()
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module" or node.target in kept:
            continue
        original = modules[node.target]
        if type(original) in EMBEDDINGS:  # a table has no ranges, and is stored once
            continue
        if first.setdefault(id(original), node.target) == node.target and node.target not in seen:
            seen.add(node.target)
            continue
        twin = _view(original)
        number = sum(1 for origin in origins.values() if origin == first[id(original)]) + 1
        name = f"{first[id(original)]}_call{number}"
        graph_module.add_submodule(name, twin)
        origins[name] = first[id(original)]
        node.target = name
    return origins


def _hide_batch_norms(graph_module: fx.GraphModule, training: bool) -> dict[str, str]:
    """Keep torch.ao from folding batch norms that it folds wrongly or cannot fold."""
    origins: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(node.target)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            no_statistics = module.running_mean is None
            no_scale = training and module.weight is None  # torch's trainable ConvBn divides by it
            if no_statistics or no_scale:
                graph_module.add_submodule(node.target, Opaque(module))
                origins[f"{node.target}.module"] = node.target
    return origins

"""torch.fx tracing that does not ask the user to prepare the model for it.

:func:`trace` gives a graph whose leaves are the modules of ``torch.nn``, with what FX graph mode stumbles
over set right:
arguments that the call did not give are their defaults, functions that obey ``self.training`` go on obeying it, and
convolutions without a bias say so.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant._torch_ao import QuantizationTracer
from lightning_quant.arguments import Call, Interface, signature_of
from lightning_quant.errors import CaptureError
from lightning_quant.qconfig import CONV_FUNCTIONS, CONV_TRANSPOSE_FUNCTIONS, CONV_TRANSPOSES, CONVS


@dataclass(frozen=True)
class Traced:
    """A graph, the scope of each of its nodes, and how a call of the module becomes a call of the graph.

    Attributes:
        graph_module: Its placeholders are the inputs of ``interface``, in that order.
        scopes: Node name -> (qualified name, type) of the module in which it was traced.
        interface: Which arguments of ``forward`` are inputs of the graph, and the values of the others.
        replaced: Names of the modules, parameters and buffers of the traced module that the graph uses.
        origins: For modules of the graph that stand for another one of the traced module: that one's name.
    """

    graph_module: fx.GraphModule
    scopes: dict[str, tuple[str, type]]
    interface: Interface
    replaced: tuple[str, ...]
    origins: dict[str, str] = field(default_factory=dict)


class ModeDependent(nn.Module):
    """A function one of whose arguments follows ``self.training``, e.g. stochastic depth."""

    def __init__(self, function: Callable[..., Any], positions: tuple[int, ...], names: tuple[str, ...]) -> None:
        super().__init__()
        self.function = function
        self.positions = positions
        self.names = names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``function`` with the arguments at ``positions`` and ``names`` set to the module's mode."""
        values = [self.training if i in self.positions else value for i, value in enumerate(args)]
        return self.function(*values, **{**kwargs, **dict.fromkeys(self.names, self.training)})

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


class Opaque(nn.Module):
    """A module that stays as it is: no pattern of torch.ao matches its type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self.module(*args, **kwargs)


class _Tracer(QuantizationTracer):
    """Placeholders for the data of one recorded call, and constants for everything else."""

    def __init__(self, interface: Interface, leaves: tuple[str, ...] = ()) -> None:
        super().__init__(list(leaves), [])
        self.interface = interface

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (ModeDependent, Opaque)) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        proxies = tuple(self.create_proxy("placeholder", name, (), {}) for name in self.interface.inputs)
        args, kwargs = self.interface.rebuild(proxies)

        def call_root(root: nn.Module) -> Any:
            return root_fn(root, *args, **kwargs)

        return call_root, [self.root]


def _trace_once(root: nn.Module, call: Call, leaves: tuple[str, ...] = ()) -> Traced:
    interface = Interface.of(signature_of(root), call)
    if not interface.inputs:
        raise CaptureError("it is called without a tensor")
    tracer = _Tracer(interface, leaves)
    if tracer.is_leaf_module(root, ""):
        return _single_layer(root, interface)
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise CaptureError(f"cannot be traced as one graph: {_where(error)}{type(error).__name__}: {error}") from error
    replaced = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    module = fx.GraphModule(root, graph, type(root).__name__)
    return Traced(module, tracer.node_name_to_scope, interface, tuple(sorted(replaced)))


#: The name of the only module in the graph of a target that is a layer of torch.nn itself.
LAYER = "layer"


def _single_layer(root: nn.Module, interface: Interface) -> Traced:
    graph = fx.Graph()
    data = tuple(graph.placeholder(name) for name in interface.inputs)
    args, kwargs = interface.rebuild(data)
    node = graph.call_module(LAYER, args, kwargs)
    graph.output(node)
    replaced = (*root._parameters, *root._buffers, *root._modules)
    module = fx.GraphModule({LAYER: root}, graph, type(root).__name__)
    return Traced(module, {n.name: (LAYER, type(root)) for n in graph.nodes}, interface, replaced, {LAYER: ""})


def _where(error: BaseException) -> str:
    """``"file.py:12 "``: the last line of the user's code in the traceback."""
    found = ""
    step = error.__traceback__
    while step is not None:
        filename = step.tb_frame.f_code.co_filename
        if "/torch/" not in filename and "lightning_quant" not in filename and not filename.startswith("<"):
            found = f"{filename}:{step.tb_lineno}: "
        step = step.tb_next
    return found


def trace(root: nn.Module, call: Call, *, training: bool = False) -> Traced:
    """The graph of ``root.forward`` for calls like ``call``.

    Args:
        root: Its modules become those of the graph, at the same names. In ``training``, its mode is changed and put
            back.
        call: Tensors in it become placeholders, other values constants.
        training: The graph is to be trained: it obeys ``train()`` and ``eval()`` as ``root`` did. Else it is the graph
            of eval mode.

    Raises:
        CaptureError: ``forward`` cannot be traced, or does other things in training than in evaluation.
    """
    modes = {module: module.training for module in root.modules()}
    try:
        root.eval()
        own = set(root.__dict__)
        traced = _trace_once(root, call)
        for name in set(root.__dict__) - own:  # constants, which the second trace would give other names
            del root.__dict__[name]
        if training:
            root.train()
            in_training = _trace_once(root, call)
            _follow_mode(in_training, traced)
            traced = in_training
    finally:
        for module, mode in modes.items():
            module.training = mode
    origins = traced.origins | _separate_calls(traced.graph_module) | _hide_batch_norms(traced.graph_module, training)
    _write_out_convolutions(traced.graph_module)
    _keep_scalars_apart(traced.graph_module.graph)
    traced.graph_module.recompile()
    return replace(traced, origins=origins)


def trace_around(root: nn.Module, call: Call, leaves: tuple[str, ...]) -> Traced:
    """The graph of ``root.forward`` in eval mode in which the submodules named ``leaves`` are called as they are.

    Raises:
        CaptureError: ``forward`` cannot be traced, or does not call one of them.
    """
    traced = _trace_once(root.eval(), call, leaves)
    missing = set(leaves) - set(traced.replaced)
    if missing:
        raise CaptureError(f"forward does not call {', '.join(sorted(missing))}")
    return traced


def _follow_mode(train: Traced, evaluation: Traced) -> None:
    """Replace calls whose boolean arguments differ between the two graphs by modules that follow the mode."""
    pairs = list(zip(train.graph_module.graph.nodes, evaluation.graph_module.graph.nodes, strict=False))
    same_length = len(train.graph_module.graph.nodes) == len(evaluation.graph_module.graph.nodes)
    if not same_length or any(a.op != b.op or a.target != b.target for a, b in pairs):
        raise CaptureError(
            "forward computes other things in training than in evaluation (a branch on self.training, such as an "
            "auxiliary output)"
        )
    for number, (node, twin) in enumerate(pairs):
        positions = tuple(
            i for i, (a, b) in enumerate(zip(node.args, twin.args, strict=True)) if (a, b) == (True, False)
        )
        names = tuple(k for k, a in node.kwargs.items() if (a, twin.kwargs[k]) == (True, False))
        if node.op != "call_function" or not (positions or names):
            continue
        module: nn.Module = ModeDependent(node.target, positions, names)
        args, kwargs = node.args, node.kwargs
        if node.target is F.dropout:
            bound = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
            bound.apply_defaults()
            module = nn.Dropout(bound.arguments["p"])
            args, kwargs = (bound.arguments["input"],), {}
        name = f"mode_dependent_{number}"
        train.graph_module.add_submodule(name, module)
        node.op, node.target, node.args, node.kwargs = "call_module", name, args, kwargs


def _write_out_convolutions(graph_module: fx.GraphModule) -> None:
    """Give convolutions the form that torch.ao lowers: all arguments by position, sizes as tuples, no words."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(node.target)
            if type(module) in CONVS:
                _pad_apart(graph_module, node, module)
            elif type(module) in CONV_TRANSPOSES:
                _size_apart(graph_module, node, module)
        elif node.op == "call_function" and node.target is F.linear:
            if len(node.args) < 3 and "bias" not in node.kwargs:
                node.kwargs = {**node.kwargs, "bias": None}
        elif node.op == "call_function" and node.target in (*CONV_FUNCTIONS, *CONV_TRANSPOSE_FUNCTIONS):
            _write_out(graph_module, node)


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
    for registry in ("_parameters", "_buffers", "_modules"):
        setattr(twin, registry, dict(getattr(module, registry)))
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


def _separate_calls(graph_module: fx.GraphModule) -> dict[str, str]:
    """Give every call of a reused module a module of its own, with the same weights, so that each gets its ranges."""
    origins: dict[str, str] = {}
    seen: set[str] = set()
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        original = modules[node.target]
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

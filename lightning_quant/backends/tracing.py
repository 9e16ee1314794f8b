"""torch.fx tracing that does not ask the user to prepare the model for it.

:func:`trace` gives a graph whose leaves are the modules of ``torch.nn``, with what FX graph mode stumbles
over set right:
arguments that the call did not give are their defaults, functions that obey ``self.training`` go on obeying it, and
convolutions without a bias say so.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten

from lightning_quant._torch_ao import QuantizationTracer
from lightning_quant.arguments import Call, Interface, signature_of
from lightning_quant.backends.written_out import expose_batch_norms, is_written_out, written_out
from lightning_quant.errors import CaptureError, where
from lightning_quant.qconfig import CONV_FUNCTIONS, CONV_TRANSPOSE_FUNCTIONS, CONV_TRANSPOSES, CONVS
from lightning_quant.structures import Shape, is_setting, plain, shape_of


@dataclass(frozen=True)
class Traced:
    """A graph, the scope of each of its nodes, and how a call of the module becomes a call of the graph.

    Attributes:
        graph_module: Its placeholders are the inputs of ``interface``, in that order.
        scopes: Node name -> (qualified name, type) of the module in which it was traced.
        interface: Which arguments of ``forward`` are inputs of the graph, and the values of the others.
        replaced: Names of the modules, parameters and buffers of the traced module that the graph uses.
        origins: For modules of the graph that stand for another one of the traced module: that one's name.
        kept: Submodules that the graph calls as they are, because they could not be traced -> why.
        float_layers: Layers with weights that stay float for a reason of their own -> that reason.
    """

    graph_module: fx.GraphModule
    scopes: dict[str, tuple[str, type]]
    interface: Interface
    replaced: tuple[str, ...]
    origins: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)


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


class _Untraceable(CaptureError):
    """The forward of the traced module itself stops the trace."""


class _Tracer(QuantizationTracer):
    """Placeholders for the data of one recorded call, and constants for everything else.

    A submodule whose own code stops the trace, or which changes itself while it runs, becomes one node that calls it.

    Attributes:
        kept: Name of each such submodule -> why.
    """

    def __init__(self, interface: Interface, kept: dict[str, str]) -> None:
        super().__init__([], [])
        self.interface = interface
        self.kept = dict(kept)
        self.returns: Shape | None = None
        self.param_shapes_constant = True
        self.record_stack_traces = False
        self._proxies: dict[str, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.kept or isinstance(m, (ModeDependent, Opaque)):
            return True
        if is_written_out(m) or parametrize.is_parametrized(m):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        proxies = tuple(self.create_proxy("placeholder", name, (), {}) for name in self.interface.inputs)
        args, kwargs = self.interface.rebuild(proxies)

        def call_root(root: nn.Module) -> Any:
            before = _state_of(root)
            written = written_out(root)
            output = written(root, *args, **kwargs) if written else root_fn(root, *args, **kwargs)
            if changed := _put_back(root, before):
                raise _Untraceable(_carries(changed))
            self.returns = shape_of(output)
            return plain(output)

        return call_root, [self.root]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        if isinstance(m, torch.jit.ScriptModule):
            self.kept[name] = "it is scripted already"
            return super().call_module(m, forward, args, kwargs)
        written = written_out(m)
        known, depth = set(self.graph.nodes), len(self.module_stack)
        before = _state_of(m)
        try:
            output = super().call_module(m, MethodType(written, m) if written else forward, args, kwargs)
            changed = _put_back(m, before)
            reason = _carries(changed) if changed else ""
        except Exception as error:  # whatever the user's code raises when it is given a proxy
            _put_back(m, before)
            reason = f"{where(error)}{type(error).__name__}: {_first_line(error)}"
            output = None
        if not reason:
            return output
        self._forget(known, depth)
        self.kept[name] = reason
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self._proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _forget(self, known: set[fx.Node], depth: int) -> None:
        """Undo what was traced since the graph had the nodes ``known`` alone."""
        for node in reversed(list(self.graph.nodes)):
            if node not in known:
                self.graph.erase_node(node)
        for name in [name for name, proxy in self._proxies.items() if proxy.node not in known]:
            del self._proxies[name]
        while len(self.module_stack) > depth:
            self.module_stack.popitem(last=True)


_State = tuple[dict[str, Any], dict[str, Any], dict[int, tuple[Any, Any]]]


def _state_of(module: nn.Module) -> _State:
    """The attributes and buffers of ``module``, and the contents of the lists and dicts among them."""
    attributes = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
    contents = {id(v): (v, copy.copy(v)) for v in attributes.values() if type(v) in (list, dict)}
    return attributes, dict(module._buffers), contents


def _put_back(module: nn.Module, state: _State) -> list[str]:
    """The names of what ``module`` changed of itself since, which is put back."""
    attributes, buffers, contents = state
    now = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
    changed = [k for k in now.keys() | attributes.keys() if not _unchanged(now.get(k), attributes.get(k))]
    changed += [k for k in module._buffers if module._buffers[k] is not buffers.get(k)]
    changed += [k for k, v in attributes.items() if id(v) in contents and not _unchanged(v, contents[id(v)][1])]
    for name in now.keys() - attributes.keys():
        del module.__dict__[name]
    module.__dict__.update(attributes)
    module._buffers.clear()
    module._buffers.update(buffers)
    for value, content in contents.values():
        if isinstance(value, list):
            value[:] = content
        else:
            value.clear()
            value.update(content)
    return sorted(set(changed))


def _unchanged(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    return is_setting(a) and is_setting(b) and type(a) is type(b) and bool(a == b)


def _carries(names: list[str]) -> str:
    return f"its forward changes self.{', self.'.join(names)}: it carries state from call to call"


@contextlib.contextmanager
def _traceable_builtins() -> Iterator[None]:
    """Let ``len``, ``max`` and ``min`` of a proxy be nodes of the graph: paddings are computed with them."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if isinstance(value, fx.Proxy):
                    return value.tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    originals = {name: getattr(builtins, name) for name in ("len", "max", "min")}
    try:
        for name, function in originals.items():
            setattr(builtins, name, wrapped(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(builtins, name, function)


def _trace_once(root: nn.Module, call: Call, kept: dict[str, str]) -> Traced:
    interface = Interface.of(signature_of(root), call)
    if not interface.inputs:
        raise CaptureError("it is called without a tensor")
    tracer = _Tracer(interface, kept)
    if tracer.is_leaf_module(root, ""):
        return _single_layer(root, interface)
    try:
        with _traceable_builtins():
            graph = tracer.trace(root)
    except _Untraceable:
        raise
    except Exception as error:
        raise _Untraceable(f"cannot be traced as one graph: {where(error)}{type(error).__name__}: {error}") from error
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    replaced = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    module = fx.GraphModule(root, graph, type(root).__name__)
    return Traced(
        module,
        tracer.node_name_to_scope,
        interface.returning(tracer.returns),
        tuple(sorted(replaced)),
        kept=tracer.kept,
    )


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def trace(root: nn.Module, call: Call, *, training: bool = False) -> Traced:
    """The graph of ``root.forward`` for calls like ``call``.

    Submodules that cannot be traced are nodes of it that call them. The graph has been run on the data of ``call``, and
    gave what ``root`` gives.

    Args:
        root: Its modules become those of the graph, at the same names. In ``training``, its mode is changed and put
            back.
        call: Tensors in it become placeholders, other values constants.
        training: The graph is to be trained: it obeys ``train()`` and ``eval()`` as ``root`` did. Else it is the graph
            of eval mode.

    Raises:
        CaptureError: The code of ``root.forward`` itself cannot be traced, or does other things in training than in
            evaluation.
    """
    modes = {module: module.training for module in root.modules()}
    with expose_batch_norms(root) as exposed:
        traced = _trace_with_modes(root, call, training, modes)
        own = {child: owner for child, owner in exposed.items() if child in traced.replaced}
    replaced = (*(name for name in traced.replaced if name not in own), *own.values())
    traced = replace(traced, replaced=replaced, origins=traced.origins | own)
    graph_module = traced.graph_module
    _write_out_functions(graph_module)
    if not training:
        fold_weights(graph_module)
    _drop_identities(graph_module)
    made = _layers_of_functions(traced)
    # a module that is kept may carry state: its calls are calls of the one module
    origins = traced.origins | made | _separate_calls(graph_module, traced.kept)
    origins |= _hide_batch_norms(graph_module, training)
    reasons = _hide_hooked(graph_module)
    _write_out_convolutions(graph_module)
    _keep_scalars_apart(graph_module.graph)
    graph_module.recompile()
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    kept = {name: reason for name, reason in traced.kept.items() if name in called}
    return replace(traced, origins=origins, kept=kept, float_layers=reasons)


def _trace_with_modes(root: nn.Module, call: Call, training: bool, modes: dict[nn.Module, bool]) -> Traced:
    try:
        traced = _trace_in_evaluation(root, call, {})
        while training:
            root.train()
            in_training = _trace_once(root, call, traced.kept)
            kept = in_training.kept | traced.kept
            if kept == traced.kept:
                difference = _follow_mode(in_training, traced)
                if difference is None:
                    traced = in_training
                    break
                name, reason = difference
                if not name or name in kept:
                    raise _Untraceable(reason)
                kept[name] = reason
            traced = _trace_in_evaluation(root, call, kept)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return traced


def _trace_in_evaluation(root: nn.Module, call: Call, kept: dict[str, str]) -> Traced:
    """The graph of eval mode, which gives for ``call`` what ``root`` gives."""
    root.eval()
    while True:
        own = set(root.__dict__)
        traced = _trace_once(root, call, kept)
        failure = _failure(traced, root, call)
        for name in set(root.__dict__) - own:  # constants, which the next trace would give other names
            del root.__dict__[name]
        if failure is None:
            return traced
        name, reason = failure
        if not name or name in traced.kept:
            raise _Untraceable(reason)
        kept = {**traced.kept, name: reason}


class _Runner(fx.Interpreter):
    """Runs a graph and remembers at which node it is."""

    node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


def _failure(traced: Traced, root: nn.Module, call: Call) -> tuple[str, str] | None:
    """At which submodule the graph cannot run, and why. The name is ``""`` where it computes something else."""
    runner = _Runner(traced.graph_module)
    runner.extra_traceback = False
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its padded positions are zero
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            seed = torch.initial_seed()
            torch.manual_seed(seed)
            twin = copy.deepcopy(call)
            before = {part: _state_of(part) for part in root.modules() if not isinstance(part, torch.jit.ScriptModule)}
            expected = plain(root(*twin.args, **twin.keywords))
            for part, state in before.items():
                _put_back(part, state)
            torch.manual_seed(seed)
            data = copy.deepcopy(traced.interface.flatten(call.args, call.keywords))
            try:
                found = runner.run(*data)
            except Exception as error:  # whatever the user's code raises where a module is called with other types
                node = runner.node
                scope = traced.scopes.get(node.name, ("", None))[0] if node is not None else ""
                return scope, f"traced, it does not run: {type(error).__name__}: {_first_line(error)}"
            finally:
                for part, state in before.items():
                    _put_back(part, state)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    if _agree(expected, plain(found)):
        return None
    return "", "the graph that was traced computes something else than forward does"


def _agree(expected: Any, found: Any) -> bool:
    """Whether two outputs have one structure, and the same numbers but for rounding."""
    ours, spec = tree_flatten(expected)
    theirs, other = tree_flatten(found)
    if spec != other:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            if not isinstance(b, torch.Tensor) or a.shape != b.shape:
                return False
            finite = a.isfinite()
            if not torch.equal(finite, b.isfinite()):
                return False
            error = (a[finite] - b[finite]).double().norm()
            # a wrong graph is wrong by much; another order of sums, amplified by a deep network, by little
            if error > 1e-3 * a[finite].double().norm() + 1e-7:
                return False
    return True


def trace_around(root: nn.Module, call: Call, leaves: tuple[str, ...]) -> Traced:
    """The graph of ``root.forward`` in eval mode in which the submodules named ``leaves`` are called as they are.

    Raises:
        CaptureError: ``forward`` cannot be traced, does not call one of them, or needs more parts to be kept.
    """
    kept = dict.fromkeys(leaves, "a target")
    traced = _trace_in_evaluation(root, call, kept)
    missing = set(leaves) - set(traced.replaced)
    if missing:
        raise CaptureError(f"forward does not call {', '.join(sorted(missing))}")
    return traced


def _follow_mode(train: Traced, evaluation: Traced) -> tuple[str, str] | None:
    """Replace calls whose boolean arguments differ between the two graphs by modules that follow the mode.

    Returns:
        None, or where the graphs differ in another way: the name of the submodule, and what to say of it.
    """
    pairs = list(zip(train.graph_module.graph.nodes, evaluation.graph_module.graph.nodes, strict=False))
    same_length = len(train.graph_module.graph.nodes) == len(evaluation.graph_module.graph.nodes)
    different = next((a for a, b in pairs if a.op != b.op or a.target != b.target), None)
    if different is not None or not same_length:
        scope = train.scopes.get(different.name, ("",))[0] if different is not None else ""
        return scope, (
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
    return None


def _write_out_functions(graph_module: fx.GraphModule) -> None:
    """Give functional layers the form that torch.ao lowers: all arguments by position, sizes as tuples, no words."""
    for node in graph_module.graph.nodes:
        if node.op == "call_method" and node.target == "view" and not _is_type(node.args[1:]):
            node.target = "reshape"  # int8 kernels give channels-last tensors, of which some views are none
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


def _constant(graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a node depends on parameters and buffers alone."""
    if node not in known:
        if node.op == "get_attr":
            known[node] = True
        elif node.op in ("call_function", "call_method", "call_module"):
            known[node] = all(_constant(graph_module, n, known) for n in node.all_input_nodes) and (
                bool(node.all_input_nodes) or node.op == "call_module"
            )
        else:
            known[node] = False
    return known[node]


def is_constant(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node depends on parameters and buffers alone."""
    return _constant(graph_module, node, {})


def value_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What a node gives that depends on parameters and buffers alone."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: value_of(graph_module, n))
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(graph_module)
    if node.op == "call_module":
        return graph_module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def is_layer(node: fx.Node) -> bool:
    """Whether a node calls a function with weights."""
    return node.op == "call_function" and node.target in (F.linear, *CONV_FUNCTIONS, *CONV_TRANSPOSE_FUNCTIONS)


def fold_weights(graph_module: fx.GraphModule, is_reader: Callable[[fx.Node], bool] = is_layer) -> None:
    """Compute what functional layers compute from parameters alone (e.g. standardised weights), and store it.

    Args:
        graph_module: Changed in place.
        is_reader: The nodes whose inputs are looked at.
    """
    known: dict[fx.Node, bool] = {}
    folded = False
    for node in list(graph_module.graph.nodes):
        if not is_reader(node):
            continue
        first = 1 if is_layer(node) else 0
        for source in [x for x in (*node.args[first:], *node.kwargs.values()) if isinstance(x, fx.Node)]:
            if source.op == "get_attr" or not _constant(graph_module, source, known):
                continue
            with torch.no_grad():
                value = value_of(graph_module, source).detach().clone()
            name = f"folded_{source.name}"
            graph_module.register_buffer(name, value)
            with graph_module.graph.inserting_before(source):
                stored = graph_module.graph.get_attr(name)
            source.replace_all_uses_with(stored)
            known[stored] = folded = True
    if folded:
        _erase_unused(graph_module, known)


def _erase_unused(graph_module: fx.GraphModule, candidates: dict[fx.Node, bool]) -> None:
    for node in reversed(list(graph_module.graph.nodes)):
        if candidates.get(node) and not node.users:
            graph_module.graph.erase_node(node)


_LAYERS: dict[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    **dict(zip(CONV_FUNCTIONS, CONVS, strict=True)),
    **dict(zip(CONV_TRANSPOSE_FUNCTIONS, CONV_TRANSPOSES, strict=True)),
}


def _drop_identities(graph_module: fx.GraphModule) -> None:
    """Take modules that do nothing out of the graph: they stand between layers that could be fused."""
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module" or type(graph_module.get_submodule(str(node.target))) is not nn.Identity:
            continue
        if node.args and not graph_module.get_submodule(str(node.target))._forward_hooks:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _layers_of_functions(traced: Traced) -> dict[str, str]:
    """Make functional layers with stored weights modules with the same Parameters, which fuse and train as modules do.

    Returns:
        Name of each new module that has another name than the module whose Parameters it uses -> the latter.
    """
    graph_module = traced.graph_module
    origins: dict[str, str] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in _LAYERS:
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
        layer = _layer(_LAYERS[node.target], tensor, offset, node.args[3:])
        owner, _, attribute = str(weight.target).rpartition(".")
        if str(weight.target).startswith("folded_"):
            owner, attribute = traced.scopes.get(node.name, ("", None))[0], "weight"
        stem = attribute.removesuffix("weight").rstrip("_")
        name = ".".join(x for x in (owner, stem) if x) or "function"
        if name != owner or not _is_free(graph_module, name, {weight, bias}):
            base, number = name, 0
            while graph_module_has(graph_module, name):
                number += 1
                name = f"{base}_call{number}"
            origins[name] = owner
        graph_module.add_submodule(name, layer)
        node.op, node.target, node.args, node.kwargs = "call_module", name, (values["input"],), {}
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)
    return {name: origin for name, origin in origins.items() if origin}


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


def _layer(kind: type[nn.Module], weight: torch.Tensor, bias: torch.Tensor | None, settings: tuple[Any, ...]) -> Any:
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
            if type(module) in CONVS:
                _pad_apart(graph_module, node, module)
            elif type(module) in CONV_TRANSPOSES:
                _size_apart(graph_module, node, module)
            elif isinstance(module, nn.LeakyReLU) and module.inplace:  # the int8 kernel warns that it cannot
                view = _view(module)
                view.inplace = False
                graph_module.add_submodule(str(node.target), view)


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

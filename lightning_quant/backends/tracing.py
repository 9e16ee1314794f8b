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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_quant._torch_ao import QuantizationTracer
from lightning_quant.arguments import Call, Interface, signature_of
from lightning_quant.backends.recurrent import expose_recurrent
from lightning_quant.backends.rewriting import Opaque, rewrite
from lightning_quant.backends.state import carries, put_back, state_of, tensors_of, writers
from lightning_quant.backends.written_out import expose_batch_norms, is_written_out, written_out
from lightning_quant.errors import CaptureError, first_line, where
from lightning_quant.modes import without_fast_path
from lightning_quant.scripted import is_scripted
from lightning_quant.structures import Shape, agree, plain, shape_of


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
        swapped: Modules of a user's own -> the class that takes their place in the int8 model.
        loose: A submodule that it calls as it is gave a part of the output, which is None or a container that no file
            can hold: only a run can tell.
    """

    graph_module: fx.GraphModule
    scopes: dict[str, tuple[str, type]]
    interface: Interface
    replaced: tuple[str, ...]
    origins: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    swapped: dict[str, str] = field(default_factory=dict)
    loose: bool = False


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
            before = state_of(root)
            written = written_out(root)
            output = written(root, *args, **kwargs) if written else root_fn(root, *args, **kwargs)
            if changed := put_back(root, before):
                raise _Untraceable(carries(changed))
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
        before = state_of(m)
        try:
            output = super().call_module(m, MethodType(written, m) if written else forward, args, kwargs)
            changed = put_back(m, before)
            reason = carries(changed) if changed else ""
        except Exception as error:  # whatever the user's code raises when it is given a proxy
            put_back(m, before)
            reason = f"{where(error)}{type(error).__name__}: {first_line(error)}"
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


def trace(root: nn.Module, call: Call, *, training: bool = False, whole: Mapping[str, str] = {}) -> Traced:
    """The graph of ``root.forward`` for calls like ``call``.

    Submodules that cannot be traced are nodes of it that call them. The graph has been run on the data of ``call``, and
    gave what ``root`` gives.

    Args:
        root: Its modules become those of the graph, at the same names. In ``training``, its mode is changed and put
            back.
        call: Tensors in it become placeholders, other values constants.
        training: The graph is to be trained: it obeys ``train()`` and ``eval()`` as ``root`` did. Else it is the graph
            of eval mode.
        whole: Submodules that are called as they are -> why; ``""`` is ``root``, whose name in the graph is ``layer``.

    Raises:
        CaptureError: The code of ``root.forward`` itself cannot be traced, or does other things in training than in
            evaluation.
    """
    if is_scripted(root):
        raise CaptureError("it is scripted already: backend='torchscript' quantizes it as it is")
    modes = {module: module.training for module in root.modules()}
    with expose_batch_norms(root) as norms, expose_recurrent(root) as recurrent:
        traced = _trace_with_modes(root, call, training, modes, dict(whole))
        own = {child: owner for child, owner in (norms | recurrent).items() if child in traced.replaced}
    # of the traced module itself it is the Parameters that the graph stands for
    owners = [part for owner in own.values() for part in ([owner] if owner else root._parameters)]
    replaced = (*(name for name in traced.replaced if name not in own), *owners)
    traced = replace(traced, replaced=replaced, origins=traced.origins | own)
    graph_module = traced.graph_module
    rewritten = rewrite(graph_module, traced.scopes, traced.kept, training=training)
    _return_plain(traced)
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    kept = {name: reason for name, reason in traced.kept.items() if name in called}
    return replace(traced, origins=traced.origins | rewritten.origins, kept=kept, float_layers=rewritten.float_layers)


def _trace_with_modes(
    root: nn.Module, call: Call, training: bool, modes: dict[nn.Module, bool], whole: dict[str, str]
) -> Traced:
    try:
        traced = _trace_in_evaluation(root, call, whole)
        while training:
            root.train()
            in_training = _trace_once(root, call, traced.kept)
            kept = in_training.kept | traced.kept
            if kept == traced.kept:
                difference = _follow_mode(in_training, traced)
                if difference is None:
                    traced = replace(in_training, interface=traced.interface, loose=traced.loose)
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
    try:
        expected, written = _answer(root, call)
    except Exception:  # whatever the user's code raises; what a trace says of it is more to the point
        _trace_once(root, call, kept)
        raise
    if written:
        # before the trace, which would write into them
        kept = kept | _writers_to_keep(root, call, kept)
    while True:
        own = set(root.__dict__)
        traced = _trace_once(root, call, kept)
        checked = _checked(traced, root, call, expected)
        for name in set(root.__dict__) - own:  # constants, which the next trace would give other names
            del root.__dict__[name]
        if isinstance(checked, Traced):
            return checked
        name, reason = checked
        if not name or name in traced.kept:
            raise _Untraceable(reason)
        kept = {**traced.kept, name: reason}


class _Runner(fx.Interpreter):
    """Runs a graph and remembers at which node it is."""

    node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


def _answer(root: nn.Module, call: Call) -> tuple[Any, list[str]]:
    """What ``root`` gives for ``call``, and which of its tensors it writes. It is left as it is."""
    parts = [part for part in root.modules() if not isinstance(part, torch.jit.ScriptModule)]
    with without_fast_path(), torch.no_grad(), torch.random.fork_rng(devices=[]):  # its padded positions are zero
        torch.manual_seed(torch.initial_seed())
        twin = copy.deepcopy(call)
        before = {part: state_of(part) for part in parts}
        tensors = tensors_of(root)
        try:
            expected = root(*twin.args, **twin.keywords)
        finally:
            written = [*tensors.written(), *tensors.written_attributes()]
            for part, state in before.items():
                put_back(part, state)
            tensors.put_back()
    return expected, written


def _writers_to_keep(root: nn.Module, call: Call, kept: dict[str, str]) -> dict[str, str]:
    """The outermost submodules that write such tensors, and are not in ``kept`` -> what to say of them.

    Raises:
        CaptureError: The forward of ``root`` itself writes one.
    """
    with without_fast_path():
        found = writers(root, call)
    own = [name for name in found if not any(f"{name}.".startswith(f"{other}.") for other in kept)]
    if "" in found and "" not in kept:
        raise _Untraceable(carries(found[""]))
    outer = [name for name in own if not any(name.startswith(f"{other}.") for other in own)]
    return {name: carries([buffer.removeprefix(f"{name}.") for buffer in found[name]]) for name in outer}


def _checked(traced: Traced, root: nn.Module, call: Call, expected: Any) -> Traced | tuple[str, str]:
    """``traced``, which knows what ``root`` returns; or at which submodule the graph cannot run, and why.

    The name is ``""`` where the graph computes something else than ``expected``.
    """
    runner = _Runner(traced.graph_module)
    runner.extra_traceback = False
    with without_fast_path(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        before = {part: state_of(part) for part in root.modules() if not isinstance(part, torch.jit.ScriptModule)}
        tensors = tensors_of(root)
        data = copy.deepcopy(traced.interface.flatten(call.args, call.keywords))
        try:
            found = runner.run(*data)
        except Exception as error:  # whatever the user's code raises where a module is called with other types
            node = runner.node
            scope = traced.scopes.get(node.name, ("", None))[0] if node is not None else ""
            return scope, f"traced, it does not run: {type(error).__name__}: {first_line(error)}"
        finally:
            for part, state in before.items():
                put_back(part, state)
            tensors.put_back()
    if agree(plain(expected), plain(found)):
        loose = shape_of(found) is not None
        return replace(traced, interface=traced.interface.returning(shape_of(expected)), loose=loose)
    return "", "the graph that was traced computes something else than forward does"


def _return_plain(traced: Traced) -> None:
    """Let the graph return what a file can hold, where that has to be seen to at every call."""
    if not traced.loose:
        return
    graph = traced.graph_module.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_function(plain, (output.args[0],)),)
    traced.graph_module.recompile()


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
    _return_plain(traced)
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

"""``torch.export`` of one target: a flat graph of aten operators without what would bind it to its example.

Parameters and buffers have the names that they have in the target, and are the same objects. In a graph that is to be
trained, whatever has a mode (batch norm, dropout) is a module again, at the name that it has in the target, so that
``train()``, ``eval()`` and everything that looks for batch norms work as they do on any module.
"""

from __future__ import annotations

import copy
import logging
import operator
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_quant.arguments import Call, Interface, batch_size, signature_of, with_batch
from lightning_quant.backends.graph import place_of
from lightning_quant.backends.state import carries, put_back, state_of, tensors_of
from lightning_quant.errors import CaptureError, first_line, where
from lightning_quant.modes import without_fast_path
from lightning_quant.structures import agree, plain, shape_of

_ATEN = torch.ops.aten
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Exported:
    """A graph, and how a call of the module becomes a call of the graph.

    Attributes:
        graph_module: Its placeholders are the inputs of ``interface``, in that order.
        interface: Which arguments of ``forward`` are inputs of the graph, and the values of the others.
        replaced: Names of the modules, parameters and buffers of the target that the graph uses.
        batch_norms: Batch norms of the graph -> those of the target of which they are views.
    """

    graph_module: fx.GraphModule
    interface: Interface
    replaced: tuple[str, ...]
    batch_norms: dict[str, str]


class _Root(nn.Module):
    """The target as a function of its data by position, in code that ``torch.export`` can follow."""

    def __init__(self, target: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.target = target
        slots = tuple(_Slot(i) for i in range(len(interface.inputs)))
        self.call = interface.rebuild(slots)

    def forward(self, *data: Any) -> Any:
        args, kwargs = _filled(self.call, data)
        return plain(self.target(*args, **kwargs))


@dataclass(frozen=True)
class _Slot:
    number: int


def _filled(value: Any, data: tuple[Any, ...]) -> Any:
    if isinstance(value, _Slot):
        return data[value.number]
    if type(value) in (tuple, list):
        return type(value)([_filled(part, data) for part in value])
    if type(value) is dict:
        return {key: _filled(part, data) for key, part in value.items()}
    return value


def export(target: nn.Module, example: Call, *, training: bool) -> Exported:
    """The graph of ``target.forward`` for calls like ``example``, with a free batch dimension.

    Args:
        target: Its Parameters and buffers become those of the graph.
        example: One call.
        training: The graph is to be trained: it obeys ``train()`` and ``eval()``. Else it is the graph of eval mode.

    Raises:
        CaptureError: ``torch.export`` cannot follow ``forward``; it decides by the values of its data, carries state
            from call to call, or does other things in training than in evaluation.
    """
    interface = Interface.of(signature_of(target), example)
    if not interface.inputs:
        raise CaptureError("it is called without a tensor")
    data = interface.flatten(example.args, example.keywords)
    if not all(isinstance(x, torch.Tensor) for x in data):
        raise CaptureError("it takes data that is no tensor, which torch.export cannot follow")
    shapes = _shapes(data)
    data = copy.deepcopy(with_batch(data, 2))  # enough rows that the batch is not taken for a constant
    modes = {module: module.training for module in target.modules()}
    try:
        target.eval()
        interface, expected = _evaluated(target, interface, data)
        if training:
            _evaluated(copy.deepcopy(target).train(), interface, data)
        program = _export(_Root(target, interface), data, shapes)
        if training:
            target.train()
            with _plain_momentum(target):
                in_training = _export(_Root(target, interface), data, shapes)
            _compare(program, in_training)
            program = in_training
    finally:
        for module, mode in modes.items():
            module.training = mode
    graph_module = _plain_graph(program)
    batch_norms = _modules_with_modes(graph_module, target) if training else {}
    _functionalize(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module = fx.GraphModule(graph_module, graph_module.graph, type(target).__name__)  # what is used, and no more
    replaced = _replaced(graph_module, target)
    _check(graph_module, data, expected)
    graph_module.train(training)
    return Exported(graph_module, interface, replaced, batch_norms)


def _shapes(data: tuple[Any, ...]) -> tuple[Any, ...]:
    rows = batch_size(data)
    batch = torch.export.Dim("batch", min=1)
    return tuple({0: batch} if x.dim() and x.shape[0] == rows else None for x in data)


def _evaluated(target: nn.Module, interface: Interface, data: tuple[Any, ...]) -> tuple[Interface, Any]:
    """What ``target`` returns; CaptureError if it changes itself, which a graph would do once for all, or never."""
    args, kwargs = interface.rebuild(copy.deepcopy(data))
    before = {part: state_of(part) for part in target.modules()}
    batch_norms = tuple(f"{name}." for name, part in target.named_modules() if isinstance(part, _BATCH_NORM))
    tensors = tensors_of(target)
    try:
        with without_fast_path(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = target(*args, **kwargs)
    finally:
        written = [name for name in tensors.written() if not name.startswith(batch_norms)]
        written += tensors.written_attributes()
        changed = [k for part, state in before.items() for k in put_back(part, state) if k not in part._buffers]
        tensors.put_back()
    if written or changed:
        raise CaptureError(carries(sorted({*written, *changed})))
    return interface.returning(shape_of(output)), plain(output)


@contextmanager
def _plain_momentum(target: nn.Module) -> Iterator[None]:
    """A cumulative average (``momentum=None``) computes with the count of batches, which would be data of a graph.

    It matters in training alone, where the module itself is called.
    """
    cumulative: list[Any] = [m for m in target.modules() if isinstance(m, _BATCH_NORM) and m.momentum is None]
    for module in cumulative:
        module.momentum = 0.1
    try:
        yield
    finally:
        for module in cumulative:
            module.momentum = None


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what torch.export logs about code that it cannot follow to itself: it becomes an error or a reason."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Forget the graph that a strict export leaves among the globals of torch's own code, with the target's weights."""

    def compiled() -> set[str]:
        module = sys.modules.get("torch._dynamo.functional_export")
        return {name for name in vars(module) if name.startswith("__compiled_fn")} if module else set()

    before = compiled()
    try:
        yield
    finally:
        for name in compiled() - before:
            delattr(sys.modules["torch._dynamo.functional_export"], name)


def _export(root: nn.Module, data: tuple[Any, ...], shapes: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        # not strict, attributes that forward changes would be constants of the graph without a word
        with without_fast_path(), _silent(), _nothing_compiled(), torch.random.fork_rng(devices=[]):
            return torch.export.export(root, data, dynamic_shapes=(shapes,), strict=True)
    except Exception as error:  # torch.export's own errors, and those of the code that it runs
        raise CaptureError(
            f"cannot be exported as one graph: {_line(error)}{type(error).__name__}: {first_line(error)}"
        ) from error


def _line(error: BaseException) -> str:
    """``"file.py:12: "``: the line of the user's code that torch.export was following."""
    found = where(error)
    stack: traceback.StackSummary | None = getattr(error, "real_stack", None)
    for frame in stack or ():
        if "/torch/" not in frame.filename and "/lightning_quant/" not in frame.filename:
            found = f"{frame.filename}:{frame.lineno}: "
    return found


def _plain_graph(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """A graph that takes tensors by position and gives containers, with the target's own names."""
    module: Any = program.module(check_guards=False)
    graph = module.graph
    prefix = "target."
    holder = nn.Module()
    inner = module._modules.get("target")
    if inner is not None:
        for kind in ("_parameters", "_buffers", "_modules"):
            getattr(holder, kind).update(getattr(inner, kind))
        holder._non_persistent_buffers_set |= inner._non_persistent_buffers_set
    for node in list(graph.nodes):
        if node.op in ("get_attr", "call_module"):
            if node.target.startswith(prefix):
                node.target = node.target.removeprefix(prefix)
            else:  # a constant that forward made
                value = operator.attrgetter(node.target)(module)
                name = f"constant_{node.target.replace('.', '_')}"
                if isinstance(value, torch.Tensor):
                    holder.register_buffer(name, value, persistent=False)
                else:
                    setattr(holder, name, value)
                node.target = name
        elif node.op == "output":
            leaves = list(tree_flatten(node.args)[0])
            node.args = (tree_unflatten(leaves, program.call_spec.out_spec),)
    _drop_assertions(module)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = {
            key: ("" if path == "target" else path.removeprefix(prefix), kind) for key, (path, kind) in stack.items()
        }
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(holder, graph)


def _drop_assertions(module: fx.GraphModule) -> None:
    """Of the example's device, sizes and dtypes, which autocast changes; also in its own regions of the graph."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in list(part.graph.nodes):
                if node.op == "call_function" and "_assert" in str(node.target):
                    part.graph.erase_node(node)
            part.recompile()


#: Operators with a mode: the position of the argument that says it, and what it is in evaluation.
_MODES: dict[Any, tuple[int, Any]] = {
    _ATEN.batch_norm.default: (5, False),
    _ATEN.instance_norm.default: (5, False),
    _ATEN.dropout.default: (2, False),
    _ATEN.dropout_.default: (2, False),
    _ATEN.feature_dropout.default: (2, False),
    _ATEN.feature_dropout_.default: (2, False),
    _ATEN.alpha_dropout.default: (2, False),
    _ATEN.alpha_dropout_.default: (2, False),
    _ATEN.feature_alpha_dropout.default: (2, False),
    _ATEN.feature_alpha_dropout_.default: (2, False),
    _ATEN.rrelu.default: (3, False),
    _ATEN.scaled_dot_product_attention.default: (4, 0.0),
    _ATEN.lstm.input: (6, False),
    _ATEN.gru.input: (6, False),
    _ATEN.rnn_tanh.input: (6, False),
    _ATEN.rnn_relu.input: (6, False),
}


def _compare(evaluation: torch.export.ExportedProgram, training: torch.export.ExportedProgram) -> None:
    """Refuse what does other things in training than :data:`_MODES` say.

    A comparison of numbers alone would not see it where a network with random weights gives one output for all inputs.
    """
    pairs = list(zip(_steps(evaluation), _steps(training), strict=False))
    different = next((node for (a, _), (b, node) in pairs if a != b), None)
    if different is None and len(_steps(evaluation)) == len(_steps(training)):
        return
    name = place_of(different).removeprefix("target").removeprefix(".") if different is not None else ""
    place = f" (first in {name!r})" if name else ""
    raise CaptureError(
        f"forward computes other things in training than in evaluation{place}: a branch on self.training, such as an "
        "auxiliary output or stochastic depth"
    )


def _steps(program: torch.export.ExportedProgram) -> list[tuple[Any, fx.Node]]:
    """The operators of a program with their settings, without those that say the mode and without counts of batches."""
    steps = []
    for node in program.graph.nodes:
        if node.op != "call_function" or "_assert" in str(node.target):
            continue
        source = node.args[0] if node.args else None
        if node.target is _ATEN.add_.Tensor and "num_batches_tracked" in str(source):
            continue
        settings: list[Any] = list(node.args)
        if isinstance(node.target, torch._ops.OpOverload):
            known = node.target._schema.arguments[len(settings) :]
            settings += [node.kwargs.get(argument.name, argument.default_value) for argument in known]
        if node.target in _MODES:
            settings[_MODES[node.target][0]] = None
        if node.target is _ATEN.batch_norm.default:
            settings[6] = None  # the momentum, which may have been another one while it was exported
        steps.append(((str(node.target), [repr(x) for x in settings if not _has_node(x)]), node))
    return steps


def _has_node(value: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in tree_flatten(value)[0])


class WithMode(nn.Module):
    """An operator with one argument that follows the mode: it has ``evaluation`` as its value in eval mode."""

    def __init__(self, function: Any, position: int, evaluation: Any) -> None:
        super().__init__()
        self.function = function
        self.position = position
        self.evaluation = evaluation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``function``."""
        if not self.training:
            args = (*args[: self.position], self.evaluation, *args[self.position + 1 :])
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """The operator's name."""
        return str(self.function)


def _modules_with_modes(graph_module: fx.GraphModule, target: nn.Module) -> dict[str, str]:
    """Let modules be called where the graph has operators of training mode. Returns ``batch_norms`` of Exported."""
    modules = dict(target.named_modules(remove_duplicate=False))
    batch_norms: dict[str, str] = {}
    for number, node in enumerate(list(graph_module.graph.nodes)):
        position, evaluation = _MODES.get(node.target, (0, None)) if node.op == "call_function" else (0, None)
        if not position or len(node.args) <= position or node.args[position] == evaluation:
            continue
        origin = _origin(node, modules)
        if isinstance(modules.get(origin), _BATCH_NORM) and node.target is _ATEN.batch_norm.default:
            module, name, args = _batch_norm(modules[origin], node), origin, node.args[:1]
            batch_norms[name] = origin
            _drop_count(node, origin)
        elif node.target is _ATEN.dropout.default:
            own = modules.get(place_of(node))
            module, name, args = nn.Dropout(node.args[1]), f"mode_dependent_{number}", node.args[:1]
            if type(own) is nn.Dropout:
                module, name = own, place_of(node)
        else:
            module, name, args = WithMode(node.target, position, evaluation), f"mode_dependent_{number}", node.args
        graph_module.set_submodule(name, module)
        node.op, node.target, node.args = "call_module", name, args
    return batch_norms


def _origin(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The module of the target that has the parameters, or else the running statistics, that an operator uses."""
    for argument in node.args[1:5]:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return str(argument.target).rpartition(".")[0]
    return place_of(node)


def _batch_norm(origin: Any, node: fx.Node) -> nn.Module:
    """The target's own batch norm; of a class that does more than normalise, one of torch with the same tensors."""
    if type(origin) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return origin
    first = node.args[0]
    assert isinstance(first, fx.Node)
    rank = first.meta["val"].dim()
    kind: Any = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, nn.BatchNorm1d)
    module = kind(origin.num_features, origin.eps, origin.momentum, origin.affine, origin.track_running_stats)
    module._parameters.update({key: origin._parameters.get(key) for key in module._parameters})
    module._buffers.update({key: origin._buffers.get(key) for key in module._buffers})
    module.is_view = True
    return module


def _drop_count(node: fx.Node, name: str) -> None:
    """The module counts its batches itself."""
    for other in list(node.graph.nodes):
        source = other.args[0] if other.args else None
        if (
            other.target is _ATEN.add_.Tensor
            and isinstance(source, fx.Node)
            and source.target == f"{name}.num_batches_tracked"
        ):
            node.graph.erase_node(other)


#: They give the memory that they are given.
_ALIASES = ("view", "slice", "select", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "detach", "alias",
            "narrow", "chunk", "split", "split_with_sizes", "unbind", "reshape", "flatten", "unflatten", "contiguous",
            "movedim", "diagonal", "to")  # fmt: skip


def _functionalize(graph_module: fx.GraphModule) -> None:
    """Give operators that write into their first argument a result of their own.

    A value that is quantized for one reader and overwritten for another would be wrong for the first.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        twin = _out_of_place(node)
        source = node.args[0] if node.args else None
        if twin is None or not isinstance(source, fx.Node) or source.op == "get_attr":
            continue
        if _is_alias(source) or any(_is_alias(user) for user in source.users):
            continue  # it may be written through another name
        node.target = twin
        later = set()
        passed = False
        for other in graph.nodes:
            if passed:
                later.add(other)
            passed = passed or other is node
        for user in list(source.users):
            if user in later:
                user.replace_input_with(source, node)
    graph_module.recompile()


def _is_alias(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        node.target is operator.getitem or getattr(node.target, "__name__", "").partition(".")[0] in _ALIASES
    )


def _out_of_place(node: fx.Node) -> Any:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, _, name = node.target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(_ATEN, name[:-1], None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _replaced(graph_module: fx.GraphModule, target: nn.Module) -> tuple[str, ...]:
    modules = dict(target.named_modules(remove_duplicate=False))
    tensors = {name for name, _ in (*target.named_parameters(remove_duplicate=False), *target.named_buffers())}
    names = set()
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in modules:
            names.add(str(node.target))
        elif node.op == "get_attr" and node.target in tensors:
            owner = str(node.target).rpartition(".")[0]
            module = modules[owner]
            whole = owner and type(module).__module__.startswith("torch.nn.") and not module._modules
            names.add(owner if whole else str(node.target))
    return tuple(sorted(names))


def _check(graph_module: fx.GraphModule, data: tuple[Any, ...], expected: Any) -> None:
    """The graph in eval mode gives what the target gives."""
    graph_module.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = graph_module(*tree_map(lambda x: x.clone(), data))
    if not agree(expected, found):
        raise CaptureError(
            "the graph that torch.export gives computes something else in eval mode than forward does: it draws "
            "random numbers, or writes into memory that it reads under another name"
        )

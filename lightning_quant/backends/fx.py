"""FX graph mode: one graph per target, observers placed by torch.ao's tables, lowered onto its int8 kernels.

``prepare`` and ``convert`` are the two functions of the backend protocol; :func:`reference` is the same graph as
``convert`` gives, but with explicit quantize and dequantize operators, from which the exporters work.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from lightning_quant import qat_modules
from lightning_quant._torch_ao import (
    BackendConfig,
    FakeQuantizeBase,
    ObserverBase,
    PrepareCustomConfig,
    attach_node_meta,
    convert_graph,
    get_native_backend_config,
    prepare_graph,
    quiet,
    swap_float_functional,
)
from lightning_quant.arguments import Call, Interface
from lightning_quant.backends import embeddings, islands, kernels
from lightning_quant.backends.constants import fold_weights, is_constant, is_layer, value_of
from lightning_quant.backends.tracing import Traced, trace
from lightning_quant.config import Method, QuantConfig, TensorSpec, resolve
from lightning_quant.errors import CalibrationError, CaptureError
from lightning_quant.fake_quantize import SharedFakeQuantize
from lightning_quant.fusion import FusedGroup, fuse
from lightning_quant.placement import uncompile
from lightning_quant.qconfig import RNNS, layer_qconfig, qconfig_mapping, weight_range

_META = "lightning_quant"
#: Where torch.ao is told to find the nodes that stay float. No module has this name.
_ALONE = "lightning_quant float"


@dataclass(frozen=True)
class Prepared:
    """What is known of a prepared or converted graph, kept in ``graph_module.meta``.

    Attributes:
        config: With engine and reduce_range resolved.
        method: dynamic, static or qat.
        interface: Which arguments of ``forward`` are inputs of the graph, and the values of the others.
        replaced: Names of the modules, parameters and buffers of the float model that the graph stands for.
        fused: What runs as one kernel.
        origins: Prepared module -> module of the float model of which it is another view.
        batch_norms: Prepared module that holds a batch norm -> that batch norm in the float model.
        kept: Submodules that the graph calls as they are -> why. Other graphs may stand inside them.
        float_layers: Layers with weights that stay float for a reason of their own -> that reason.
    """

    config: QuantConfig
    method: Method
    interface: Interface
    replaced: tuple[str, ...]
    fused: tuple[FusedGroup, ...] = ()
    origins: dict[str, str] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Feasible:
    """What :func:`check_traceable` found out.

    Attributes:
        kept: The submodules that the graph has to call as they are -> why.
        between: Operators between the layers can run in int8; else one of them has no kernel for what it is given.
    """

    kept: dict[str, str]
    between: bool = True


def info(graph_module: nn.Module) -> Prepared:
    """What :func:`prepare` noted about this graph.

    Raises:
        CaptureError: It does not come from :func:`prepare` or :func:`convert`.
    """
    found = getattr(graph_module, "meta", {}).get(_META)
    if not isinstance(found, Prepared):
        raise CaptureError(f"{type(graph_module).__name__} was not made by lightning_quant.prepare: prepare it first.")
    return found


def named(graph_module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Let messages call the module that the graph stands for ``name``."""
    known = info(graph_module)
    graph_module.meta[_META] = replace(known, interface=replace(known.interface, owner=name))
    return graph_module


def is_graph(module: nn.Module) -> bool:
    """Whether ``module`` comes from :func:`prepare` or :func:`convert`."""
    return isinstance(module, fx.GraphModule) and _META in module.meta


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Run with this kernel library: the one for which weights are packed, and which fixes the choice of kernels."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def _working(config: QuantConfig) -> Iterator[None]:
    """Torch.ao packs for the current engine, warns, and draws random numbers for weights that it then fills."""
    with quiet(), engine(config.engine), torch.random.fork_rng(devices=[]):
        yield


def check_traceable(model: nn.Module, call: Call, method: Method, skip: tuple[str, ...] = ()) -> Feasible:
    """Prepare, run, convert and run ``model`` once, to see that it can be done.

    Args:
        model: Not changed.
        call: One call of ``model.forward``.
        method: dynamic, static or qat.
        skip: Names of its submodules that stay float.

    Raises:
        CaptureError: ``model`` cannot be captured as one graph.
    """
    config = QuantConfig(activation=TensorSpec(observer="auto" if method == "qat" else "min_max"), skip=skip)
    for between in (True, False):
        try:
            prepared = prepare(model, config, method, call, between=between)
            prepared.eval()
            data = info(prepared).interface.flatten(call.args, call.keywords)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                prepared(*copy.deepcopy(data))
                converted = convert(prepared)
                with engine(info(converted).config.engine), quiet():
                    converted(*copy.deepcopy(data))
        except CaptureError:
            raise
        except Exception as error:  # torch.ao's own failures, and those of its kernels: whatever they raise
            failure = error
        else:
            return Feasible(info(prepared).kept, between)
    reason = str(failure).strip().splitlines()[0][:200] if str(failure).strip() else ""
    raise CaptureError(f"torch.ao cannot run it: {type(failure).__name__}: {reason}") from failure


def _twin(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of the structure and the buffers of ``model``; of its Parameters only if not ``share``."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share else {}
    twin = copy.deepcopy(model, memo)
    uncompile(twin)
    return twin


def prepare(
    model: nn.Module, config: QuantConfig, method: Method, example: Call, *, between: bool = True
) -> fx.GraphModule:
    """A graph of ``model`` with observers (static), fake quantizes (qat) or marks (dynamic) at its int8 tensors.

    Args:
        model: Keeps its structure, buffers and mode. For ``qat`` its Parameter objects are those of the result.
        config: ``skip`` are names of submodules of ``model``.
        method: dynamic, static or qat.
        example: One call of ``model.forward``.
        between: Let operators between the layers run in int8 where that pays.

    Raises:
        CaptureError: ``forward`` cannot be traced.
    """
    asked, config = config, resolve(config)
    training = method == "qat"
    twin = _twin(model, share=training)
    twin.train(training)
    with _working(config):
        traced = trace(twin, example, training=training)
        skipped = {*config.skip, *(name for name, origin in traced.origins.items() if origin in config.skip)}
        reasons = embeddings.place(traced.graph_module, skipped, training=training)
        traced = replace(traced, float_layers=traced.float_layers | reasons)
        narrow: frozenset[str] = frozenset()
        if method != "dynamic":
            plan = kernels.plan(traced.graph_module, config, weight_range(config)[1], config.skip)
            config = kernels.with_engine(config, plan)
            traced = replace(traced, float_layers=traced.float_layers | plan.float_layers)
            # who says reduce_range=False may quantize for another machine
            narrow = plan.narrow if asked.reduce_range is None else narrow
        with engine(config.engine):
            return _prepare_traced(traced, config, method, narrow, between)


@functools.cache
def _backend_config(method: Method) -> BackendConfig:
    """Torch's table of the patterns that its int8 kernels run. Not to be changed: it is made once."""
    stock = get_native_backend_config()
    return qat_modules.with_own_modules(stock) if method == "qat" else stock


def _prepare_traced(
    traced: Traced, config: QuantConfig, method: Method, narrow: frozenset[str], between: bool
) -> fx.GraphModule:
    training = method == "qat"
    backend_config = _backend_config(method)
    mapping = qconfig_mapping(config, method)
    for name in narrow:
        kind = type(traced.graph_module.get_submodule(name))
        mapping.set_module_name(name, layer_qconfig(replace(config, reduce_range=True), method, kind))
    for name in config.skip:
        mapping.set_module_name(name, None)
    for name, origin in traced.origins.items():
        if origin in config.skip:
            mapping.set_module_name(name, None)
    # torch.ao looks into modules that no pattern of it matches
    alone = tuple(f"{name}." for name in (*traced.kept, *traced.float_layers))
    for name, _ in traced.graph_module.named_modules():
        if f"{name}.".startswith(alone):
            mapping.set_module_name(name, None)
    swap_float_functional(traced.graph_module)
    attach_node_meta(traced.graph_module)
    graph_module, groups = fuse(traced.graph_module, backend_config, method)
    attach_node_meta(graph_module)
    scopes = dict(traced.scopes)
    for node in graph_module.graph.nodes:
        scopes.setdefault(node.name, ("", nn.Module))
    if method != "dynamic":
        out = {name for name, qconfig in mapping.module_name_qconfigs.items() if qconfig is None}
        floats = islands.float_nodes(
            graph_module, backend_config, lambda n: _is_left_out(n, scopes, out), none=not between
        )
        for node in graph_module.graph.nodes:
            scopes.setdefault(node.name, ("", nn.Module))
        for node in floats:
            # torch.ao asks for the qconfig of the place in the model: give this node a place of its own
            place = f"{_ALONE}.{node.name}"
            scopes[node.name] = (place, nn.Module)
            mapping.set_module_name(place, None)
            if node.op == "call_module" and not _is_called_elsewhere(node, floats):
                mapping.set_module_name(str(node.target), None)
    prepared = prepare_graph(
        graph_module,
        mapping,
        training,
        scopes,
        example_inputs=(),
        prepare_custom_config=PrepareCustomConfig(),
        backend_config=backend_config,
    )
    _count_sharing(prepared)
    if training:
        _observe_weights(prepared)
    parts = {part: traced.origins.get(member, member) for group in groups for part, member in _inside(prepared, group)}
    prepared.meta[_META] = Prepared(
        config=config,
        method=method,
        interface=traced.interface,
        replaced=traced.replaced,
        fused=groups,
        origins=traced.origins,
        batch_norms=parts,
        kept=traced.kept,
        float_layers=traced.float_layers,
    )
    prepared.train(training)
    return prepared


def _is_called_elsewhere(node: fx.Node, floats: list[fx.Node]) -> bool:
    return any(other.target == node.target and other not in floats for other in node.graph.nodes)


def _is_left_out(node: fx.Node, scopes: dict[str, tuple[str, type]], out: set[str]) -> bool:
    place = str(node.target) if node.op == "call_module" else scopes.get(node.name, ("",))[0]
    return any(place == name or place.startswith(name + ".") for name in out)


def _count_sharing(prepared: fx.GraphModule) -> None:
    """Tell each fake quantize how many tensors share it."""
    calls = [prepared.get_submodule(str(node.target)) for node in prepared.graph.nodes if node.op == "call_module"]
    counts = Counter(id(module) for module in calls)
    for module in calls:
        if isinstance(module, SharedFakeQuantize):
            module.calls_per_forward = counts[id(module)]


def _observe_weights(prepared: fx.GraphModule) -> None:
    """Give the buffers of per-channel ranges their shapes, so that copies of the model always fit each other."""
    with torch.no_grad():
        for module in prepared.modules():
            fake_quantize = getattr(module, "weight_fake_quant", None)
            if isinstance(fake_quantize, FakeQuantizeBase):
                fake_quantize(module.weight)
        for node in prepared.graph.nodes:
            fed_by = node.args[0] if node.op == "call_module" and node.args else None
            if isinstance(fed_by, fx.Node) and is_constant(prepared, fed_by):
                module = prepared.get_submodule(str(node.target))
                if isinstance(module, FakeQuantizeBase):
                    module(value_of(prepared, fed_by))


def _inside(prepared: fx.GraphModule, group: FusedGroup) -> Iterator[tuple[str, str]]:
    """The batch norms that still stand inside of a fused module, and the members of the group that they are."""
    name = group.members[0]
    fused = _get(prepared, name)
    if isinstance(fused, qat_modules.TYPES) and len(group.members) > 1:
        yield f"{name}.bn", group.members[1]
    elif isinstance(fused, nn.Sequential):
        for number, (part, member) in enumerate(zip(fused, group.members, strict=False)):
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                yield f"{name}.{number}", member


def _get(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def link(prepared: fx.GraphModule, model: nn.Module) -> None:
    """Let the prepared graph train ``model`` itself: use its batch norms, its other modules and its buffers.

    After this, a step of the prepared graph moves the running statistics of ``model``, and ``model``'s train and eval
    modes are those of the graph. Modules that only the prepared graph has (fake quantizes) stay its own.
    """
    known = info(prepared)
    for name in known.kept:
        put(prepared, name, model.get_submodule(name))
    modules = dict(model.named_modules())
    views = {**{name: name for name in modules if name}, **known.origins, **known.batch_norms}
    for name, module in list(prepared.named_modules(remove_duplicate=False)):
        origin = modules.get(views[name]) if name in views else None
        if origin is None or origin is module:
            continue
        is_leaf = not any(True for _ in module.children())
        is_view = getattr(module, "is_view", False)  # set apart on purpose, with settings of its own
        if type(module) is type(origin) and is_leaf and not is_view and origin is not model:
            put(prepared, name, origin)
            continue
        for registry, theirs in ((module._parameters, origin._parameters), (module._buffers, origin._buffers)):
            for key in registry.keys() & theirs.keys():
                registry[key] = theirs[key]


def followers(prepared: fx.GraphModule, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Batch norms of a linked graph that stand for one of ``model`` and are not the same object, and that one."""
    known = info(prepared)
    modules = dict(model.named_modules())
    views = {**known.origins, **known.batch_norms}
    pairs = [(module, modules.get(views[name])) for name, module in prepared.named_modules() if name in views]
    kind = nn.modules.batchnorm._BatchNorm
    return [(a, b) for a, b in pairs if isinstance(a, kind) and isinstance(b, kind) and a is not b]


def put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Let ``part`` be the submodule ``name`` of ``module``."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)


def own_modules(prepared: fx.GraphModule, model: nn.Module) -> list[nn.Module]:
    """The modules of a linked graph that ``model`` does not have."""
    theirs = {id(module) for module in model.modules()}
    return [module for module in prepared.modules() if id(module) not in theirs]


def observers(prepared: nn.Module) -> dict[str, nn.Module]:
    """The observers and fake quantizes of a prepared graph by name, activations and weights.

    Those of graphs inside of the modules that it keeps are not among them.
    """
    kept = tuple(f"{name}." for name in info(prepared).kept)
    return {
        name: module
        for name, module in prepared.named_modules()
        if isinstance(module, (FakeQuantizeBase, ObserverBase))
        and not name.startswith(kept)
        and not _inside_fake_quantize(prepared, name)
    }


def _inside_fake_quantize(prepared: nn.Module, name: str) -> bool:
    return isinstance(prepared.get_submodule(name.rpartition(".")[0]), FakeQuantizeBase)


def is_initialised(prepared: fx.GraphModule) -> bool:
    """Whether every observer of an activation has seen data."""
    return not _unseen(prepared)


def _unseen(prepared: fx.GraphModule) -> list[str]:
    names = []
    for name, module in observers(prepared).items():
        observer = getattr(module, "activation_post_process", module)
        low = getattr(observer, "min_val", None)
        if name.endswith("weight_fake_quant") or low is None:
            continue
        if low.numel() == 0 or bool(torch.isinf(low).any()):
            names.append(name)
    return names


def _finished(prepared: fx.GraphModule, kept: dict[str, nn.Module] | None) -> fx.GraphModule:
    """A copy in eval mode on the CPU, with the weights' ranges those of the weights as they are."""
    known = info(prepared)
    if known.method != "dynamic" and (unseen := _unseen(prepared)):
        raise CalibrationError(
            f"{len(unseen)} observers saw no data (the first: {unseen[0]}), so that there are no ranges to quantize "
            "with. Run the prepared module on calibration data before convert; with the callbacks: the validation "
            "dataloader was empty, or the training ended before quantization began."
        )
    kept = kept or {}
    # not copied with the rest: they are those of the caller, or hold graphs of their own
    twin = copy.deepcopy(prepared, {id(prepared.get_submodule(name)): module for name, module in kept.items()})
    twin.cpu().eval()
    with torch.no_grad():
        module: Any
        for module in twin.modules():
            fake_quantize = getattr(module, "weight_fake_quant", None)
            if not isinstance(fake_quantize, FakeQuantizeBase):
                continue
            weight = module.weight
            if isinstance(module, qat_modules.TYPES):
                norm: Any = module.bn
                factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                weight = weight * factor.reshape([-1] + [1] * (weight.dim() - 1))
            fake_quantize.enable_observer()
            fake_quantize(weight)
        _store_computed_weights(twin)
    for node in twin.graph.nodes:
        if node.op == "call_module":
            # the model's own layers, which a linked graph calls where they stay float, have none
            called: Any = twin.get_submodule(str(node.target))
            called.qconfig = getattr(called, "qconfig", None)
    return twin


#: What models ask of a weight besides its values.
_OF_TENSORS = ("device", "dtype", "shape", "ndim")


def _replace_argument(user: fx.Node, node: fx.Node, value: Any) -> None:
    def replaced(argument: fx.Node) -> Any:
        return value if argument is node else argument

    user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), replaced)


def _store_computed_weights(prepared: fx.GraphModule) -> None:
    """Compute the weights that the graph computes from parameters, and take their ranges as they are now."""

    def is_weight(node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        if not isinstance(prepared.get_submodule(str(node.target)), FakeQuantizeBase | ObserverBase):
            return False
        return any(is_layer(user) and user.args[1:2] == (node,) for user in node.users)

    fold_weights(prepared, is_weight)
    module: Any
    for node in prepared.graph.nodes:
        if is_weight(node):
            module = prepared.get_submodule(str(node.target))
            if isinstance(module, FakeQuantizeBase):
                module.enable_observer()
                module(value_of(prepared, node.args[0]))
        elif node.target is getattr and node.args[0].op == "get_attr" and node.args[1] in _OF_TENSORS:
            # the weight will be packed, and has none of this then; packed weights are on the CPU
            value = torch.device("cpu") if node.args[1] == "device" else value_of(prepared, node)
            for user in list(node.users):
                _replace_argument(user, node, value)
    for node in reversed(list(prepared.graph.nodes)):
        if node.target is getattr and not node.users:
            prepared.graph.erase_node(node)
    prepared.recompile()


def convert(prepared: fx.GraphModule, kept: dict[str, nn.Module] | None = None) -> fx.GraphModule:
    """The int8 model: torch's own quantized kernels, packed for the engine of the config. ``prepared`` is unchanged.

    Args:
        prepared: From :func:`prepare`.
        kept: What stands in the places of the modules that it keeps. Default: copies of them.

    Raises:
        CalibrationError: An observer saw no data.
    """
    known = info(prepared)
    with _working(known.config):
        twin = _finished(prepared, kept)
        converted = convert_graph(twin, is_reference=False, backend_config=_backend_config(known.method))
        embeddings.pack(converted)
    islands.drop_marks(converted)
    converted.meta[_META] = known
    return converted.eval()


def _leave_recurrent(prepared: fx.GraphModule) -> None:
    """Take recurrent layers out of what is quantized: their ranges at run time have no neutral form."""
    qconfigs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    for node in list(prepared.graph.nodes):
        if node.op != "call_module":
            continue
        module = prepared.get_submodule(str(node.target))
        if isinstance(module, RNNS):
            qconfigs[node.name] = None
        elif isinstance(module, ObserverBase) and getattr(module, "is_dynamic", False):
            node.replace_all_uses_with(node.args[0])
            prepared.graph.erase_node(node)
    prepared.recompile()


def reference(prepared: fx.GraphModule, kept: dict[str, nn.Module] | None = None) -> fx.GraphModule:
    """The same model as float arithmetic between quantize and dequantize operators. ``prepared`` is unchanged.

    Args:
        prepared: From :func:`prepare`.
        kept: What stands in the places of the modules that it keeps. Default: copies of them.

    Raises:
        CalibrationError: An observer saw no data.
    """
    known = info(prepared)
    with _working(known.config):
        twin = _finished(prepared, kept)
        _leave_recurrent(twin)
        converted = convert_graph(
            twin,
            is_reference=True,
            _remove_qconfig=False,
            is_decomposed=True,
            backend_config=_backend_config(known.method),
        )
        embeddings.store(converted)
    islands.drop_marks(converted)
    converted.meta[_META] = known
    return converted.eval()

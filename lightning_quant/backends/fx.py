"""FX graph mode: one graph per target, observers placed by torch.ao's tables, lowered onto its int8 kernels.

``prepare`` and ``convert`` are the two functions of the backend protocol; :func:`reference` is the same graph as
``convert`` gives, but with explicit quantize and dequantize operators, from which the exporters work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from torch import fx, nn

from lightning_quant import qat_modules
from lightning_quant._torch_ao import (
    BackendConfig,
    ObserverBase,
    PrepareCustomConfig,
    attach_node_meta,
    convert_graph,
    get_native_backend_config,
    prepare_graph,
    swap_float_functional,
)
from lightning_quant.arguments import Call
from lightning_quant.backends import embeddings, islands, kernels, swapping
from lightning_quant.backends.finishing import finished, observe_weights
from lightning_quant.backends.graph import (
    CannotRun,
    Feasible,
    Prepared,
    engine,
    info,
    try_out,
    twin_of,
    with_info,
    working,
)
from lightning_quant.backends.tracing import Traced, trace
from lightning_quant.config import Method, QuantConfig, resolve
from lightning_quant.fake_quantize import SharedFakeQuantize
from lightning_quant.fusion import FusedGroup, fuse
from lightning_quant.qconfig import RNNS, config_of_layer, layer_qconfig, qconfig_mapping, weight_range

#: Where torch.ao is told to find the nodes that stay float. No module has this name.
_ALONE = "lightning_quant float"


def check(model: nn.Module, call: Call, method: Method, config: QuantConfig) -> Feasible:
    """Prepare, run, convert and run ``model`` once, to see that it can be done.

    Args:
        model: Not changed.
        call: One call of ``model.forward``.
        method: dynamic, static or qat.
        config: ``skip`` are names of its submodules.

    Raises:
        CaptureError: ``model`` cannot be captured as one graph.
    """
    try:
        prepared, _ = try_out(lambda: prepare(model, config, method, call), convert, call)
    except CannotRun:
        # an operator between the layers has no kernel for what it is given
        prepared, _ = try_out(lambda: prepare(model, config, method, call, between=False), convert, call)
        return Feasible(info(prepared).kept, between=False)
    return Feasible(info(prepared).kept)


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
    twin = twin_of(model, share=training)
    twin.train(training)
    with working(config):
        traced = trace(twin, example, training=training, whole=swapping.whole(config))
        traced = swapping.with_observed(traced, config, training=training)
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


def _backend_config(method: Method) -> BackendConfig:
    """Torch's table of the patterns that its int8 kernels run."""
    stock = get_native_backend_config()
    return qat_modules.with_own_modules(stock) if method == "qat" else stock


def _prepare_traced(
    traced: Traced, config: QuantConfig, method: Method, narrow: frozenset[str], between: bool
) -> fx.GraphModule:
    training = method == "qat"
    backend_config = _backend_config(method)
    mapping = qconfig_mapping(config, method)
    for name, kind in _own_settings(traced, config, narrow):
        own = config_of_layer(config, traced.origins.get(name, name))
        if name in narrow:
            own = replace(own, reduce_range=True)
        mapping.set_module_name(name, layer_qconfig(own, method, kind))
    for name in config.skip:
        mapping.set_module_name(name, None)
    for name, origin in traced.origins.items():
        if origin in config.skip:
            mapping.set_module_name(name, None)
    # torch.ao looks into modules that no pattern of it matches
    alone = tuple(f"{name}." for name in (*traced.kept, *traced.float_layers, *traced.swapped))
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
        observe_weights(prepared)
    parts = {part: traced.origins.get(member, member) for group in groups for part, member in _inside(prepared, group)}
    known = Prepared(
        config=config,
        method=method,
        interface=traced.interface,
        replaced=traced.replaced,
        fused=groups,
        origins=traced.origins,
        batch_norms=parts,
        kept=traced.kept,
        float_layers=traced.float_layers,
        swapped=traced.swapped,
    )
    prepared.train(training)
    return with_info(prepared, known)


def _own_settings(
    traced: Traced, config: QuantConfig, narrow: Collection[str]
) -> Iterator[tuple[str, type[nn.Module]]]:
    """The modules that are not quantized as the rest is."""
    named = {layer.name for layer in config.layers if layer.activation or layer.weight}
    for name, module in traced.graph_module.named_modules():
        if name in narrow or name in named or traced.origins.get(name) in named:
            yield name, type(module)


def _is_called_elsewhere(node: fx.Node, floats: list[fx.Node]) -> bool:
    return any(other.target == node.target and other not in floats for other in node.graph.nodes)


def _is_left_out(node: fx.Node, scopes: dict[str, tuple[str, type]], out: set[str]) -> bool:
    place = str(node.target) if node.op == "call_module" else scopes.get(node.name, ("",))[0]
    return any(place == name or place.startswith(name + ".") for name in out)


def _count_sharing(prepared: fx.GraphModule) -> None:
    """Tell each fake quantize how many tensors share it."""
    calls = [prepared.get_submodule(str(node.target)) for node in prepared.graph.nodes if node.op == "call_module"]
    for module in calls:
        if isinstance(module, SharedFakeQuantize):
            module.calls_per_forward = sum(1 for other in calls if other is module)


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


def convert(prepared: fx.GraphModule, kept: dict[str, nn.Module] | None = None) -> fx.GraphModule:
    """The int8 model: torch's own quantized kernels, packed for the engine of the config. ``prepared`` is unchanged.

    Args:
        prepared: From :func:`prepare`.
        kept: What stands in the places of the modules that it keeps. Default: copies of them.

    Raises:
        CalibrationError: An observer saw no data.
    """
    known = info(prepared)
    with working(known.config):
        twin = finished(prepared, kept)
        converted = convert_graph(twin, is_reference=False, backend_config=_backend_config(known.method))
        embeddings.pack(converted)
    islands.drop_marks(converted)
    return with_info(converted.eval(), known)


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
    with working(known.config):
        twin = finished(prepared, kept)
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
    return with_info(converted.eval(), known)

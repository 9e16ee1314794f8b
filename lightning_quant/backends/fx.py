"""FX graph mode: one graph per target, observers placed by torch.ao's tables, lowered onto its int8 kernels.

``prepare`` and ``convert`` are the two functions of the backend protocol; :func:`reference` is the same graph as
``convert`` gives, but with explicit quantize and dequantize operators, from which the exporters work.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from lightning_quant._torch_ao import (
    ObserverBase,
    PrepareCustomConfig,
    attach_node_meta,
    convert_graph,
    prepare_graph,
    swap_float_functional,
)
from lightning_quant.arguments import Call
from lightning_quant.backends import embeddings, few_bits, float_results, islands
from lightning_quant.backends.beginning import (
    Begun,
    batch_norms_inside,
    begin,
    feasible,
    float_names,
    is_inside,
    native_patterns,
    own_settings,
)
from lightning_quant.backends.finishing import finished, observe_weights
from lightning_quant.backends.graph import Feasible, Prepared, engine, info, with_info, working
from lightning_quant.backends.hiding import count_sharing, hide_observers, move_clamps
from lightning_quant.config import Method, QuantConfig, resolve
from lightning_quant.fusion import fuse
from lightning_quant.qconfig import RNNS, layer_qconfig, qconfig_mapping

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
    return feasible(lambda between: prepare(model, config, method, call, between=between), convert, call)


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
    with working(resolve(config)):
        begun = begin(model, config, method, example)
        with engine(begun.config.engine):
            return _prepare_traced(begun, method, between)


def _prepare_traced(begun: Begun, method: Method, between: bool) -> fx.GraphModule:
    traced, config, training = begun.traced, begun.config, method == "qat"
    backend_config = native_patterns(method)
    mapping = qconfig_mapping(config, method)
    for name, own in own_settings(begun).items():
        kind = type(traced.graph_module.get_submodule(name))
        mapping.set_module_name(name, layer_qconfig(own, method, kind))
    for name in float_names(traced, config):
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
            graph_module, backend_config, lambda n: is_inside(n, scopes, out), none=not between
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
    if method != "dynamic":
        if float_results.has_kernel(config):
            float_results.leave_results(prepared)
        hide_observers(prepared)
    if training:
        count_sharing(prepared)
        move_clamps(prepared)
        observe_weights(prepared)
    known = Prepared(
        config=config,
        method=method,
        interface=traced.interface,
        replaced=traced.replaced,
        fused=groups,
        origins=traced.origins,
        batch_norms=batch_norms_inside(prepared, traced, groups),
        kept=traced.kept,
        float_layers=traced.float_layers,
        swapped=traced.swapped,
    )
    prepared.train(training)
    return with_info(prepared, known)


def _is_called_elsewhere(node: fx.Node, floats: list[fx.Node]) -> bool:
    return any(other.target == node.target and other not in floats for other in node.graph.nodes)


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
        if known.method != "dynamic":
            few_bits.saturate(twin)
        converted = convert_graph(twin, is_reference=False, backend_config=native_patterns(known.method))
        if known.method != "dynamic" and float_results.has_kernel(known.config):
            float_results.lower_results(converted)
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
            backend_config=native_patterns(known.method),
        )
        embeddings.store(converted)
    islands.drop_marks(converted)
    return with_info(converted.eval(), known)


def with_float_weights(
    prepared: fx.GraphModule, kept: dict[str, nn.Module] | None = None
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """The reference graph, whose layers have their weights in float; of ``dynamic``, the int8 graph.

    Args:
        prepared: From :func:`prepare`. Unchanged.
        kept: What stands in the places of the modules that it keeps. Default: copies of them.

    Raises:
        CalibrationError: An observer saw no data.
    """
    made = convert(prepared, kept) if info(prepared).method == "dynamic" else reference(prepared, kept)
    return made, {}

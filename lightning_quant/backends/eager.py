"""Eager mode: an ordinary model of modules, in which torch.ao swaps each one by its qconfig.

What eager mode asks to be done by hand is done on the traced graph: layers are fused by data flow, ``QuantStub`` and
``DeQuantStub`` stand where data enters and leaves int8, functions between layers are modules. The rest is torch's own
``prepare``, ``prepare_qat`` and ``convert``.
"""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from lightning_quant._torch_ao import FusedModule, attach_node_meta
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
from lightning_quant.backends.eager_functions import depends_on_parameters, observe_functions, store_weights
from lightning_quant.backends.eager_operators import FIXED, is_able, record_values
from lightning_quant.backends.eager_reference import neutral
from lightning_quant.backends.eager_stubs import insert_stubs, make_modules
from lightning_quant.backends.eager_swapping import QCONFIGS, QConfigs, int8_modules, observe, swap, trainable_modules
from lightning_quant.backends.finishing import finished, float_weights, observe_weights
from lightning_quant.backends.graph import Feasible, Prepared, engine, info, with_info, working
from lightning_quant.backends.hiding import clamp_observed, move_relus
from lightning_quant.config import Method, QuantConfig, resolve
from lightning_quant.errors import ConfigError
from lightning_quant.fusion import fuse
from lightning_quant.qconfig import RNNS, layer_qconfig


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
            return _prepare_traced(begun, method, example, between)


def _prepare_traced(begun: Begun, method: Method, example: Call, between: bool) -> fx.GraphModule:
    traced, config, training = begun.traced, begun.config, method == "qat"
    out = float_names(traced, config)
    attach_node_meta(traced.graph_module)
    graph_module, groups = fuse(traced.graph_module, native_patterns(method), method)
    scopes = dict(traced.scopes)
    if method == "dynamic":
        qconfigs = _dynamic_qconfigs(graph_module, begun, out)
    else:
        graph_module.eval()
        record_values(graph_module, copy.deepcopy(traced.interface.flatten(example.args, example.keywords)))
        qconfigs = _place(graph_module, begun, method, scopes, out, between)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    graph_module.train(training)
    if method != "dynamic":
        # recurrent layers take the ranges of activations at run time: nothing is observed
        observed = {n: q for n, q in qconfigs.items() if not isinstance(graph_module.get_submodule(n), RNNS)}
        observe(graph_module, observed, tuple(traced.kept), training=training)
    if method == "static":
        clamp_observed(graph_module)
    if training:
        move_relus(graph_module)
        observe_weights(graph_module)
    norms = batch_norms_inside(graph_module, traced, groups)
    known = Prepared(
        config=config,
        method=method,
        interface=traced.interface,
        replaced=traced.replaced,
        fused=groups,
        origins=traced.origins,
        batch_norms=norms | _observed_batch_norms(graph_module, traced.origins),
        kept=traced.kept,
        float_layers=traced.float_layers,
        swapped=traced.swapped,
    )
    graph_module.meta[QCONFIGS] = qconfigs
    graph_module.train(training)
    return with_info(graph_module, known)


def _observed_batch_norms(graph_module: nn.Module, origins: dict[str, str]) -> dict[str, str]:
    """Batch norms that stand alone and are observed: they are no longer the same object as in the float model."""
    return {
        name: origins.get(name, name)
        for name, module in graph_module.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and hasattr(module, "activation_post_process")
    }


def _dynamic_qconfigs(graph_module: fx.GraphModule, begun: Begun, out: set[str]) -> QConfigs:
    settings = own_settings(begun)
    qconfigs: QConfigs = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module" or is_inside(node, {}, out):
            continue
        name = str(node.target)
        module = graph_module.get_submodule(name)
        kind = nn.Linear if isinstance(module, FusedModule) else type(module)
        if kind in (nn.Linear, *RNNS):
            qconfigs[name] = layer_qconfig(settings.get(name, begun.config), "dynamic", kind)
    return qconfigs


def _place(
    graph_module: fx.GraphModule,
    begun: Begun,
    method: Method,
    scopes: dict[str, tuple[str, type]],
    out: set[str],
    between: bool,
) -> QConfigs:
    """Make ``graph_module`` an eager-mode model. Gives the qconfig of each module that is swapped, by name."""
    config = begun.config
    swapped = {*int8_modules(method), *trainable_modules()}

    def stays_float(node: fx.Node) -> bool:
        if is_inside(node, scopes, out):
            return True
        if node.op == "call_function":
            return method != "qat" or not depends_on_parameters(graph_module, node)
        return islands.kind_of(graph_module, node) not in swapped

    def able(node: fx.Node) -> bool:
        return is_able(graph_module, node) and not is_inside(node, scopes, out)

    _, int8 = islands.divide(graph_module, able, stays_float, none=not between)
    anywhere = layer_qconfig(config, method, nn.Linear)
    qconfigs: QConfigs = {}
    settings = own_settings(begun)
    # in training the result is rounded: digits come out at 0.991 with and without it, mean of eight seeds
    gives_float = method == "static" and float_results.has_kernel(config)
    returned = float_results.returned(graph_module) if gives_float else []
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        module = graph_module.get_submodule(name)
        if isinstance(module, RNNS) and not is_inside(node, scopes, out):
            qconfigs[name] = layer_qconfig(settings.get(name, config), method, type(module))
        elif node in int8 and islands.is_weighted(type(module)):
            qconfig = layer_qconfig(settings.get(name, config), method, type(module))
            qconfigs[name] = float_results.in_float(qconfig) if node in returned else qconfig
    observe_functions(graph_module, int8, config, method)
    for name in make_modules(graph_module, int8):
        # those of fixed scale are observed in training alone, where rounding has to be learnt
        if method == "qat" or not isinstance(graph_module.get_submodule(name), FIXED):
            qconfigs[name] = anywhere
    stubs = insert_stubs(graph_module, int8)
    return qconfigs | dict.fromkeys(stubs, anywhere)


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
        ends = few_bits.limits_by_name(twin)
        _swap(twin, known)
        few_bits.saturate_modules(twin, ends)
        embeddings.pack(twin)
    return with_info(twin.eval(), known)


def _swap(twin: fx.GraphModule, known: Prepared) -> None:
    qconfigs = twin.meta.pop(QCONFIGS) | store_weights(twin, known.config, known.method)
    swap(twin, qconfigs, tuple(known.kept), known.method)


def reference(prepared: fx.GraphModule, kept: dict[str, nn.Module] | None = None) -> fx.GraphModule:
    """The same model as float arithmetic between quantize and dequantize operators. ``prepared`` is unchanged.

    Args:
        prepared: From :func:`prepare`.
        kept: What stands in the places of the modules that it keeps. Default: copies of them.

    Raises:
        CalibrationError: An observer saw no data.
        ConfigError: It was prepared for ``dynamic``, where ranges are taken at run time.
    """
    known = info(prepared)
    if known.method == "dynamic":
        raise ConfigError(
            "backend='eager' with method='dynamic' has no neutral form: the ranges of activations are taken when they "
            "are computed. Write 'torchscript', or use method='static'."
        )
    with working(known.config):
        twin = finished(prepared, kept)
        recurrent = {name: module for name, module in twin.named_modules() if isinstance(module, RNNS)}
        ends = few_bits.limits_by_name(twin)
        _swap(twin, known)
        graph_module = neutral(twin, recurrent, ends)
        embeddings.store(graph_module)
    return with_info(graph_module.eval(), known)


def with_float_weights(
    prepared: fx.GraphModule, kept: dict[str, nn.Module] | None = None
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """The reference graph, and the float weights of its layers; of ``dynamic``, the int8 graph.

    Args:
        prepared: From :func:`prepare`. Unchanged.
        kept: What stands in the places of the modules that it keeps. Default: copies of them.

    Raises:
        CalibrationError: An observer saw no data.
    """
    if info(prepared).method == "dynamic":
        return convert(prepared, kept), {}
    return reference(prepared, kept), float_weights(prepared)

"""PT2E: ``torch.export``, observers placed by a quantizer of torchao, converted to quantize and dequantize operators.

The result computes in float between explicit operators, which is the neutral form that exporters read: runtimes fuse it
into int8 kernels. Needs torchao.
"""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from lightning_quant._torch_ao import pt2e
from lightning_quant.arguments import Call
from lightning_quant.backends.graph import Feasible, Prepared, check_seen, info, try_out, twin_of, with_info, working
from lightning_quant.backends.hiding import count_sharing, hide_weight_observers, move_clamps, restore
from lightning_quant.backends.pt2e_capture import export
from lightning_quant.backends.pt2e_folding import (
    fold_batch_norms,
    groups,
    observe_folded,
    observe_weights,
    store_computed_weights,
)
from lightning_quant.backends.pt2e_quantizer import plan, quantizer, spread, weight_qscheme
from lightning_quant.config import Method, QuantConfig, resolve
from lightning_quant.qconfig import config_of_layer


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
    try_out(lambda: prepare(model, config, method, call), convert, call)
    return Feasible({})


def prepare(
    model: nn.Module, config: QuantConfig, method: Method, example: Call, *, between: bool = True
) -> fx.GraphModule:
    """A graph of ``model`` with observers (static, dynamic) or fake quantizes (qat) at its int8 tensors.

    Args:
        model: Keeps its structure, buffers and mode. For ``qat`` its Parameter objects are those of the result.
        config: ``skip`` are names of submodules of ``model``.
        method: dynamic, static or qat.
        example: One call of ``model.forward``.
        between: Not used: quantize and dequantize operators run with whatever stands between them.

    Raises:
        CaptureError: ``torch.export`` cannot follow ``forward``, or nothing in it has weights that can be int8.
    """
    config = resolve(config)
    training = method == "qat"
    names = pt2e()
    twin = twin_of(model, share=training)
    with working(config):
        exported = export(twin, example, training=training)
        graph_module = exported.graph_module
        fused = groups(graph_module)
        if training:
            configs = (config, *(config_of_layer(config, str(layer.name)) for layer in config.layers))
            schemes = {weight_qscheme(own, 0) for own in configs}
            observe_folded(graph_module, per_channel=schemes == {torch.per_channel_symmetric})
        else:
            fold_batch_norms(graph_module)
            store_computed_weights(graph_module)
        chosen = plan(graph_module, method, config.skip)
        prepare_graph = names.prepare_qat_pt2e if training else names.prepare_pt2e
        prepared = prepare_graph(graph_module, quantizer(chosen, config, method))
        _allow_modes(prepared)
        for node in prepared.graph.nodes:
            # they name nodes of this graph, and convert_pt2e would look for them in a copy of it
            node.meta.pop(names.Q_ANNOTATION_KEY, None)
            if node.op == "call_module" and "val" not in node.meta:  # observers give what they take
                node.meta["val"] = node.args[0].meta["val"]
        prepared.train(training)
        weights = observe_weights(prepared)
        if training:
            count_sharing(prepared)
            move_clamps(prepared)
        else:
            hide_weight_observers(prepared, weights)
    known = Prepared(
        config=config,
        method=method,
        interface=exported.interface,
        replaced=exported.replaced,
        fused=fused,
        origins={"": ""},
        batch_norms=exported.batch_norms,
        float_layers=chosen.float_layers,
        weight_observers=weights,
    )
    return with_info(prepared, known)


def _allow_modes(graph_module: fx.GraphModule) -> None:
    """Torchao binds a ``train`` and an ``eval`` that raise; here modules follow them as everywhere."""
    for name in ("train", "eval"):
        graph_module.__dict__.pop(name, None)


def convert(prepared: fx.GraphModule, kept: dict[str, nn.Module] | None = None) -> fx.GraphModule:
    """The int8 model as quantize and dequantize operators around float arithmetic, with weights stored as int8.

    Args:
        prepared: From :func:`prepare`. Unchanged.
        kept: Not used: these graphs keep nothing.

    Raises:
        CalibrationError: An observer saw no data.
    """
    return _converted(prepared, fold=True)


def unfolded(prepared: fx.GraphModule) -> fx.GraphModule:
    """As :func:`convert`, with float weights in front of quantize operators, so that both can be looked at.

    Raises:
        CalibrationError: An observer saw no data.
    """
    return _converted(prepared, fold=False)


def _converted(prepared: fx.GraphModule, *, fold: bool) -> fx.GraphModule:
    known = info(prepared)
    check_seen(prepared)
    twin = copy.deepcopy(prepared).cpu().eval()
    restore(twin)
    with working(known.config), torch.no_grad():
        if known.method == "qat":
            fold_batch_norms(twin)
            store_computed_weights(twin)
        observe_weights(twin)
        _drop_dropout(twin)
        converted = pt2e().convert_pt2e(twin, fold_quantize=fold)
        _allow_modes(converted)
        spread(converted)
        converted = _only_used(converted)
    return with_info(converted.eval(), known)


reference = convert


def with_float_weights(
    prepared: fx.GraphModule, kept: dict[str, nn.Module] | None = None
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """As :func:`convert`, with float weights in the graph, which it rounds in each call."""
    return unfolded(prepared), {}


def _drop_dropout(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _only_used(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Without the float weights that int8 ones have replaced."""
    graph_module.graph.eliminate_dead_code()
    return fx.GraphModule(graph_module, graph_module.graph, "Int8")

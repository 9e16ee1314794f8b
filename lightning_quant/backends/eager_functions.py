"""Layers as functions, whose weights training computes at every step: normalised ones, parts of a larger matrix.

Eager mode swaps only modules that store their weights. While it is trained, such a function stands between fake
quantizes of its own; once its weight is final, it becomes a layer that stores it.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lightning_quant._torch_ao import FakeQuantizeBase, QConfig
from lightning_quant.backends.constants import is_constant, is_layer, value_of
from lightning_quant.backends.eager_stubs import add_module
from lightning_quant.backends.rewriting import LAYERS, layer_with
from lightning_quant.config import Method, QuantConfig
from lightning_quant.qconfig import layer_qconfig

#: Torch's names of the first arguments. The others, which only convolutions have, stand behind them by position.
_NAMES = ("input", "weight", "bias")


def _values(node: fx.Node) -> dict[str, Any]:
    return {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}


def depends_on_parameters(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a functional layer whose weight and bias depend on parameters and buffers alone."""
    if not is_layer(node) or any(isinstance(x, (fx.Node, str)) for x in node.args[3:]):
        return False
    values = _values(node)
    weight, bias = values.get("weight"), values.get("bias")
    if not isinstance(weight, fx.Node) or node.args[1:2] != (weight,) or not isinstance(values.get("input"), fx.Node):
        return False
    return all(x is None or (isinstance(x, fx.Node) and is_constant(graph_module, x)) for x in (weight, bias))


def observe_functions(graph_module: fx.GraphModule, int8: set[fx.Node], config: QuantConfig, method: Method) -> None:
    """Put fake quantizes at the weight and the output of each functional layer among ``int8``, which is added to.

    Their inputs are quantized where they come from, as those of modules are.
    """
    for node in list(graph_module.graph.nodes):
        if node not in int8 or not is_layer(node):
            continue
        made: Any = layer_qconfig(config, method, LAYERS[node.target])
        weight: Any = node.args[1]
        name = add_module(graph_module, f"{node.name}_weight_fake_quant", made.weight())
        with graph_module.graph.inserting_before(node):
            quantized = graph_module.graph.call_module(name, (weight,))
        node.args = (node.args[0], quantized, *node.args[2:])
        name = add_module(graph_module, f"{node.name}_output", made.activation())
        with graph_module.graph.inserting_after(node):
            output = graph_module.graph.call_module(name, (node,))
        output.meta = dict(node.meta)
        node.replace_all_uses_with(output, lambda user, output=output: user is not output)
        int8.add(output)


def store_weights(graph_module: fx.GraphModule, config: QuantConfig, method: Method) -> dict[str, QConfig | None]:
    """Make layers of the functions that :func:`observe_functions` put fake quantizes at.

    Returns:
        The qconfig of each by name. They have the observers of their outputs.
    """
    qconfigs: dict[str, QConfig | None] = {}
    for node in list(graph_module.graph.nodes):
        weight = node.args[1] if is_layer(node) and len(node.args) > 1 else None
        if not isinstance(weight, fx.Node) or weight.op != "call_module":
            continue
        if not isinstance(graph_module.get_submodule(str(weight.target)), FakeQuantizeBase):
            continue
        (output,) = node.users
        computed: Any = weight.args[0]
        bias = _values(node).get("bias")
        kind: type[nn.Module] = LAYERS[node.target]
        tensors = [None if x is None else value_of(graph_module, x).detach() for x in (computed, bias)]
        layer = layer_with(kind, tensors[0], tensors[1], node.args[3:])
        layer.activation_post_process = graph_module.get_submodule(str(output.target))
        name = add_module(graph_module, f"{node.name}_layer", layer)
        qconfigs[name] = layer_qconfig(config, method, kind)
        output.replace_all_uses_with(node)
        node.op, node.target, node.args, node.kwargs = "call_module", name, (node.args[0],), {}
        graph_module.graph.erase_node(output)
        graph_module.graph.erase_node(weight)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return qconfigs

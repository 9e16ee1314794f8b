"""Where observers stand in an exported graph: a quantizer of torchao.

Every layer with a stored weight takes its data and its weight in int8. What stands between two of them does so too
where :mod:`lightning_quant.backends.islands` would have it so: where all data comes from int8 and all of it goes there.
Operators that only move data are not observed themselves: their result is, and :func:`spread` lets them run in int8 in
the converted graph, which changes no number.
"""

from __future__ import annotations

import operator
from collections.abc import Container
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from lightning_quant._torch_ao import pt2e
from lightning_quant.backends.graph import place_of
from lightning_quant.backends.pt2e_classes import balanced_class, fake_quantize_class, histogram_class, learned_class
from lightning_quant.backends.pt2e_folding import (
    LINEAR,
    WEIGHTED,
    Weighted,
    constants_of,
    scaled_weight,
    unscaled_weight,
    weighted,
)
from lightning_quant.backends.tracing import LAYER
from lightning_quant.config import HISTOGRAMS, Method, QuantConfig, TensorSpec
from lightning_quant.qconfig import (
    AVERAGING_CONSTANT,
    activation_range,
    config_of_layer,
    own_class,
    weight_observer,
    weight_range,
)

_ATEN = torch.ops.aten

#: They give the values that they take, somewhere else; 0 stays 0. Quantizing before or after them is the same.
VIEWS: frozenset[str] = frozenset({
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "numpy_T", "squeeze",
    "unsqueeze", "expand", "expand_as", "slice", "select", "narrow", "chunk", "split", "split_with_sizes", "unbind",
    "movedim", "clone", "contiguous", "alias", "detach", "repeat", "repeat_interleave", "cat", "concat", "stack",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "dropout",
    "feature_dropout", "getitem", "relu", "roll", "flip",
})  # fmt: skip
#: Activations that are part of the kernel before them.
_FUSED = frozenset({"relu", "relu6", "hardtanh", "clamp_min"})
#: They compute, without weights, and have int8 kernels.
_COMPUTING = frozenset({"add", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                        "adaptive_avg_pool3d", "mean"})  # fmt: skip
#: They ask for a size, not for values.
_NEUTRAL = frozenset({"sym_size", "sym_numel", "sym_stride"})


def kind_of(node: fx.Node) -> str:
    """The name of the operator that ``node`` calls, without its overload; ``""`` if it calls none."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        if namespace != "aten":
            return ""
        if name in ("pad", "constant_pad_nd"):
            return "view" if _pads_with_zero(node, name) else ""
        return name
    return ""


def moves(node: fx.Node) -> bool:
    """Whether ``node`` gives the values that it takes."""
    return kind_of(node) in VIEWS


def asks_for_size(node: fx.Node) -> bool:
    """Whether ``node`` reads what a tensor is, and none of its values."""
    return kind_of(node) in _NEUTRAL


def _pads_with_zero(node: fx.Node, name: str) -> bool:
    """Whether padding stays in the range of what is padded: it repeats values of it, or is 0."""
    rest = [*node.args[2:], *node.kwargs.values()]
    if name == "constant_pad_nd":
        return rest in ([], [0])
    return rest[:1] not in ([], ["constant"]) or rest[1:] in ([], [None], [0])


def islands(graph_module: fx.GraphModule, layers: Container[fx.Node]) -> set[fx.Node]:
    """The nodes that run in int8, layers with weights among them.

    Args:
        graph_module: Before observers are placed.
        layers: The nodes with weights that run in int8.
    """
    kinds = {node: kind_of(node) for node in graph_module.graph.nodes}
    between = {node for node, kind in kinds.items() if kind in VIEWS | _FUSED | _COMPUTING and node not in layers}
    while True:
        rest = {
            node
            for node in between
            if _readers_are_int8(node, kinds, between, layers)
            and (kinds[node] not in _COMPUTING or _sources_are_int8(node, kinds, between, layers))
        }
        if rest == between:
            return between | {node for node in kinds if node in layers}
        between = rest


def _readers_are_int8(
    node: fx.Node, kinds: dict[fx.Node, str], between: Container[fx.Node], layers: Container[fx.Node]
) -> bool:
    readers = [user for user in node.users if kinds[user] not in _NEUTRAL]
    return bool(readers) and all(user in layers or user in between for user in readers)


def _sources_are_int8(
    node: fx.Node, kinds: dict[fx.Node, str], between: Container[fx.Node], layers: Container[fx.Node]
) -> bool:
    """Whether all data that ``node`` reads was computed in int8, not only moved."""
    pending = [source for source in node.all_input_nodes if kinds[source] not in _NEUTRAL]
    seen: set[fx.Node] = set()
    while pending:
        source = pending.pop()
        if source in seen or kinds[source] in _NEUTRAL:
            continue
        seen.add(source)
        if source.op == "call_module":  # a batch norm or a dropout of training
            pending += source.all_input_nodes
        elif source not in layers and source not in between:
            return False
        elif kinds[source] in VIEWS | _FUSED:
            pending += source.all_input_nodes
    return True


@dataclass(frozen=True)
class Plan:
    """What is quantized in a graph.

    Attributes:
        layers: The nodes with weights that run in int8, and where their data and weights are.
        int8: All nodes that do.
        float_layers: Places of layers with weights that stay float -> why.
    """

    layers: dict[fx.Node, Weighted]
    int8: frozenset[fx.Node]
    float_layers: dict[str, str]


def plan(graph_module: fx.GraphModule, method: Method, skip: tuple[str, ...]) -> Plan:
    """Choose what runs in int8.

    Args:
        graph_module: Exported, without observers.
        method: With ``dynamic``, linear layers alone.
        skip: Names of submodules that stay float.
    """
    constants = constants_of(graph_module)
    layers: dict[fx.Node, Weighted] = {}
    float_layers: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        how = weighted(node, constants)
        places = _places(node, how)
        if any(place == name or place.startswith(f"{name}.") for place in places for name in skip):
            continue
        if how is None:
            if reason := _why_float(node):
                float_layers.setdefault(place_of(node), reason)
        elif method == "dynamic" and node.target is not LINEAR:
            float_layers.setdefault(places[-1], "method 'dynamic' quantizes linear layers only")
        else:
            layers[node] = how
    int8 = islands(graph_module, layers) if method != "dynamic" else set(layers)
    return Plan(layers, frozenset(int8), float_layers)


def _places(node: fx.Node, how: Weighted | None) -> list[str]:
    """Names of the modules that a layer may be called by: where it runs, and whose weight it has."""
    places = [place_of(node)]
    pending = [node.args[how.weight]] if how is not None else []
    while pending:
        source = pending.pop()
        if isinstance(source, fx.Node):
            if source.op == "get_attr":
                places.append(str(source.target).rpartition(".")[0])
            pending += source.all_input_nodes
    return places


def _why_float(node: fx.Node) -> str:
    kind = kind_of(node)
    if kind in ("lstm", "gru", "rnn_tanh", "rnn_relu", "quantized_lstm"):
        return "torchao has no int8 form of recurrent layers: use backend='fx'"
    if kind in ("embedding", "embedding_bag", "_embedding_bag"):
        return "torchao's quantizers leave embeddings in float: use backend='fx'"
    if node.target in WEIGHTED and node.target not in (_ATEN.matmul.default, _ATEN.mm.default, _ATEN.addmm.default):
        return "its weight is computed from data"
    if kind in ("bilinear", "_trilinear", "einsum"):
        return f"there is no int8 kernel of {kind}"
    return ""


@cache
def _quantizer_class() -> type:
    """Made when torchao is there: its base class is one of torchao's."""
    base: Any = pt2e().Quantizer

    class IslandQuantizer(base):
        """Annotates what a plan says."""

        def __init__(self, plan: Plan, config: QuantConfig, method: Method) -> None:
            super().__init__()
            self.plan = plan
            self.config = config
            self.method = method

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            """Say which inputs of which nodes are observed, and how."""
            _annotate(self.plan, self.config, self.method)
            return model

        def validate(self, model: fx.GraphModule) -> None:
            """Nothing to check: the plan was made from this graph."""

    return IslandQuantizer


def quantizer(plan: Plan, config: QuantConfig, method: Method) -> Any:
    """The quantizer that torchao's ``prepare_pt2e`` and ``prepare_qat_pt2e`` take. ``config`` is resolved."""
    return _quantizer_class()(plan, config, method)


def _annotate(plan: Plan, config: QuantConfig, method: Method) -> None:
    names = pt2e()
    settings = _Settings(config, plan.layers)
    data = cache(lambda own: activation_spec(own, method))  # tensors with one specification may share an observer
    for node in plan.int8:
        how = plan.layers.get(node)
        if how is not None:
            weight: Any = node.args[how.weight]
            inside = weight
            spec = weight_spec(settings.of(node), method, how.axis)
            specs = {node.args[how.data]: data(settings.of_producer(node.args[how.data]))}
            if weight.target is unscaled_weight:  # what is quantized is the weight with its batch norm folded in
                inside = weight.args[0]
                assert inside.target is scaled_weight
                weight.meta[names.Q_ANNOTATION_KEY] = names.QuantizationAnnotation({inside: spec}, _annotated=True)
            else:
                specs[weight] = spec
        elif kind_of(node) in _COMPUTING:
            sources = [source for source in node.all_input_nodes if kind_of(source) not in _NEUTRAL]
            specs = {source: data(settings.of_producer(source)) for source in sources}
        else:
            continue
        node.meta[names.Q_ANNOTATION_KEY] = names.QuantizationAnnotation(specs, _annotated=True)


class _Settings:
    """The config of each layer, some of which have settings of their own."""

    def __init__(self, config: QuantConfig, layers: dict[fx.Node, Weighted]) -> None:
        self.config = config
        self.layers = layers
        # the target itself is called "layer" in settings, and has no name in the graph
        self.named = {"" if layer.name == LAYER else layer.name: layer.name for layer in config.layers}

    def of(self, node: fx.Node) -> QuantConfig:
        """That of a layer."""
        name = next((self.named[place] for place in _places(node, self.layers[node]) if place in self.named), None)
        return self.config if name is None else config_of_layer(self.config, name)

    def of_producer(self, node: Any) -> QuantConfig:
        """That of the layer that gave what ``node`` gives, moved or not."""
        while node not in self.layers and (kind_of(node) in VIEWS | _FUSED or node.op == "call_module"):
            if not node.all_input_nodes:
                break
            node = node.all_input_nodes[0]
        return self.of(node) if node in self.layers else self.config


def _dtype(spec: TensorSpec, default: str) -> torch.dtype:
    return {"quint8": torch.uint8, "qint8": torch.int8}[default if spec.dtype == "auto" else spec.dtype]


def activation_spec(config: QuantConfig, method: Method) -> Any:
    """Torchao's specification of an activation. ``config`` is resolved."""
    names, spec = pt2e(), config.activation
    low, high = activation_range(spec)
    qscheme = getattr(torch, "per_tensor_affine" if spec.qscheme == "auto" else spec.qscheme)
    own, own_rounding = own_classes(spec)
    if method == "dynamic":
        observer = names.PlaceholderObserver
    elif method == "static" and own is not None:
        observer = own
    elif own is not None or own_rounding is not None:
        averaging = {} if own is not None else {"averaging_constant": AVERAGING_CONSTANT}
        observer = (own_rounding or names.FakeQuantize).with_args(
            observer=own or names.MovingAverageMinMaxObserver, **averaging
        )
    elif method == "static":
        search = "histogram" if spec.observer == "auto" else spec.observer
        histogram = histogram_class().with_args(search=search, percentile=spec.percentile)
        observer = {
            **dict.fromkeys(HISTOGRAMS, histogram),
            "auto": histogram,
            "min_max": names.MinMaxObserver,
            "moving_average": names.MovingAverageMinMaxObserver,
        }[spec.observer]
    else:
        learned = {"with_offset": spec.fake_quantize == "learned_offset"} if spec.fake_quantize != "auto" else {}
        observer = (learned_class() if learned else fake_quantize_class()).with_args(
            observer=names.MovingAverageMinMaxObserver, averaging_constant=AVERAGING_CONSTANT, **learned
        )
    return names.QuantizationSpec(
        dtype=_dtype(spec, "quint8"),
        quant_min=low,
        quant_max=high,
        qscheme=qscheme,
        is_dynamic=method == "dynamic",
        observer_or_fake_quant_ctr=observer,
    )


def own_classes(spec: TensorSpec) -> tuple[Any, Any]:
    """The user's observer and fake quantize, None where there is none.

    Raises:
        ConfigError: They are none of torchao.
    """
    names, library = pt2e(), "torchao.quantization.pt2e"
    return (
        own_class(spec.observer, "observer", names.ObserverBase, library),
        own_class(spec.fake_quantize, "fake_quantize", names.FakeQuantizeBase, library),
    )


def weight_qscheme(config: QuantConfig, axis: int | None) -> torch.qscheme:
    """One scale per output channel, if there is an ``axis`` and the engine takes it. ``config`` is resolved."""
    default = "per_tensor_symmetric" if config.engine == "qnnpack" else "per_channel_symmetric"
    qscheme: torch.qscheme = getattr(torch, default if config.weight.qscheme == "auto" else config.weight.qscheme)
    if axis is None:
        affine = qscheme in (torch.per_channel_affine, torch.per_tensor_affine)
        qscheme = torch.per_tensor_affine if affine else torch.per_tensor_symmetric
    return qscheme


def weight_spec(config: QuantConfig, method: Method, axis: int | None) -> Any:
    """Torchao's specification of a weight whose output channels are its dimension ``axis``. ``config`` is resolved."""
    names = pt2e()
    qscheme = weight_qscheme(config, axis)
    per_channel = qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
    low, high = weight_range(config)
    moving = names.MovingAveragePerChannelMinMaxObserver if per_channel else names.MovingAverageMinMaxObserver
    exact = names.PerChannelMinMaxObserver if per_channel else names.MinMaxObserver
    observer: Any
    own, own_rounding = own_classes(config.weight)
    if method == "qat":
        # averaging_constant=1: the range is that of the weights as they are now, without memory
        settings: dict[str, Any] = {"observer": own} if own else {"observer": moving, "averaging_constant": 1.0}
        if per_channel:
            settings["ch_axis"] = axis  # torchao passes that of the specification to observers alone
        if config.weight.fake_quantize in ("learned", "learned_offset"):
            settings |= {"sees_weights": True, "with_offset": config.weight.fake_quantize == "learned_offset"}
            own_rounding = learned_class()
        rounding = own_rounding or (names.FakeQuantize if own else fake_quantize_class())
        observer = rounding.with_args(**settings)
    elif own is not None:
        observer = own
    else:
        name = weight_observer(config, method, qscheme)
        # torchao passes the axis of the specification to classes alone that have PerChannel in their name
        observer = {"moving_average": moving, "min_max": exact}.get(name) or balanced_class().with_args(ch_axis=axis)
    return names.QuantizationSpec(
        dtype=_dtype(config.weight, "qint8"),
        quant_min=low,
        quant_max=high,
        qscheme=qscheme,
        ch_axis=axis if per_channel else None,
        observer_or_fake_quant_ctr=observer,
    )


def spread(graph_module: fx.GraphModule) -> None:
    """Let what moves int8 data to an int8 reader do so in int8: it is quantized before as it is after.

    Runtimes fuse a layer whose result is quantized at once, and quantizing twice in the same way changes nothing.
    """
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    constants = constants_of(graph_module)
    graph = graph_module.graph

    def computed_in_int8(node: fx.Node) -> bool:
        """Whether all that ``node`` moves comes from int8 layers and sums."""
        kind = kind_of(node)
        if node.target is dequantize or weighted(node, constants) is not None or kind in _COMPUTING:
            return True
        return kind in VIEWS | _FUSED and all(
            computed_in_int8(source) for source in node.all_input_nodes if kind_of(source) not in _NEUTRAL
        )

    for node in reversed(list(graph.nodes)):
        readers = [user for user in node.users if kind_of(user) not in _NEUTRAL]
        if kind_of(node) not in VIEWS - {"getitem"} or len(readers) != 1 or readers[0].target is not quantize:
            continue
        sources = [source for source in node.all_input_nodes if kind_of(source) not in _NEUTRAL]
        # an activation is part of the kernel before it
        fused = kind_of(node) in _FUSED and any(kind_of(source) not in VIEWS for source in sources)
        if fused or not all(computed_in_int8(source) for source in sources):
            continue
        settings = readers[0].args[1:]
        for source in sources:
            if source.target is dequantize and source.args[1:] == settings:
                continue
            with graph.inserting_before(node):
                integers = graph.call_function(quantize, (source, *settings))
                values = graph.call_function(dequantize, (integers, *settings))
            values.meta.update(source.meta)
            node.replace_input_with(source, values)
    graph_module.recompile()

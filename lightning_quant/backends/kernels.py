"""What the int8 kernels of this torch compute wrongly on this CPU, found out by asking them.

Each layer with weights is tried on random integers before anything is decided, because what is documented does not
hold. With torch 2.14 on a CPU with VNNI: depthwise convolutions of fbgemm saturate with 8-bit weights, transposed
convolutions of oneDNN exchange input and output channels, and its convolutions are wrong for kernels of 8, 12 or 16.
A layer that is wrong gets another engine, or weights of 7 bits, or stays float: in this order.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant._torch_ao import quantized_modules, quiet
from lightning_quant.config import EngineName, QuantConfig
from lightning_quant.qconfig import CONV_FUNCTIONS, CONV_TRANSPOSE_FUNCTIONS, CONV_TRANSPOSES, CONVS

#: Kernels work on blocks of at most so many channels: with two blocks, the last of which is as full as the layer's own,
#: they behave as with more.
_BLOCK = 64
_MOST_GROUPS = 128

_FLOAT: dict[Any, Any] = {
    nn.Linear: F.linear,
    **dict(zip(CONVS, CONV_FUNCTIONS, strict=True)),
    **dict(zip(CONV_TRANSPOSES, CONV_TRANSPOSE_FUNCTIONS, strict=True)),
}
_INT8: dict[Any, Any] = {kind: getattr(quantized_modules, kind.__name__) for kind in _FLOAT}


@dataclass(frozen=True)
class Layer:
    """What decides which kernel runs a layer with weights, and how. ``options`` are arguments of the function."""

    kind: type[nn.Module]
    inputs: int
    outputs: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def layer_of(module: Any) -> Layer:
    """The layer that ``module`` (of ``torch.nn``, not a subclass) is, with as few channels as show how it behaves."""
    if type(module) is nn.Linear:
        inputs, outputs = _few(module.in_features, module.out_features)
        return Layer(nn.Linear, inputs, outputs)
    groups = module.groups
    inputs, outputs = _few(module.in_channels // groups, module.out_channels // groups)
    groups = min(groups, _MOST_GROUPS)
    names = ("stride", "padding", "dilation", *(("output_padding",) if type(module) in CONV_TRANSPOSES else ()))
    options = tuple((name, getattr(module, name)) for name in names)
    return Layer(type(module), inputs * groups, outputs * groups, groups, tuple(module.kernel_size), options)


def _few(inputs: int, outputs: int) -> tuple[int, int]:
    few = [n if n <= 2 * _BLOCK else _BLOCK + (n % _BLOCK or _BLOCK) for n in (inputs, outputs)]
    # kernels that exchange inputs and outputs are right where there are as many of both
    return (few[0], few[1]) if few[0] != few[1] or inputs == outputs else (few[0], few[1] - 16)


@functools.cache
def is_right(engine: str, layer: Layer, largest: int) -> bool:
    """Whether the int8 kernel of ``engine`` gives what the float layer gives, rounded, for random integers.

    Args:
        engine: Of ``torch.backends.quantized.supported_engines``.
        layer: From :func:`layer_of`.
        largest: Integers of weights are from ``-largest`` to ``largest``.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            # some kernels are wrong only for data of some size, or where 0 is not the integer 0
            trials = ((0, 3, False), (117, 10, False), (117, 20, True))
            return all(_worst_error(layer, largest, *trial) < 1.5 for trial in trials)
    except RuntimeError:  # this engine has no kernel for it
        return False
    finally:
        torch.backends.quantized.engine = before


def _worst_error(layer: Layer, largest: int, zero: int, size: int, one_column: bool) -> float:
    """The largest difference between int8 and float, in steps of the output's scale.

    Args:
        layer: What is run.
        largest: Integers of weights are from ``-largest`` to ``largest``.
        zero: The integer that stands for 0 in the input.
        size: How much larger than the kernel the input is, in each dimension.
        one_column: The input is only as wide as gives one column of output.
    """
    transposed = layer.kind in CONV_TRANSPOSES
    if layer.kind is nn.Linear:
        x = torch.randint(0, 256, (4, layer.inputs))
        shape: tuple[int, ...] = (layer.outputs, layer.inputs)
    else:
        options = dict(layer.options)
        lengths = [d * (k - 1) + size for d, k in zip(options["dilation"], layer.kernel, strict=True)]
        if one_column and isinstance(options["padding"], tuple) and not transposed:
            lengths[-1] = max(1, lengths[-1] - size + 1 - 2 * options["padding"][-1])
        x = torch.randint(0, 256, (2, layer.inputs, *lengths))
        first, second = (layer.inputs, layer.outputs) if transposed else (layer.outputs, layer.inputs)
        shape = (first, second // layer.groups, *layer.kernel)
    integers = torch.randint(-largest, largest + 1, shape).double()
    if transposed:
        weight = torch.quantize_per_tensor(integers.float() * 0.01, 0.01, 0, torch.qint8)
    else:
        channels = shape[0]
        scales, zeros = torch.full((channels,), 0.01, dtype=torch.double), torch.zeros(channels, dtype=torch.long)
        weight = torch.quantize_per_channel(integers.float() * 0.01, scales, zeros, 0, torch.qint8)
    options = {} if layer.kind is nn.Linear else {**dict(layer.options), "groups": layer.groups}
    expected = _FLOAT[layer.kind]((x.double() - zero) * 0.02, integers * 0.01, None, **options)
    low, high = min(float(expected.min()), 0.0), max(float(expected.max()), 0.0)
    scale = max((high - low) / 255, 1e-3)
    zero_point = min(max(round(-low / scale), 0), 255)
    module: Any
    if layer.kind is nn.Linear:
        module = quantized_modules.Linear(layer.inputs, layer.outputs)
    else:
        module = _INT8[layer.kind](layer.inputs, layer.outputs, layer.kernel, **options)
    module.set_weight_bias(weight, torch.zeros(layer.outputs))
    module.scale, module.zero_point = scale, zero_point
    found = module(torch.quantize_per_tensor((x.float() - zero) * 0.02, 0.02, zero, torch.quint8)).dequantize()
    return float((found - expected).abs().max()) / scale


@dataclass(frozen=True)
class Plan:
    """Which engine runs a graph, the layers that need weights of 7 bits there, and those that have to stay float."""

    engine: str
    narrow: frozenset[str]
    float_layers: dict[str, str]


def plan(graph_module: fx.GraphModule, config: QuantConfig, largest: int, skip: Collection[str]) -> Plan:
    """Ask the kernels about every layer of a traced graph.

    Args:
        graph_module: Traced.
        config: Resolved. ``x86`` stands for a choice between ``onednn`` and ``fbgemm``, so that it may become the
            latter; an engine that was asked for by its own name stays.
        largest: Integers of weights are from ``-largest`` to ``largest``.
        skip: Layers that stay float anyway.
    """
    layers = {
        str(node.target): layer_of(graph_module.get_submodule(str(node.target)))
        for node in graph_module.graph.nodes
        if node.op == "call_module"
        and type(graph_module.get_submodule(str(node.target))) in _FLOAT
        and str(node.target) not in skip
    }
    return plan_layers(layers, config, largest)


def plan_modules(model: nn.Module, config: QuantConfig, largest: int, skip: Collection[str]) -> Plan:
    """As :func:`plan`, for a model of which there is no graph."""
    layers = {name: layer_of(part) for name, part in model.named_modules() if type(part) in _FLOAT and name not in skip}
    return plan_layers(layers, config, largest)


def plan_layers(layers: dict[str, Layer], config: QuantConfig, largest: int) -> Plan:
    """As :func:`plan`, for these layers."""
    plans = []
    for engine in (config.engine, *(("fbgemm",) if config.engine == "x86" else ())):
        wrong = {name for name, layer in layers.items() if not is_right(engine, layer, largest)}
        narrow = {name for name in wrong if largest > 63 and is_right(engine, layers[name], 63)}
        reason = f"the int8 kernel of engine {engine!r} for it is wrong on this CPU with torch {torch.__version__}"
        plans.append(Plan(engine, frozenset(narrow), dict.fromkeys(sorted(wrong - narrow), reason)))
        if not wrong - narrow:
            break
    return min(plans, key=lambda plan: len(plan.float_layers))


def with_engine(config: QuantConfig, plan: Plan) -> QuantConfig:
    """``config`` with the engine of ``plan``."""
    return config if config.engine == plan.engine else replace(config, engine=cast(EngineName, plan.engine))

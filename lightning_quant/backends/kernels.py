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
    options = {name: getattr(module, name) for name in names}
    kernel = tuple(module.kernel_size)
    options["dilation"] = plain_dilation(kernel, module.dilation, module.stride, options.get("output_padding"))
    return Layer(type(module), inputs * groups, outputs * groups, groups, kernel, tuple(options.items()))


def plain_dilation(
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    output_padding: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """The dilation of a convolution, with 1 for the dimensions in which its kernel has one entry.

    There it says nothing, and oneDNN reads outside of its memory where such a layer is padded and has a stride. But a
    transposed convolution may owe it the output padding that it has, which must be less than stride or dilation.
    """
    more = output_padding or (0,) * len(kernel)
    return tuple(
        1 if k == 1 and extra < s else d for k, d, s, extra in zip(kernel, dilation, stride, more, strict=True)
    )


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
            weight = _random_weight(layer, largest)
            return all(_worst_error(layer, weight, trial) < 1.5 for trial in _TRIALS)
    except RuntimeError:  # this engine has no kernel for it
        return False
    finally:
        torch.backends.quantized.engine = before


@dataclass(frozen=True)
class _Trial:
    """One input.

    Attributes:
        zero: The integer that stands for 0 in it.
        batch: Its first dimension.
        larger: How much larger than the kernel it is, in each dimension.
        outputs: If not None, it is instead as large as gives so many outputs.
        last: ``outputs`` holds for the last dimension only.
    """

    zero: int
    batch: int = 2
    larger: int = 3
    outputs: int | None = None
    last: bool = False


#: Some kernels are wrong only for data of some size, or where 0 is not the integer 0. With one output per dimension
#: and two, oneDNN's kernels for AMX are others than with three.
_TRIALS = (
    _Trial(0),
    _Trial(117, larger=10),
    _Trial(117, larger=20, outputs=1, last=True),
    _Trial(117, batch=1, outputs=1),
    _Trial(117, batch=4, outputs=1),
    _Trial(117, batch=4, outputs=2),
)


def _lengths(layer: Layer, trial: _Trial) -> list[int]:
    """The size of the input in each dimension."""
    options = dict(layer.options)
    reach = [d * (k - 1) for d, k in zip(options["dilation"], layer.kernel, strict=True)]
    if not isinstance(options["padding"], tuple):
        return [r + trial.larger for r in reach]
    sides = list(zip(reach, options["stride"], options["padding"], strict=True))
    if layer.kind in CONV_TRANSPOSES:
        # the smallest inputs of which padding leaves an output; few inputs are what is asked, as each has many outputs
        least = [1 - (r + o - 2 * p) // s for (r, s, p), o in zip(sides, options["output_padding"], strict=True)]
        wanted = (
            [r + trial.larger for r in reach] if trial.outputs is None or trial.last else [trial.outputs] * len(reach)
        )
        return [max(pair) for pair in zip(wanted, least, strict=True)]
    lengths = [r + trial.larger for r in reach]
    if trial.outputs is not None:
        few = [max(1, r + 1 + (trial.outputs - 1) * s - 2 * p) for r, s, p in sides]
        lengths = [*lengths[:-1], few[-1]] if trial.last else few
    return lengths


def _random_weight(layer: Layer, largest: int) -> torch.Tensor:
    """A qint8 weight of the layer with integers from ``-largest`` to ``largest``."""
    transposed = layer.kind in CONV_TRANSPOSES
    first, second = (layer.inputs, layer.outputs) if transposed else (layer.outputs, layer.inputs)
    shape = (first, second // layer.groups, *layer.kernel)
    values = torch.randint(-largest, largest + 1, shape).float() * 0.01
    if transposed:
        return torch.quantize_per_tensor(values, 0.01, 0, torch.qint8)
    scales, zeros = torch.full((first,), 0.01, dtype=torch.double), torch.zeros(first, dtype=torch.long)
    return torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)


def _worst_error(layer: Layer, weight: torch.Tensor, trial: _Trial) -> float:
    """The largest difference between int8 and float, in steps of the output's scale.

    Args:
        layer: What is run.
        weight: From :func:`_random_weight`.
        trial: On which input.
    """
    zero = trial.zero
    if layer.kind is nn.Linear:
        x = torch.randint(0, 256, (4 if trial.outputs is None else trial.batch, layer.inputs))
    else:
        x = torch.randint(0, 256, (trial.batch, layer.inputs, *_lengths(layer, trial)))
    options = {} if layer.kind is nn.Linear else {**dict(layer.options), "groups": layer.groups}
    expected = _FLOAT[layer.kind]((x.double() - zero) * 0.02, weight.int_repr().double() * 0.01, None, **options)
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

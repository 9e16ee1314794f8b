"""A convolution, a ReLU and a linear layer in integers, by NumPy, from the qparams of a converted model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant.backends.float_results import LinearToFloat


class Small(nn.Module):
    """Takes ``(N, 2, 6, 6)``, gives ``(N, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


@dataclass(frozen=True)
class Layer:
    """Integers and scales of one layer.

    Attributes:
        weight: ``(out, ...)`` integers.
        weight_scale: ``(out,)``.
        bias: ``(out,)`` floats.
        scale: Of the output; None: it stays float.
        zero_point: Of the output.
    """

    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray
    scale: float | None
    zero_point: int | None


@dataclass(frozen=True)
class Integers:
    """The whole network."""

    input_scale: float
    input_zero_point: int
    conv: Layer
    fc: Layer


def _round(values: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """``quint8`` integers, half to even as everywhere in torch."""
    return np.clip(np.rint(values / scale) + zero_point, 0, 255)


def run(net: Integers, x: np.ndarray) -> np.ndarray:
    """The network in exact arithmetic on integers; the output dequantized, ``(N, 3)``."""
    q = _round(x.astype(np.float64), net.input_scale, net.input_zero_point) - net.input_zero_point
    columns = np.stack([q[:, :, i : i + 3, j : j + 3] for i in (0, 2) for j in (0, 2)], 1)  # (N, place, C, 3, 3)
    sums = np.einsum("npcij,ocij->nop", columns, net.conv.weight)
    scale = net.input_scale * net.conv.weight_scale
    y = np.maximum(sums * scale[None, :, None] + net.conv.bias[None, :, None], 0)
    hidden = _round(y, net.conv.scale, net.conv.zero_point) - net.conv.zero_point
    sums = hidden.reshape(len(x), -1) @ net.fc.weight.T
    out = sums * (net.conv.scale * net.fc.weight_scale) + net.fc.bias
    if net.fc.scale is None:
        return out
    return (_round(out, net.fc.scale, net.fc.zero_point) - net.fc.zero_point) * net.fc.scale


def _layer(weight: torch.Tensor, bias: torch.Tensor, scale: float | None, zero_point: int) -> Layer:
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scales = weight.q_per_channel_scales() if per_channel else torch.full((len(weight),), weight.q_scale())
    # the neutral form stores scales in float32
    return Layer(
        weight.int_repr().numpy().astype(np.int64),
        scales.numpy().astype(np.float64),
        bias.detach().numpy().astype(np.float64),
        None if scale is None else float(scale),
        None if scale is None else int(zero_point),
    )


def of_modules(converted: nn.Module) -> Integers:
    """Of a model whose layers are torch.ao's int8 modules (FX graph mode, eager mode)."""
    layers = [m for m in converted.modules() if callable(getattr(m, "weight", None)) and hasattr(m, "zero_point")]
    conv, fc = (
        _layer(m.weight(), m.bias(), None if isinstance(m, LinearToFloat) else m.scale, m.zero_point) for m in layers
    )
    scale, zero_point = _first_quantize(converted)
    return Integers(scale, zero_point, conv, fc)


def _first_quantize(converted: nn.Module) -> tuple[float, int]:
    for module in converted.modules():
        if type(module).__name__ == "Quantize":
            return float(module.scale), int(module.zero_point)
    assert isinstance(converted, fx.GraphModule)
    node = next(n for n in converted.graph.nodes if n.target is torch.quantize_per_tensor)
    scale, zero_point = (getattr(converted, str(n.target)) for n in node.args[1:3])
    return float(scale), int(zero_point)


def of_script(script: torch.jit.ScriptModule) -> Integers:
    """Of a frozen TorchScript program of int8 operators."""
    found: list[Any] = []
    first: tuple[float, int] | None = None
    for node in script.inlined_graph.nodes():
        inputs = list(node.inputs())
        if node.kind() == "aten::quantize_per_tensor" and first is None:
            first = float(_value(inputs[1])), int(_value(inputs[2]))
        elif node.kind().startswith(("quantized::conv2d", "quantized::linear")) and "prepack" not in node.kind():
            weight, bias = _value(inputs[1]).unpack()
            found.append(_layer(weight, bias, _value(inputs[2]), _value(inputs[3])))
    assert first is not None
    return Integers(*first, *found)


def _value(value: Any) -> Any:
    constant = value.toIValue()
    assert constant is not None, f"{value.debugName()} is no constant"
    return constant


def of_qdq(program: fx.GraphModule) -> Integers:
    """Of a program with quantize and dequantize operators around float arithmetic."""
    nodes = [n for n in program.graph.nodes if any(w in str(n.target) for w in ("conv2d", "linear"))]
    inputs = [_read_with(node.args[0]) for node in nodes]
    outputs: list[Any] = [*inputs[1:], (None, None)]  # nothing reads the last one in int8
    layers = []
    for node, (scale, zero_point) in zip(nodes, outputs, strict=True):
        weight, scales = (_attribute(program, n) for n in node.args[1].args[:2])
        bias = _attribute(program, node.args[2])
        layers.append(
            Layer(
                weight.numpy().astype(np.int64),
                scales.numpy().astype(np.float64),
                bias.detach().numpy().astype(np.float64),
                scale,
                zero_point,
            )
        )
    return Integers(*inputs[0], *layers)


def _read_with(node: Any) -> tuple[float, int]:
    """Scale and zero point of the operator that dequantized what ``node`` gives, moved or not."""
    while "dequantize_per_tensor" not in str(node.target):
        node = node.args[0]
    return float(node.args[1]), int(node.args[2])


def _attribute(program: fx.GraphModule, node: Any) -> Any:
    value: Any = program
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value

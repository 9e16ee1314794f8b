"""Layers of a reference graph with their weight stored in int8, as files have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# registers torch.ops.quantized_decomposed, of which reference graphs are made
from lightning_quant._torch_ao import reference_modules

_OPS = torch.ops.quantized_decomposed
_FUNCTIONS: dict[type[nn.Module], Any] = {
    reference_modules.Linear: F.linear,
    reference_modules.Conv1d: F.conv1d,
    reference_modules.Conv2d: F.conv2d,
    reference_modules.Conv3d: F.conv3d,
    reference_modules.ConvTranspose1d: F.conv_transpose1d,
    reference_modules.ConvTranspose2d: F.conv_transpose2d,
    reference_modules.ConvTranspose3d: F.conv_transpose3d,
}


class Int8Weight(nn.Module):
    """A linear or (transposed) convolution whose weight is stored in int8: ``w = (q - zero_point) * scale``.

    Attributes:
        weight: int8, the layout of the float layer's weight.
        scale: float32, ``(channels,)``, one for each index of ``axis``. Not there if the weight has one scale.
        zero_point: int64, shaped like ``scale``. Not there if the weight has one scale.
        scalars: ``(scale, zero_point)`` of a weight that has one scale, else None.
        after: What is fused with the layer, a ReLU; or nothing.
    """

    def __init__(self, layer: Any, after: nn.Module | None = None) -> None:
        super().__init__()
        self.after = after
        self.function = _FUNCTIONS[type(layer)]
        self.register_buffer("weight", layer.get_quantized_weight().detach())
        per_channel = layer.weight_qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
        self.axis: int | None = layer.weight_axis_int if per_channel else None
        self.scalars: tuple[float, int] | None = None
        if per_channel:
            self.register_buffer("scale", layer.weight_scale.detach().float())
            self.register_buffer("zero_point", layer.weight_zero_point.detach().long())
        else:
            # numbers, not tensors: the ONNX exporter takes only those for one scale per tensor
            self.scalars = (float(layer.weight_scale), int(layer.weight_zero_point))
        bias = getattr(layer, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.arguments = _call_arguments(layer)
        self.pad = list(layer._reversed_padding_repeated_twice) if _pads_itself(layer) else []
        self.padding_mode = getattr(layer, "padding_mode", "zeros")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on ``x`` with the dequantized weight."""
        return self.compute(x, self.dequantized())

    def dequantized(self) -> torch.Tensor:
        """What the integers of the weight stand for, float32."""
        weight: torch.Tensor
        if self.scalars is not None:
            weight = _OPS.dequantize_per_tensor.default(self.weight, *self.scalars, -128, 127, torch.int8)
        else:
            weight = _OPS.dequantize_per_channel(
                self.weight, self.scale, self.zero_point, self.axis, -128, 127, torch.int8
            )
        return weight

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer on ``x`` with another weight of the same shape, such as the float one."""
        result = self.before_activation(x, weight)
        return result if self.after is None else self.after(result)

    def before_activation(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As :meth:`compute`, without what is fused with the layer."""
        if self.pad:
            x = F.pad(x, self.pad, mode=self.padding_mode)
        result: torch.Tensor = self.function(x, weight, self.bias, **self.arguments)
        return result

    def extra_repr(self) -> str:
        """The function's name and the weight's shape."""
        return f"{self.function.__name__}, weight={tuple(self.get_buffer('weight').shape)}"


def _pads_itself(layer: Any) -> bool:
    return getattr(layer, "padding_mode", "zeros") != "zeros"


def _call_arguments(layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {}
    names = ["stride", "padding", "dilation", "groups"]
    if getattr(layer, "transposed", False):
        names.append("output_padding")
    arguments = {name: getattr(layer, name) for name in names}
    if _pads_itself(layer):
        arguments["padding"] = 0
    return arguments


def int8_weight(module: nn.Module) -> Int8Weight | None:
    """A layer of a reference graph, and what is fused with it, with its weight in int8; None: it has none."""
    # the name of what is fused is that of its layer
    fused = list(module) if isinstance(module, nn.Sequential) else [module]
    if not fused or type(fused[0]) not in _FUNCTIONS:
        return None
    return Int8Weight(fused[0], nn.Sequential(*fused[1:]) if len(fused) > 1 else None)

"""The offset of LSQ+ beside a learned scale (Bhalgat et al. 2020, https://arxiv.org/abs/2004.09576).

The paper rounds ``(x - offset) / scale``, with a real offset. Integers have a whole zero point, and zero has to be
exact (padding is 0): here the zero point is ``round(-offset / scale)``, in training as in int8, and its rounding is
passed straight through by the gradient. The offset is kept where its zero point is one of the integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def has_offset(module: Any) -> bool:
    """Whether a learned fake quantize has a trained offset."""
    return "offset" in module._parameters


def trained(module: Any) -> dict[str, nn.Parameter]:
    """What optimizers train of a learned fake quantize: name -> Parameter."""
    return {name: module._parameters[name] for name in ("scale", "offset") if name in module._parameters}


def zero_point_of(module: Any, offset: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``round(-offset / scale)`` within the integers, float32."""
    observer = module.activation_post_process
    return torch.round(-offset / scale).clamp(observer.quant_min, observer.quant_max)


def held(module: Any, scale: torch.Tensor) -> torch.Tensor:
    """The offset, where its zero point is one of the integers: else its gradient would lead nowhere."""
    observer = module.activation_post_process
    return torch.clamp(module.offset.detach(), -observer.quant_max * scale, -observer.quant_min * scale)


def begin(module: Any) -> None:
    """Let the offset be that of scale and zero point as they are, if there is one."""
    if has_offset(module):
        offset = -module.zero_point.to(torch.float32) * module.scale.detach()
        if module.offset.shape == offset.shape:
            module.offset.data.copy_(offset)
        else:
            module.offset.data = offset


def hold(module: Any) -> None:
    """Move offset and zero point to where they may be, beside the scale as it is. Nothing where there is none."""
    if has_offset(module):
        scale = module.scale.detach()
        module.offset.data.copy_(held(module, scale))
        module.zero_point.copy_(zero_point_of(module, module.offset.detach(), scale))


def of_three_deviations(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(low, high)``, three standard deviations around the mean of a weight or of each channel."""
    wide = x.detach().to(torch.float32)
    if module.is_per_channel:
        axis = module.ch_axis % x.dim()
        wide = wide.movedim(axis, 0).reshape(x.shape[axis], -1)
    else:
        wide = wide.reshape(1, -1)
    mean, deviation = wide.mean(1), wide.std(1, correction=0)
    return mean - 3 * deviation, mean + 3 * deviation


class Rounded(torch.autograd.Function):
    """``(clamp(round(x / scale) + z, least, most) - z) * scale`` with ``z = round(-offset / scale)``.

    Its gradients are those that follow if every ``round`` has a derivative of 1: of a value inside of the range 1 by
    ``x`` and what was rounded away by the scale; of one outside 1 by the offset, and the integer at that end by the
    scale, as in LSQ+, with what was rounded of the zero point. Those of scale and offset are multiplied
    by ``factor``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, least: int, most: int, factor: float
    ) -> torch.Tensor:
        """``scale`` and ``offset`` in a shape that multiplies ``x``; all float32."""
        zero_point = torch.round(-offset / scale).clamp(least, most)
        ctx.save_for_backward(x, scale, offset, zero_point)
        ctx.settings = least, most, factor
        return torch.round(x * (1 / scale)).clamp(least - zero_point, most - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        """See the class."""
        x, scale, offset, zero_point = ctx.saved_tensors
        least, most, factor = ctx.settings
        steps = x * (1 / scale)
        whole = torch.round(steps)
        kept = whole.clamp(least - zero_point, most - zero_point)
        inside = whole == kept
        share = torch.where(inside, whole - steps, kept - offset / scale)
        of_scale = (gradient * share).sum_to_size(scale.shape) * factor
        of_offset = torch.where(inside, 0.0, gradient).sum_to_size(offset.shape) * factor
        return torch.where(inside, gradient, 0.0), of_scale, of_offset, None, None, None

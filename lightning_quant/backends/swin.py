"""torchvision's shifted window attention written out: its two projections are linear layers that a trace sees.

torchvision hides the whole of it from a trace, because it computes with sizes. What it computes with sizes is in three
functions here that stay float: to windows, attention inside of them, and back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F


def shifted_window_attention(self: Any, x: Any) -> Any:
    """``forward`` of ``ShiftedWindowAttention`` and ``ShiftedWindowAttentionV2``, ``(batch, height, width, c)``."""
    logit_scale = getattr(self, "logit_scale", None)
    bias = self.qkv.bias
    if logit_scale is not None and bias is not None:
        bias = without_key_bias(bias)
    relative = self.get_relative_position_bias()
    size, shift = tuple(self.window_size), tuple(self.shift_size)
    qkv = F.linear(to_windows(x, size, shift), self.qkv.weight, bias)
    mixed = attend_in_windows(
        qkv, x, relative, size, shift, self.num_heads, logit_scale, self.attention_dropout, self.training
    )
    projected = F.linear(mixed, self.proj.weight, self.proj.bias)
    return F.dropout(from_windows(projected, x, size, shift), p=self.dropout, training=self.training)


@torch.fx.wrap
def without_key_bias(bias: torch.Tensor) -> torch.Tensor:
    """The bias of query, key and value with that of the key set to 0, ``(3 * c,)``."""
    third = bias.numel() // 3
    return torch.cat([bias[:third], torch.zeros_like(bias[:third]), bias[2 * third :]])


def _padded(x: torch.Tensor, size: tuple[int, ...]) -> tuple[int, int]:
    height, width = x.shape[1], x.shape[2]
    return height + (-height) % size[0], width + (-width) % size[1]


def _shift(padded: tuple[int, int], size: tuple[int, ...], shift: tuple[int, ...]) -> tuple[int, int]:
    """A window as large as the image needs no shift."""
    return (0 if size[0] >= padded[0] else shift[0], 0 if size[1] >= padded[1] else shift[1])


@torch.fx.wrap
def to_windows(x: torch.Tensor, size: tuple[int, ...], shift: tuple[int, ...]) -> torch.Tensor:
    """``(batch, height, width, c)`` -> ``(batch * windows, positions, c)``, padded with zeros and shifted."""
    height, width = _padded(x, size)
    down, right = _shift((height, width), size, shift)
    x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    if down or right:
        x = torch.roll(x, shifts=(-down, -right), dims=(1, 2))
    x = x.reshape(x.shape[0], height // size[0], size[0], width // size[1], size[1], x.shape[3])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size[0] * size[1], x.shape[5])


@torch.fx.wrap
def from_windows(windows: torch.Tensor, x: torch.Tensor, size: tuple[int, ...], shift: tuple[int, ...]) -> torch.Tensor:
    """The reverse of :func:`to_windows`, for the ``x`` that it was given."""
    batch, original_height, original_width = x.shape[:3]
    height, width = _padded(x, size)
    down, right = _shift((height, width), size, shift)
    y = windows.reshape(batch, height // size[0], width // size[1], size[0], size[1], windows.shape[-1])
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, windows.shape[-1])
    if down or right:
        y = torch.roll(y, shifts=(down, right), dims=(1, 2))
    return y[:, :original_height, :original_width, :].contiguous()


@torch.fx.wrap
def attend_in_windows(
    qkv: torch.Tensor,
    x: torch.Tensor,
    relative: torch.Tensor,
    size: tuple[int, ...],
    shift: tuple[int, ...],
    heads: int,
    logit_scale: torch.Tensor | None,
    dropout: float,
    training: bool,
) -> torch.Tensor:
    """Attention of each window's positions to each other.

    Args:
        qkv: ``(batch * windows, positions, 3 * c)``.
        x: What the windows were made from.
        relative: Added to the scores, ``(1, heads, positions, positions)``.
        size: Of a window.
        shift: Of the windows.
        heads: Divides ``c``.
        logit_scale: ``(heads, 1, 1)`` for cosine attention, else None.
        dropout: Share of the weights that are dropped in training.
        training: Whether they are.
    """
    count, positions, _ = qkv.shape
    q, k, v = qkv.reshape(count, positions, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if logit_scale is not None:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    scores = scores + relative
    padded = _padded(x, size)
    down, right = _shift(padded, size, shift)
    if down or right:
        region = x.new_zeros(padded)
        number = 0
        for rows in ((0, -size[0]), (-size[0], -down), (-down, None)):
            for columns in ((0, -size[1]), (-size[1], -right), (-right, None)):
                region[rows[0] : rows[1], columns[0] : columns[1]] = number
                number += 1
        region = region.reshape(padded[0] // size[0], size[0], padded[1] // size[1], size[1])
        region = region.permute(0, 2, 1, 3).reshape(-1, positions)
        apart = (region.unsqueeze(1) - region.unsqueeze(2)) != 0
        mask = torch.zeros_like(apart, dtype=scores.dtype).masked_fill(apart, -100.0)
        scores = scores.reshape(-1, mask.shape[0], heads, positions, positions) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.reshape(-1, heads, positions, positions)
    weights = F.dropout(torch.softmax(scores, dim=-1), p=dropout, training=training)
    return (weights @ v).transpose(1, 2).reshape(count, positions, -1)

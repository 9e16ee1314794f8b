"""A fake quantize whose scale is trained: LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153).

The scale begins with what the first pass that trains shows, and is a Parameter from then on, which no observer moves;
the zero point stays what it was then, or is trained with it (:mod:`lightning_quant.learned_offset`). Without
that, values and gradients are those of torch's operators ``_fake_quantize_learnable_per_tensor_affine`` and
``_fake_quantize_learnable_per_channel_affine``; the gradient of the scale is multiplied by :func:`gradient_factor`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_quant import fake_quantize as following
from lightning_quant import learned_offset
from lightning_quant.fake_quantize import FakeQuantize

#: The largest factor by which a scale changes between two passes. What is clipped by a scale that is a little too
#: small has a gradient up to 255 times that of what is rounded by one that is too large: at 8 bits a learning rate that
#: suits weights throws scales about, and through 0. LSQ's authors train 8 bits with a hundredth of it (section 3).
LARGEST_STEP = 1.1


class LearnedFakeQuantize(FakeQuantize):
    """Torch's, with its names of buffers, where ``scale`` is a Parameter; see the module's docstring.

    Args:
        sees_weights: What comes in is a weight, whose first dimension is not that of a batch.
        with_offset: As LSQ+ has it: the zero point is trained, if there is one, and a weight begins by its deviation.
    """

    sees_weights: bool
    begins_by_deviation: bool

    def __init__(self, *args: Any, sees_weights: bool = False, with_offset: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        complete(self, sees_weights, with_offset)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """``X`` of any shape and float dtype; rounded to the grid if that is on."""
        return fake_quantize(self, X)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """``(scale, zero_point)`` as they were learned."""
        return qparams(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with resizable(self, state_dict, prefix):
            super()._load_from_state_dict(state_dict, prefix, *args)


def complete(module: Any, sees_weights: bool, with_offset: bool) -> None:
    """Give a ``FakeQuantize`` of torch.ao or torchao what :func:`fake_quantize` reads, and a Parameter as its scale."""
    module.sees_weights = sees_weights
    module.begins_by_deviation = sees_weights and with_offset
    scale = module._buffers.pop("scale")
    module.register_parameter("scale", nn.Parameter(scale.detach().clone()))
    if with_offset and not module.is_symmetric:
        module.register_parameter("offset", nn.Parameter(torch.zeros_like(scale)))
    module.register_buffer("learned", torch.zeros(1, dtype=torch.uint8))
    module.register_buffer("scale_before", scale.detach().clone())


@contextlib.contextmanager
def resizable(module: Any, state_dict: dict[str, Any], prefix: str) -> Iterator[None]:
    """Scales of a state can be loaded, however many there are."""
    stored = state_dict.get(f"{prefix}scale_before")
    if stored is not None:
        module.scale_before.resize_(stored.shape)
        if learned_offset.has_offset(module) and module.offset.shape != stored.shape:
            module.offset.data = torch.zeros_like(stored, device=module.offset.device)
    with following.resizable(module):
        yield


def is_learned(module: object) -> bool:
    """Whether ``module`` computes with :func:`fake_quantize` of this file."""
    return following.is_ours(module) and hasattr(module, "sees_weights")


def gradient_factor(module: Any, x: torch.Tensor) -> float:
    """``1 / sqrt(N * Q_P)``, by which the gradient of a scale is multiplied (Esser et al. 2020, section 2.2).

    ``N`` is the number of elements of a weight that have this scale, or of features of one sample of an activation:
    its first dimension is that of the batch. ``Q_P`` is the number of steps above zero: 127 for symmetric int8, 255 for
    a range with a zero point, which may be all above it.

    >>> fake_quantize = LearnedFakeQuantize(quant_min=0, quant_max=255, dtype=torch.quint8)
    >>> gradient_factor(fake_quantize, torch.zeros(32, 10)) == 1 / (10 * 255) ** 0.5
    True
    """
    observer = module.activation_post_process
    if module.sees_weights:
        elements = x.numel() // (x.shape[module.ch_axis] if module.is_per_channel else 1)
    else:
        elements = x.numel() // (x.shape[0] if x.dim() > 0 else 1)
    least = following.middle(observer) if module.is_symmetric else observer.quant_min
    return 1 / math.sqrt(elements * (observer.quant_max - least))


def fake_quantize(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Clamp ``x``, and round it with the learned scale if ``module.fake_quant_enabled``.

    Until a pass that trains (gradients, rounding and observing are on, and the scale requires a gradient) has shown
    what comes in, scale and zero point are set at each pass that observes, and the scale has no gradient.

    Args:
        module: A ``FakeQuantize`` of torch.ao or torchao, with what :func:`complete` gives it.
        x: Of any shape; with a scale per channel, the dimension ``module.ch_axis`` has the channels.

    Returns:
        ``(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``, of the shape, dtype and
        device of ``x``; the clamped ``x`` if rounding is off. The gradient of ``x`` is that of the straight-through
        estimator, in float32. A scale that an optimizer moved by more than ``LARGEST_STEP`` since the last pass, to
        0 or through it maybe, is set to what it may be.
    """
    if not torch.compiler.is_compiling():
        return _eagerly(module, x)
    return _in_a_graph(module, x) if module.sharing.calls_per_forward == 1 else _between_graphs(module, x)


@torch.compiler.disable
def _between_graphs(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _eagerly(module, x)


def _eagerly(module: Any, x: torch.Tensor) -> torch.Tensor:
    observing, rounding = (following.is_on(module, name) for name in ("observer_enabled", "fake_quant_enabled"))
    x = following.clamped(module, x)
    if not (observing or rounding) or x.numel() == 0:
        return x
    if not following.is_on(module, "learned"):
        return _first_passes(module, x, observing, rounding)
    if not rounding:
        return x
    with torch.no_grad():
        # not seen by autograd: a scale that several tensors share is in the graph of this pass already
        module.scale.data.copy_(_held(module))
        module.scale_before.copy_(module.scale)
        learned_offset.hold(module)
    return _rounded(module, x, module.scale, module._parameters.get("offset"))


def _first_passes(module: Any, x: torch.Tensor, observing: bool, rounding: bool) -> torch.Tensor:
    """Follow the observer; the scale is learned from the next pass on if this one trains."""
    with torch.no_grad():
        if observing and module.sharing.calls_per_forward > 1:
            following.observe_shared(module, x.detach(), module.sharing)
        elif observing:
            following.keep_range(module, *following.followed(module, *following.range_of(module, x.detach())))
        if observing:
            following.keep_qparams(module, *_begun(module, x))
            module.scale_before.resize_(module.scale.shape).copy_(module.scale)
            learned_offset.begin(module)
    if not rounding:
        return x
    # the next tensor that shares it changes the scale in place
    y = _rounded(module, x, module.scale.detach().clone())
    if observing and _trains(module) and module.sharing.calls == 0:
        alive = _alive(module)
        if bool(alive.any()):
            with torch.no_grad():
                module.scale.copy_(_with_all_alive(module.scale, alive))
                module.scale_before.copy_(module.scale)
                learned_offset.begin(module)
            module.learned.fill_(1)
    return y


def _held(module: Any) -> torch.Tensor:
    """The scale, near to what it was in the last pass: positive therefore."""
    before = module.scale_before
    least = (before / LARGEST_STEP).clamp(min=module.activation_post_process.eps)
    return torch.clamp(module.scale.detach(), least, before * LARGEST_STEP)


def _trains(module: Any) -> bool:
    return bool(torch.is_grad_enabled() and module.scale.requires_grad)


def _begun(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where scale and zero point begin: at the range; or at ``2 * mean(|x|) / sqrt(Q_P)``.

    The latter is section 2.1 of Esser et al. For symmetric weights of 8 bits it is several times wider than min and
    max, and leaves them room to grow. Accuracy of int8, small CNN on digits, six epochs of SGD with a rate of 0.05,
    mean of three seeds: 0.951 from there and 0.929 from min and max; without ``LARGEST_STEP`` 0.943 and 0.896.
    Activations of fewer than 8 bits begin there where it is smaller: most of the 16 steps of a range are where few
    values are.
    """
    scale, zero_point = following.qparams_of_range(module)
    if not module.scale.requires_grad:
        return scale, zero_point
    if not module.sees_weights:
        return _of_few_bits(module, x, scale), zero_point
    if module.begins_by_deviation:
        return _by_deviation(module, x, scale)
    if not module.is_symmetric:
        return scale, zero_point
    observer = module.activation_post_process
    size = x.detach().to(torch.float32).abs()
    if module.is_per_channel:
        axis = module.ch_axis % x.dim()
        size = size.movedim(axis, 0).reshape(x.shape[axis], -1).mean(1)
    else:
        size = size.mean()
    above = observer.quant_max - following.middle(observer)
    return torch.maximum((2 * size / math.sqrt(above)).reshape(scale.shape), observer.eps), zero_point


def _of_few_bits(module: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    observer = module.activation_post_process
    if observer.quant_max - observer.quant_min >= 255 or module.sharing.calls_per_forward > 1:
        return scale
    above = observer.quant_max - (following.middle(observer) if module.is_symmetric else observer.quant_min)
    size = x.detach().to(torch.float32).abs().mean()
    # the zero point stays: as much less of both sides
    return torch.maximum(torch.minimum(scale, 2 * size / math.sqrt(above)), observer.eps)


def _by_deviation(module: Any, x: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As LSQ+ begins: ``max(|mean - 3 std|, |mean + 3 std|) / 2^(bits - 1)``; with a zero point, from end to end."""
    observer = module.activation_post_process
    low, high = (end.reshape(like.shape) for end in learned_offset.of_three_deviations(module, x))
    middle = following.middle(observer)
    if module.is_symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (observer.quant_max - middle + 1)
        return torch.maximum(scale, observer.eps), torch.full_like(scale, middle)
    least, most = observer.quant_min, observer.quant_max
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum((high - low) / float(most - least), observer.eps)
    return scale, (least - torch.round(low / scale)).clamp(least, most)


def _alive(module: Any) -> torch.Tensor:
    """Where there is a range to begin from: not of what is 0 until now, from which no gradient leads away.

    Of the shape of the scale.
    """
    observer = module.activation_post_process
    low, high = observer.min_val, observer.max_val
    return ((low <= high) & (torch.maximum(-low, high) > observer.eps)).reshape(module.scale.shape)


def _with_all_alive(scale: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Give channels of zeros the mean of the others' scales."""
    mean = torch.where(alive, scale, 0.0).sum() / alive.sum()
    return torch.where(alive, scale, mean)


def _rounded(module: Any, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    if offset is not None:
        return _written_out(module, x, scale, offset)
    observer = module.activation_post_process
    zero_point = module.zero_point.to(torch.float32)
    settings = observer.quant_min, observer.quant_max, gradient_factor(module, x)
    wide = x.to(torch.float32)
    if module.is_per_channel:
        y = torch._fake_quantize_learnable_per_channel_affine(wide, scale, zero_point, module.ch_axis, *settings)
    else:
        y = torch._fake_quantize_learnable_per_tensor_affine(wide, scale, zero_point, *settings)
    return y.to(x.dtype)


def _written_out(module: Any, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """As :func:`_rounded`, by operators that ``torch.compile`` knows: it cannot follow torch's own."""
    observer = module.activation_post_process
    wide = x.to(torch.float32)
    shape = [1] * x.dim()
    if module.is_per_channel:
        shape[module.ch_axis] = scale.numel()
    y: torch.Tensor
    if offset is not None:
        settings = observer.quant_min, observer.quant_max, gradient_factor(module, x)
        y = learned_offset.Rounded.apply(wide, scale.reshape(shape), offset.reshape(shape), *settings)
        return y.to(x.dtype)
    zero_point = module.zero_point.to(torch.float32).reshape(shape)
    limits = observer.quant_min - zero_point, observer.quant_max - zero_point
    y = _WrittenOut.apply(wide, scale.reshape(shape), *limits, gradient_factor(module, x))
    return y.to(x.dtype)


class _WrittenOut(torch.autograd.Function):
    """``clamp(round(x / scale), low, high) * scale``, with the gradients of torch's ``_fake_quantize_learnable_*``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor, factor: float
    ) -> torch.Tensor:
        """``scale``, ``low`` and ``high`` in a shape that multiplies ``x``."""
        ctx.save_for_backward(x, scale, low, high)
        ctx.factor = factor
        return torch.round(x * (1 / scale)).clamp(low, high) * scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Inside of the range 1 and what was rounded away; outside 0 and the number of steps to the end."""
        x, scale, low, high = ctx.saved_tensors
        steps = x * (1 / scale)
        whole = torch.round(steps)
        kept = whole.clamp(low, high)
        inside = whole == kept
        share = torch.where(inside, whole - steps, kept)
        of_scale = (gradient * share).sum_to_size(scale.shape) * ctx.factor
        return torch.where(inside, gradient, 0.0), of_scale, None, None, None


class _With(torch.autograd.Function):
    """Another value, with the gradient of this one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Both of one shape."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """That of the identity."""
        return gradient, None


def _in_a_graph(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The same without a look at a value, so that ``torch.compile`` can have it in its graph.

    One difference: the scale has its gradient in the first pass already, because a graph gives one or none for good.
    """
    observer = module.activation_post_process
    x = following.clamped(module, x)
    first = (module.learned == 0).reshape(())
    rounding = (module.fake_quant_enabled != 0).reshape(())
    observes = first & (module.observer_enabled != 0).reshape(())
    ends = observes & rounding & _trains(module)
    with torch.no_grad():
        low, high = following.followed(module, *following.range_of(module, x.detach()))
        low, high = torch.where(observes, low, observer.min_val), torch.where(observes, high, observer.max_val)
        following.keep_range(module, low, high)
        scale, zero_point = (value.reshape(module.scale.shape) for value in _begun(module, x))
        scale = torch.where(observes, scale, module.scale)
        zero_point = zero_point.to(module.zero_point.dtype)
        module.zero_point.copy_(torch.where(observes, zero_point, module.zero_point))
        alive = _alive(module)
        ends = ends & alive.any()
        after = _with_all_alive(scale, alive)
        value = torch.where(first, scale, _held(module))
    y = _written_out(module, x, _With.apply(module.scale.clone(), value), _offset_in_a_graph(module, first, value))
    with torch.no_grad():
        after = torch.where(ends, after, value)
        module.scale.copy_(after)
        module.scale_before.copy_(after)
        if learned_offset.has_offset(module):
            begun = -module.zero_point.to(torch.float32) * after
            module.offset.copy_(torch.where(first, begun, learned_offset.held(module, after)))
        module.learned.copy_(torch.where(ends, 1, module.learned))
    return torch.where(rounding, y, x)


def _offset_in_a_graph(module: Any, first: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """The offset for this pass, with the gradient of the Parameter, and its zero point where the module has it."""
    if not learned_offset.has_offset(module):
        return None
    with torch.no_grad():
        value = learned_offset.held(module, scale)
        value = torch.where(first, -module.zero_point.to(torch.float32) * scale, value)
        zero_point = learned_offset.zero_point_of(module, value, scale).to(module.zero_point.dtype)
        module.zero_point.copy_(torch.where(first, module.zero_point, zero_point))
    offset: torch.Tensor = _With.apply(module.offset.clone(), value)
    return offset


def qparams(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``(scale, zero_point)``, float32 and int32, of the shape ``(1,)`` or ``(channels,)``: what conversion reads."""
    if not bool(module.learned):
        return module.scale.detach().clone(), module.zero_point.clone()
    scale = _held(module)
    if not learned_offset.has_offset(module):
        return scale, module.zero_point.clone()
    zero_point = learned_offset.zero_point_of(module, learned_offset.held(module, scale), scale)
    return scale, zero_point.to(module.zero_point.dtype)


def fold(module: object, factor: torch.Tensor) -> None:
    """Let a scale that was learned for a weight be that of the weight times ``factor``.

    With one scale per channel and a symmetric range, ``fq(w, s) * f == fq(w * f, s * abs(f))``; in training such a
    weight is rounded without the batch norm that is folded into it later. Nothing happens to any other module.

    Args:
        module: The fake quantize of the weight. Changed in place.
        factor: ``(channels,)``.
    """
    fake: Any = module
    if is_learned(fake) and bool(fake.learned) and fake.qscheme == torch.per_channel_symmetric:
        with torch.no_grad():
            fake.scale.copy_(qparams(fake)[0] * factor.abs())
            fake.scale_before.copy_(fake.scale)

"""The fake quantize that training runs through: what it observes, how it rounds, and the gradient.

:func:`fake_quantize` works on the buffers of torch.ao's ``FakeQuantize``, and on those of torchao's, which are the
same: one range, moved by an average, from which scale and zero point follow. On the CPU it is one pass for the range,
one for the rounding and one for the gradient, in the kernels of :mod:`lightning_quant.native`; elsewhere, and inside of
``torch.compile``, it is made of torch's operators. Both give the same values.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from lightning_quant import native
from lightning_quant._torch_ao import FakeQuantize as TorchFakeQuantize

UNCLAMPED = (-math.inf, math.inf)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


@dataclass
class Sharing:
    """How many tensors of a graph share a fake quantize, and where in a forward pass it is.

    Such as the inputs and the output of ``torch.cat``. Torch moves the average at every call: of tensors with different
    ranges that gives a mean of their ranges, and clips the wider ones for good. Here the average moves once for each
    forward pass, towards the union of what its calls showed.

    Attributes:
        calls_per_forward: How many tensors share it.
        calls: Calls of this forward pass until now.
        seen: The range that they showed.
        before: The average before this forward pass; None: there was none.
    """

    calls_per_forward: int = 1
    calls: int = 0
    seen: tuple[torch.Tensor, torch.Tensor] | None = None
    before: tuple[torch.Tensor, torch.Tensor] | None = None


class FakeQuantize(TorchFakeQuantize):
    """Torch's, with the same buffers, for a moving average of min and max; see the module's docstring.

    Differences: a range that is not finite moves nothing; scale and zero point follow the range also while it is not
    observed, so that averages of weights (EMA) leave them in agreement; tensors may share one (:class:`Sharing`).
    """

    sharing: Sharing
    clamp: tuple[float, float]
    is_symmetric: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        complete(self)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """``X`` of any shape, float32 or bfloat16 (others with torch's kernels); rounded to the grid if that is on."""
        return fake_quantize(self, X)


def complete(module: Any) -> None:
    """Give a ``FakeQuantize`` of torch.ao or torchao the attributes that :func:`fake_quantize` reads."""
    module.sharing = Sharing()
    #: ``(least, most)``: what comes in is clamped to it first, as by a ReLU; see backends/hiding.py.
    module.clamp = UNCLAMPED
    # a bool beside torch's is_per_channel: what torch.compile compiled for one qscheme it runs for any other
    module.is_symmetric = module.qscheme in _SYMMETRIC


def is_ours(module: object) -> bool:
    """Whether ``module`` computes with :func:`fake_quantize`."""
    return isinstance(getattr(module, "sharing", None), Sharing)


def fake_quantize(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Clamp ``x``, observe it if ``module.observer_enabled``, and round it if ``module.fake_quant_enabled``.

    Args:
        module: A ``FakeQuantize`` of torch.ao or torchao around an observer of a moving average of min and max, with
            what :func:`complete` gives it.
        x: Of any shape; with a scale per channel, the dimension ``module.ch_axis`` has the channels.

    Returns:
        ``(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``, of the shape, dtype and
        device of ``x``, differentiable by the straight-through estimator; the clamped ``x`` if rounding is off.
    """
    if not torch.compiler.is_compiling():
        return _eagerly(module, x)
    return _in_a_graph(module, x) if module.sharing.calls_per_forward == 1 else _between_graphs(module, x)


@torch.compiler.disable
def _between_graphs(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _eagerly(module, x)


def _eagerly(module: Any, x: torch.Tensor) -> torch.Tensor:
    observing, rounding = is_on(module, "observer_enabled"), is_on(module, "fake_quant_enabled")
    if not (observing or rounding) or x.numel() == 0:
        return clamped(module, x)
    if observing and module.sharing.calls_per_forward > 1:
        observe_shared(module, clamped(module, x.detach()), module.sharing)
        observing = False
        if not rounding:
            return clamped(module, x)
    compiled = native.kernels() if _is_plain(module, x) else None
    if compiled is not None:
        return _with_kernels(compiled, module, x, observing, rounding)
    x = clamped(module, x)
    if observing:
        keep_range(module, *followed(module, *range_of(module, x.detach())))
    keep_qparams(module, *qparams_of_range(module))
    return _rounded(module, x) if rounding else x


def clamped(module: Any, x: torch.Tensor) -> torch.Tensor:
    """``x`` as a ReLU or the like would give it that the module stands for; see backends/hiding.py."""
    least, most = module.clamp
    if module.clamp == UNCLAMPED:
        return x
    return F.relu(x) if (least, most) == (0, math.inf) else F.hardtanh(x, least, most)


#: Flags as they were last read: module -> name -> (buffer, its version, value). Not on the module: copies of it would
#: come with what was read of the other's.
_FLAGS: WeakKeyDictionary[nn.Module, dict[str, tuple[torch.Tensor, int, bool]]] = WeakKeyDictionary()


def is_on(module: Any, name: str) -> bool:
    """Whether the flag is set. Read from its buffer only when that has changed: on a GPU each look is a wait."""
    buffer = module._buffers[name]
    if buffer.is_inference():  # it has no version
        return bool(buffer.item())
    found = _FLAGS.setdefault(module, {})
    known = found.get(name)
    if known is None or known[0] is not buffer or known[1] != buffer._version:
        known = found[name] = (buffer, buffer._version, bool(buffer.item()))
    return known[2]


# ---- with our kernels


def _is_plain(module: Any, x: torch.Tensor) -> bool:
    """Whether the kernels can read ``x`` and the buffers where they lie."""
    return (
        x.device.type == "cpu"
        and x.dtype in native.DTYPES
        and type(x) in (torch.Tensor, nn.Parameter)
        and module.scale.dtype is torch.float32
        and module.zero_point.dtype is torch.int32
        and module.scale.device.type == "cpu"
    )


@functools.cache
def _grid(*values: Any) -> native.Grid:
    return native.Grid(*values)


def middle(observer: Any) -> int:
    """The zero point of symmetric ranges."""
    if observer.dtype not in (torch.quint8, torch.uint8):
        return 0
    return (observer.quant_min + observer.quant_max) // 2 if observer.has_customized_qrange else 128


def _grid_of(module: Any) -> native.Grid:
    observer = module.activation_post_process
    averaging = getattr(observer, "averaging_constant", 1.0)
    eps = observer.eps.item()
    ends = observer.quant_min, observer.quant_max
    return _grid(*ends, module.is_symmetric, middle(observer), eps, averaging, *module.clamp)


def _with_kernels(
    compiled: native.Kernels, module: Any, x: torch.Tensor, observing: bool, rounding: bool
) -> torch.Tensor:
    if rounding and x.requires_grad and torch.is_grad_enabled():
        rounded: torch.Tensor = _StraightThrough.apply(x, compiled, module, observing)
        return rounded
    y, _, _ = _run(compiled, module, x.detach(), observing, rounding, masked=False)
    return clamped(module, x) if y is None else y


def _run(
    compiled: native.Kernels, module: Any, x: torch.Tensor, observing: bool, rounding: bool, masked: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """``(y, mask, clipped)``: the first two None if not asked for, and with the strides of ``x`` where it is dense."""
    observer = module.activation_post_process
    per_channel = module.is_per_channel
    y = torch.empty_like(x)
    if y.stride() != x.stride() or per_channel:  # not dense; or channels are asked for where they are by the shape
        x = x.contiguous()
        y = torch.empty_like(x)
    mask = torch.empty_like(y, dtype=torch.bool) if masked else None
    low, high = observer.min_val, observer.max_val
    pointers = (x.data_ptr(), y.data_ptr() if rounding else None, None if mask is None else mask.data_ptr())
    grid = _grid_of(module)
    if per_channel:
        axis = module.ch_axis % x.dim()
        channels = x.shape[axis]
        if low.numel() != channels or module.scale.numel() != channels:
            _make_room(module, channels)
        outer, inner = 1, 1
        for size in x.shape[:axis]:
            outer *= size
        for size in x.shape[axis + 1 :]:
            inner *= size
        sizes: tuple[int, ...] = (outer, channels, inner)
    else:
        sizes = (x.numel(),)
    function = (compiled.per_channel if per_channel else compiled.per_tensor)[x.dtype]
    clipped = function(
        *pointers,
        *sizes,
        ctypes.addressof(grid),
        observing,
        low.data_ptr(),
        high.data_ptr(),
        module.scale.data_ptr(),
        module.zero_point.data_ptr(),
        torch.get_num_threads(),
    )
    return (y if rounding else None), mask, bool(clipped)


class _StraightThrough(torch.autograd.Function):
    """The rounding, and as its gradient that of the identity inside of the range, 0 outside of it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, compiled: native.Kernels, module: Any, observing: bool
    ) -> torch.Tensor | None:
        """See :func:`fake_quantize`."""
        # a range that was just taken from all of x, as that of a weight is, clips nothing
        whole = observing and getattr(module.activation_post_process, "averaging_constant", 1.0) == 1
        y, mask, clipped = _run(compiled, module, x, observing, True, masked=not whole)
        if clipped and whole:  # what is not finite is
            y, mask, _ = _run(compiled, module, x, False, True, masked=True)
        ctx.compiled = compiled
        ctx.save_for_backward(*([mask] if clipped else []))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """``gradient`` where the mask is set; 0 elsewhere."""
        if not ctx.saved_tensors:  # nothing was clipped
            return gradient, None, None, None
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled() or gradient.dtype not in native.DTYPES or type(gradient) is not torch.Tensor:
            return gradient * mask, None, None, None  # a gradient of it may be asked for
        result = torch.empty_like(mask, dtype=gradient.dtype)
        if gradient.stride() != result.stride():
            gradient = torch.empty_like(result).copy_(gradient)
        ctx.compiled.gradient[gradient.dtype](
            gradient.data_ptr(), mask.data_ptr(), result.data_ptr(), result.numel(), torch.get_num_threads()
        )
        return result, None, None, None


# ---- with torch's operators


def range_of(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Min and max, float32, of the whole or of each channel."""
    x = x.to(torch.float32)
    if not module.is_per_channel:
        low, high = torch.aminmax(x)
        return low, high
    axis = module.ch_axis % x.dim()
    low, high = torch.aminmax(x.movedim(axis, 0).reshape(x.shape[axis], -1), dim=1)
    _make_room(module, x.shape[axis])
    return low, high


def _make_room(module: Any, channels: int) -> None:
    """Give buffers one value for each channel. Ranges that were of another shape have seen nothing."""
    observer = module.activation_post_process
    if observer.min_val.numel() != channels:
        observer.min_val.resize_(channels).fill_(math.inf)
        observer.max_val.resize_(channels).fill_(-math.inf)
    if module.scale.numel() != channels:
        _resize(module, channels)


def followed(module: Any, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The average, moved towards a range. The first range is taken as it is, one that is not finite not at all."""
    observer = module.activation_post_process
    before = observer.min_val, observer.max_val
    low, high = low.reshape(before[0].shape), high.reshape(before[1].shape)
    averaging = getattr(observer, "averaging_constant", 1.0)
    alone = torch.isinf(before[0])
    finite = torch.isfinite(low) & torch.isfinite(high)
    moved = []
    for new, old in zip((low, high), before, strict=True):
        # inf - inf is not taken: it is where the range is the first
        average = new if averaging == 1 else torch.where(alone, new, old + averaging * (new - old))
        moved.append(torch.where(finite, average, old))
    return moved[0], moved[1]


def keep_range(module: Any, low: torch.Tensor, high: torch.Tensor) -> None:
    """Write it where the module's observer has it."""
    observer = module.activation_post_process
    observer.min_val.copy_(low)
    observer.max_val.copy_(high)


def qparams_of_range(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the range, by the formulas of torch's observers (``UniformQuantizationObserverBase``).

    Both of the shape of the range, float; 1 and 0 where nothing was seen.
    """
    observer = module.activation_post_process
    seen = observer.min_val <= observer.max_val
    low, high = observer.min_val.clamp(max=0), observer.max_val.clamp(min=0)
    least, most = observer.quant_min, observer.quant_max
    if module.is_symmetric:
        scale = torch.maximum(torch.maximum(-low, high) / ((most - least) / 2), observer.eps)
        zero_point = torch.full_like(scale, middle(observer))
    else:
        scale = torch.maximum((high - low) / float(most - least), observer.eps)
        zero_point = (least - torch.round(low / scale)).clamp(least, most)
    return torch.where(seen, scale, 1.0), torch.where(seen, zero_point, 0.0)


def keep_qparams(module: Any, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """Write them where the module has them."""
    if module.scale.shape != scale.shape and module.scale.numel() != scale.numel():
        _resize(module, scale.shape)
    module.scale.copy_(scale.reshape(module.scale.shape))
    module.zero_point.copy_(zero_point.reshape(module.scale.shape))


@contextlib.contextmanager
def resizable(module: Any) -> Iterator[None]:
    """A scale that is a Parameter can be given another size."""
    trained = module.scale.requires_grad
    module.scale.requires_grad_(False)
    try:
        yield
    finally:
        module.scale.requires_grad_(trained)


def _resize(module: Any, shape: Any) -> None:
    with resizable(module):
        module.scale.resize_(shape)
    module.zero_point.resize_(shape)


def _rounded(module: Any, x: torch.Tensor) -> torch.Tensor:
    observer = module.activation_post_process
    wide = x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x
    ends = observer.quant_min, observer.quant_max
    if module.is_per_channel:
        y = torch.fake_quantize_per_channel_affine(wide, module.scale, module.zero_point, module.ch_axis, *ends)
    else:
        y = torch.fake_quantize_per_tensor_affine(wide, module.scale, module.zero_point, *ends)
    return y.to(x.dtype)


def _in_a_graph(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The same without a look at a value, so that ``torch.compile`` can have it in its graph."""
    observer = module.activation_post_process
    x = clamped(module, x)
    observing = module.observer_enabled != 0
    low, high = followed(module, *range_of(module, x.detach()))
    observing = observing.reshape(()).expand(low.shape)
    keep_range(module, torch.where(observing, low, observer.min_val), torch.where(observing, high, observer.max_val))
    keep_qparams(module, *qparams_of_range(module))
    rounding = (module.fake_quant_enabled != 0).reshape(())
    return torch.where(rounding, _rounded(module, x), x)


# ---- one range for several tensors


def observe_shared(module: Any, x: torch.Tensor, sharing: Sharing) -> None:
    """Move the average of a module that several tensors share; see :class:`Sharing`."""
    observer = module.activation_post_process
    if sharing.calls == 0:
        empty = bool(torch.isinf(observer.min_val).any())
        sharing.before = None if empty else (observer.min_val.clone(), observer.max_val.clone())
        sharing.seen = None
    sharing.calls = (sharing.calls + 1) % sharing.calls_per_forward
    low, high = range_of(module, x)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        if sharing.seen is not None:
            low, high = torch.minimum(low, sharing.seen[0]), torch.maximum(high, sharing.seen[1])
        sharing.seen = (low, high)
    if sharing.seen is None or (sharing.before is not None and sharing.calls != 0):
        return
    # in the first pass of all there is no average: every call sets what was seen so far
    low, high = sharing.seen
    if sharing.before is not None:
        weight = observer.averaging_constant
        low = sharing.before[0] + weight * (low - sharing.before[0])
        high = sharing.before[1] + weight * (high - sharing.before[1])
    keep_range(module, low, high)

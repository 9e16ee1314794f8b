"""Ranges of several processes become one: each has observed a part of the data, and all of them go on with the whole.

:func:`merge_ranks` needs five collectives for a graph, however many observers it has: what the graph is, what its
observers have seen, their ranges, their histograms, and their values where these are few. What a process sends does not
depend on which rank it has, and what it makes of the answers does not either: counts are added as integers, minima and
maxima have no order, and means are those of sorted numbers. So all ranks end with the same bits.

**Why the mean of moving averages.** A moving average is linear: ``a <- a + c * (x - a)``, beginning with the first
``x``. Of ranks that step together, as those of ``DistributedDataParallel`` do, the mean of the averages is the average
that one process had followed that is given, at each step, the mean of the ranks' minima and maxima. (The extremes of
the averages would be wider with each rank more, and be the average of nothing.) With the default
``broadcast_buffers=True`` each step begins with the average of rank 0, so that what the other ranks saw in earlier
steps is lost before anybody could merge it: the mean then has all that rank 0 saw, and the last batch of the others.
``broadcast_buffers=False`` keeps it. The callbacks take the observers out of what is broadcast, and make them equal at
each step; see :mod:`lightning_quant.rank_steps`.

**Learned scales** are Parameters, and are the same on all ranks where they were trained together. Their zero points are
set once, from the data that a rank saw first. All get scale and zero point of the lowest rank that has begun to learn.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lightning_quant import fake_quantize, learned_offset, learned_scale, levels, observers
from lightning_quant._torch_ao import classes, is_observer
from lightning_quant.backends import pt2e_classes
from lightning_quant.backends.graph import info, is_graph
from lightning_quant.errors import CaptureError, ConfigError

#: How the observers of a class become one. ``counts``: our histograms, added; ``bins``: torch's, brought to a common
#: range first; ``union``: least minimum and greatest maximum; ``mean``: of both; ``own``: by the class itself.
Kind = Literal["counts", "bins", "union", "mean", "own"]


@dataclass(frozen=True)
class _Part:
    """One observer of a prepared graph.

    Attributes:
        name: Of it, or of the fake quantize around it.
        owner: What has the range; or what has to merge itself.
        path: Import path of the class of ``owner``.
        kind: See ``Kind``.
        rounding: The fake quantize of torch, torchao or ours whose scale and zero point follow from ``owner``, or None.
    """

    name: str
    owner: Any
    path: str
    kind: Kind
    rounding: Any = None


def merge_ranks(prepared: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make the observers and fake quantizes of ``prepared`` equal on all ranks, bit for bit, having seen all data.

    A collective: every rank of the group has to call it, between two forward passes, with the same graph. It changes
    ``prepared`` in place. Without an initialised ``torch.distributed``, or in a group of one, there is nothing to do.

    * Histograms are added, exactly, as one process had counted the data of all ranks. Call it once, at the end of a
      calibration: to call it again adds the sums. Torch's own histograms, which ``backend="torchscript"`` compiles,
      have bins of any width: their counts are spread evenly over the bins of the union that they overlap.
    * Ranges of min-max observers become their union.
    * Moving averages, also those of fake quantizes, become their mean; see the module's docstring. Scales and zero
      points are computed afresh from them.
    * Scales that are learned, and their zero points, become those of the lowest rank that learns them.
    * Observers that have seen nothing add nothing. If none has, they stay as they are.
    * Of a class that is none of torch's or ours, also if it derives from one, the method ``merge_ranks(self, group)``
      is called on every rank, after all else. Without one it has to have the same buffers on all ranks. (State that is
      no buffer is not looked at.)

    Args:
        prepared: From :func:`lightning_quant.prepare`, or any module with observers or prepared graphs in it, on any
            device.
        group: Whose ranks; None: all.

    Raises:
        CaptureError: ``prepared`` has neither prepared graphs nor observers.
        ConfigError: On all ranks, with nothing changed: the ranks have different graphs; or an observer of a class that
            is not known differs between ranks, and has no method ``merge_ranks``. On a rank that is not in ``group``.
    """
    parts = parts_of(prepared)
    if not parts and not any(is_graph(module) for module in prepared.modules()):
        raise CaptureError(
            f"{type(prepared).__name__} has no observers that could be merged: prepare it with lightning_quant.prepare "
            "first."
        )
    if not (dist.is_available() and dist.is_initialized()):
        return
    size = dist.get_world_size(group)
    if size < 0:
        raise ConfigError("merge_ranks was called on a rank that is not in the group: call it on those that are.")
    if size == 1:
        return
    # buffers that were made in inference mode can be written there alone, and others can, too
    with torch.inference_mode():
        device = _device(group, parts)
        _check_same_graph(parts, group, device)
        facts = _gather(torch.tensor([_facts(part) for part in parts]).reshape(-1, 4), group, device)
        changed = _check_facts(parts, facts)
        _merge_ranges([part for part in parts if part.kind != "own"], facts[:, _ranged(parts)], group, device)
        _merge_learned([part.rounding for part in parts if learned_scale.is_learned(part.rounding)], group, device)
    for part, differs in zip(parts, changed, strict=True):
        if hasattr(part.owner, "merge_ranks") and part.kind == "own":
            part.owner.merge_ranks(group)
        if part.rounding is not None and differs:
            _follow(part.rounding)


def check_ranks(prepared: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Find out before a training what :func:`merge_ranks` would find out after it. A collective, as that one.

    Raises:
        ConfigError: On all ranks: they have different graphs, or observers or fake quantizes of a class that is not
            known and that has no method ``merge_ranks``.
    """
    parts = parts_of(prepared)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    _check_same_graph(parts, group, _device(group, parts))
    for part in parts:
        if part.kind == "own" and not hasattr(part.owner, "merge_ranks"):
            raise _unknown(part, "is of a class that ranks cannot merge")


# ---- which observers there are


def parts_of(prepared: nn.Module) -> list[_Part]:
    """Everything in ``prepared`` that observes."""
    kinds = _kinds()
    by_path = {_path(kind): how for kind, how in kinds.items()}
    around = (
        fake_quantize.FakeQuantize,
        learned_scale.LearnedFakeQuantize,
        *classes("FakeQuantize", "FusedMovingAvgObsFakeQuantize"),
        *_ours()[0],
    )
    swapped = _swapped(prepared)
    parts: list[_Part] = []
    inside: tuple[str, ...] = ()
    for name, module in prepared.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            # TorchScript keeps the buffers of observers, and of their classes the names
            if not name.rpartition(".")[2].startswith("_observer_"):
                continue
            path = _scripted_path(module)
            parts.append(_Part(name, module, path, by_path.get(path, "own")))
        elif is_observer(module) or id(module) in swapped:
            rounding: Any = module if type(module) in around else None
            owner = module if rounding is None else rounding.activation_post_process
            parts.append(_Part(name, owner, _path(type(owner)), kinds.get(type(owner), "own"), rounding))
        else:
            continue
        inside = (*inside, f"{name}." if name else "")
    return parts


def _kinds() -> dict[type, Kind]:
    """By the class itself: one that derives from it may mean something else by the same buffers."""
    named: dict[Kind, tuple[str, ...]] = {
        "union": ("MinMaxObserver", "PerChannelMinMaxObserver"),
        "mean": ("MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"),
        "bins": ("HistogramObserver",),
    }
    kinds: dict[type, Kind] = {kind: how for how, names in named.items() for kind in classes(*names)}
    kinds.update(dict.fromkeys((observers.HistogramObserver, *_ours()[1]), "counts"))
    return kinds


def _ours() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Our fake quantizes and our histograms of torchao, if any was ever made."""
    fake_quantizes = (pt2e_classes.fake_quantize_class, pt2e_classes.learned_class)
    made = [[kind() for kind in kinds if kind.cache_info().currsize] for kinds in (fake_quantizes, _HISTOGRAMS)]
    return tuple(made[0]), tuple(made[1])


_HISTOGRAMS = (pt2e_classes.histogram_class,)


def _swapped(prepared: nn.Module) -> set[int]:
    """The modules of a user's own that observe in the places of layers, by ``id``."""
    found = set()
    for graph in prepared.modules():
        if is_graph(graph):
            known = info(graph)
            names = [str(layer.name) for layer in known.config.layers if layer.observed]
            found |= {id(graph.get_submodule(name).module) for name in names if name in known.swapped}
    return found


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _scripted_path(module: Any) -> str:
    """Import path of the class that was compiled."""
    return re.sub(r"^__torch__\.|___torch_mangle_\d+\.", "", str(module._c._type().qualified_name()))


# ---- what they have seen


def _facts(part: _Part) -> tuple[int, int, int, int]:
    """Whether it has seen anything; how many ranges it has; the exponent of its bins; what its buffers are."""
    if part.kind == "own":
        return 0, 0, 0, _fingerprint(part.owner if part.rounding is None else part.rounding)
    low = part.owner.min_val
    seen = low.numel() > 0 and not bool(torch.isinf(low).all())
    exponent = int(part.owner.exponent.item()) if part.kind == "counts" else 0
    return seen, low.numel(), exponent, 0


def _fingerprint(module: nn.Module) -> int:
    """64 bits that follow from the names, shapes, dtypes and bytes of the buffers."""
    digest = hashlib.blake2b(digest_size=8)
    for name, buffer in module.named_buffers():
        digest.update(f"{name} {tuple(buffer.shape)} {buffer.dtype} ".encode())
        digest.update(buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _check_same_graph(parts: list[_Part], group: dist.ProcessGroup | None, device: torch.device) -> None:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        bins = part.owner.histogram.numel() if part.kind == "bins" else 0
        rounding = None if part.rounding is None else _path(type(part.rounding))
        digest.update(f"{part.name} {part.path} {part.kind} {rounding} {bins}\n".encode())
    found = _gather(torch.tensor([int.from_bytes(digest.digest(), "little", signed=True), len(parts)]), group, device)
    if not bool((found == found[0]).all()):
        counts = ", ".join(str(int(count)) for count in found[:, 1])
        raise ConfigError(
            f"the ranks have different graphs ({counts} observers, by rank), so that their ranges cannot be merged. "
            "Prepare the same model with the same QuantConfig on every rank."
        )


def _check_facts(parts: list[_Part], facts: torch.Tensor) -> list[bool]:
    """Whether any rank has seen something, of each part. ``facts`` is ``(ranks, parts, 4)``."""
    changed = []
    for i, part in enumerate(parts):
        seen = facts[:, i, 0].bool()
        if part.kind != "own":
            sizes = sorted(set(facts[seen, i, 1].tolist()))
            if len(sizes) > 1:
                raise ConfigError(
                    f"{part.name} has ranges of {sizes[0]} channels on one rank and of {sizes[1]} on another, so that "
                    "they cannot be merged. Train or calibrate the same model on every rank."
                )
            changed.append(bool(seen.any()))
            continue
        differs = bool((facts[:, i, 3] != facts[0, i, 3]).any())
        if differs and not hasattr(part.owner, "merge_ranks"):
            raise _unknown(part)
        changed.append(differs)
    return changed


def _unknown(part: _Part, trouble: str = "differs between ranks") -> ConfigError:
    names = ", ".join(name for name, _ in part.owner.named_buffers())
    what = (
        f"{part.path} ({part.name}) {trouble}, and how the buffers of several ranks ({names}) become one "
        "is known of the observers and fake quantizes of torch, torchao and lightning_quant alone, not of classes that "
        "derive from them. "
    )
    if isinstance(part.owner, torch.jit.ScriptModule):
        return ConfigError(f"{what}Use one of those: a compiled class cannot say it.")
    return ConfigError(
        f"{what}Give the class a method merge_ranks(self, group): it is called on every rank with the process group "
        "(None: all ranks) and has to leave the same buffers on all of them."
    )


# ---- merging


def _ranged(parts: list[_Part]) -> list[int]:
    return [i for i, part in enumerate(parts) if part.kind != "own"]


def _merge_ranges(
    parts: list[_Part], facts: torch.Tensor, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Of those whose kind is known. ``facts`` is ``(ranks, parts, 4)``, of the same ones."""
    # those that have seen nothing may have any size
    sizes = [int((facts[:, i, 1] * facts[:, i, 0]).max()) for i in range(len(parts))]
    some = [i for i, size in enumerate(sizes) if size]
    if not some:
        return
    parts, facts, sizes = [parts[i] for i in some], facts[:, some], [sizes[i] for i in some]
    own = torch.stack([torch.cat([_end(part, end, size) for part, size in zip(parts, sizes, strict=True)])
                       for end in ("min_val", "max_val")])  # fmt: skip
    ends = _gather(own, group, device)  # (ranks, 2, ranges)
    means = _mean(ends)
    union = torch.stack([ends[:, 0].amin(0), ends[:, 1].amax(0)])
    ranges = [
        (means if part.kind == "mean" else union)[:, start : start + size]
        for part, start, size in zip(parts, np.cumsum([0, *sizes]).tolist(), sizes, strict=False)
    ]
    _merge_histograms(parts, facts, ranges, group, device)
    _merge_levels([part.owner for part in parts if part.kind == "counts"], group, device)
    for part, size, found in zip(parts, sizes, ranges, strict=True):
        for buffer, values in zip((part.owner.min_val, part.owner.max_val), found, strict=True):
            if buffer.numel() != size:
                buffer.resize_(size)
            buffer.copy_(values.reshape(buffer.shape))


def _end(part: _Part, name: str, size: int) -> torch.Tensor:
    """``(size,)``, float64; infinite if nothing was seen."""
    buffer = getattr(part.owner, name).detach().cpu().to(torch.float64).reshape(-1)
    return buffer if buffer.numel() == size else buffer.new_full((size,), float("inf" if name == "min_val" else "-inf"))


def _mean(ends: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, ``(ranks, ...)`` to ``(...)``, of what is not infinite. Infinite if all of it is."""
    unseen = torch.isinf(ends)
    total = torch.zeros_like(ends[0])
    for row in (
        ends.masked_fill(unseen, 0.0).sort(0).values
    ):  # a sum of floats has an order: one that ranks do not change
        total = total + row
    return torch.where(unseen.all(0), ends[0], total / (~unseen).sum(0))


def _merge_histograms(
    parts: list[_Part],
    facts: torch.Tensor,
    ranges: list[torch.Tensor],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Counts are multiples of ``1 / PARTS`` and so are integers, whose sum has no order and no error."""
    own: list[torch.Tensor] = []
    exponents: dict[int, int] = {}
    for i, part in enumerate(parts):
        if part.kind == "counts":
            exponents[i] = int(facts[facts[:, i, 0].bool(), i, 2].max())
            own.append(_parts_of_one(part.owner.zeros).reshape(1))
            own.append(_counts(part.owner, exponents[i]))
        elif part.kind == "bins":
            own.append(_parts_of_one(_spread(part.owner, *ranges[i].flatten().tolist())))
    if not own:
        return
    sent = torch.cat(own).to(device)
    dist.all_reduce(sent, dist.ReduceOp.SUM, group)
    sums = iter(torch.split(sent.cpu().to(torch.float64) / observers.PARTS, [piece.numel() for piece in own]))
    for i, part in enumerate(parts):
        if part.kind == "counts":
            part.owner.zeros.copy_(next(sums).reshape(()))
            part.owner.histogram.resize_(2 * observers.HALF).copy_(next(sums))
            part.owner.exponent.fill_(exponents[i])
        elif part.kind == "bins":
            part.owner.histogram.copy_(next(sums))


def _merge_levels(counting: list[Any], group: dist.ProcessGroup | None, device: torch.device) -> None:
    if not counting:
        return
    sent = _gather(torch.stack([levels.padded(observer.levels.cpu()) for observer in counting]), group, device)
    for i, observer in enumerate(counting):
        observer.levels = levels.of_padded(sent[:, i]).to(observer.levels.device)


def _parts_of_one(counts: torch.Tensor) -> torch.Tensor:
    return (counts.detach().cpu().to(torch.float64) * observers.PARTS).round().to(torch.int64)


def _counts(observer: Any, exponent: int) -> torch.Tensor:
    """The histogram in bins that are ``2 ** exponent`` wide, as such integers."""
    if observer.histogram.numel() == 0:
        return torch.zeros(2 * observers.HALF, dtype=torch.int64)
    return observers.coarser(_parts_of_one(observer.histogram), max(0, exponent - int(observer.exponent.item())))


def _spread(observer: Any, low: float, high: float) -> torch.Tensor:
    """A histogram of torch in as many bins from ``low`` to ``high``, float64. Counts are even inside of a bin."""
    counts = observer.histogram.detach().cpu().to(torch.float64)
    own_low, own_high = observer.min_val.item(), observer.max_val.item()
    bins = counts.numel()
    if own_low > own_high:  # it has seen nothing
        return torch.zeros_like(counts)
    if (own_low, own_high) == (low, high):
        return counts
    if own_low == own_high:  # one value
        place = min(int((own_low - low) / (high - low) * bins), bins - 1)
        return torch.zeros_like(counts).index_fill_(0, torch.tensor(place), counts.sum().item())
    below = np.concatenate([[0.0], np.cumsum(counts.numpy())])
    edges = np.interp(np.linspace(low, high, bins + 1), np.linspace(own_low, own_high, bins + 1), below)
    return torch.from_numpy(np.diff(edges))


def _merge_learned(roundings: list[Any], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Scale and zero point of the lowest rank that learns them."""
    if not roundings:
        return
    own = torch.tensor([[int(module.learned.item()), module.scale.numel()] for module in roundings])
    states = _gather(own, group, device)  # (ranks, roundings, 2)
    learning = [int(i) for i in states[:, :, 0].amax(0).nonzero().flatten()]
    if not learning:
        return
    first = [int(states[:, i, 0].argmax()) for i in learning]
    sizes = [int(states[rank, i, 1]) for rank, i in zip(first, learning, strict=True)]
    own = torch.cat([_sized(values, size) for i, size in zip(learning, sizes, strict=True)
                     for values in (roundings[i].scale, roundings[i].zero_point)])  # fmt: skip
    values = _gather(own, group, device)
    start = 0
    for rank, i, size in zip(first, learning, sizes, strict=True):
        module = roundings[i]
        scale, zero_point = values[rank, start : start + 2 * size].reshape(2, size)
        fake_quantize.keep_qparams(module, scale, zero_point)
        module.scale_before.resize_(module.scale.shape).copy_(module.scale)
        learned_offset.begin(module)
        module.learned.fill_(1)
        start += 2 * size


def _sized(values: torch.Tensor, size: int) -> torch.Tensor:
    """``(size,)``, float64; zeros where it has another size: this rank is not the one that is asked."""
    flat = values.detach().cpu().to(torch.float64).reshape(-1)
    return flat if flat.numel() == size else flat.new_zeros(size)


def _follow(rounding: Any) -> None:
    """Let scale and zero point follow the range."""
    if learned_scale.is_learned(rounding) and bool(rounding.learned):
        return
    with torch.inference_mode():
        if fake_quantize.is_ours(rounding):
            fake_quantize.keep_qparams(rounding, *fake_quantize.qparams_of_range(rounding))
            return
        # as torch/ao/quantization/fake_quantize.py, FakeQuantize.forward
        scale, zero_point = rounding.calculate_qparams()
        if rounding.scale.shape != scale.shape:
            rounding.scale.resize_(scale.shape)
            rounding.zero_point.resize_(zero_point.shape)
        rounding.scale.copy_(scale)
        rounding.zero_point.copy_(zero_point)


# ---- collectives


def _device(group: dist.ProcessGroup | None, parts: list[_Part]) -> torch.device:
    """Where tensors have to be for the group: the CPU if it can, else where the observers are, else the current one."""
    # such as "cpu:gloo,cuda:nccl"
    kinds = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    for part in parts:
        for buffer in part.owner.buffers():
            if buffer.device.type in kinds:
                return buffer.device
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def _gather(own: torch.Tensor, group: dist.ProcessGroup | None, device: torch.device) -> torch.Tensor:
    """Those of all ranks, ``(ranks, ...)``, on the CPU. All have one shape."""
    sent = own.to(device).contiguous()
    found = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, sent, group)
    return torch.stack(found).cpu()

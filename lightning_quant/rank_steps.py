"""What the ranks of a ``DistributedDataParallel`` training agree on before each step of the optimizer.

``DistributedDataParallel`` gives buffers of rank 0 to all before each pass. Of a range that every rank moves by its own
data, that keeps what rank 0 has seen and drops the rest, so that observers are taken out of it
(:func:`lightning_quant.attachment.keep_from_broadcast`). Here they become equal, once a step, having seen the data of
all: a checkpoint of rank 0 has all there is, wherever in the training it is written.

Learned scales are taken out as well. ``DistributedDataParallel`` waits in each backward pass for the gradient of every
Parameter that it knows, and those of scales begin with the second quantized pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_quant import fake_quantize, learned_offset
from lightning_quant.backends.graph import sees_weights
from lightning_quant.fake_quantize import is_on
from lightning_quant.learned_scale import is_learned
from lightning_quant.ranks import parts_of


class RankSteps:
    """The observers and learned scales of prepared graphs, equal on all ranks after each :meth:`agree`.

    A moving average becomes the mean of those of the ranks (see :mod:`lightning_quant.ranks`), other ranges become
    their union. Histograms are left as they are: they are added up once, at the end.

    Args:
        graphs: The prepared graphs, the same on all ranks, with all state loaded.
        group: Whose ranks; None: all. It has to be able to send from where the observers are.
    """

    def __init__(self, graphs: Iterable[nn.Module], group: Any = None) -> None:
        self._group = group
        self._means: list[Any] = []
        self._unions: list[Any] = []
        self._following: dict[tuple[Any, ...], list[Any]] = {}
        self._learned: list[Any] = []
        self._weights: list[bool] = []
        for graph in graphs:
            for part in parts_of(graph):
                weight = sees_weights(graph, part.name)
                if is_learned(part.rounding) and part.rounding.scale.requires_grad:
                    self._learned.append(part.rounding)
                    self._weights.append(weight)
                # ranges of weights are those of the weights, which are the same everywhere
                if not weight and part.kind in ("mean", "union"):
                    (self._means if part.kind == "mean" else self._unions).append(part.owner)
                    if fake_quantize.is_ours(part.rounding):
                        self._following.setdefault(_formula(part.rounding), []).append(part.rounding)
        self._waiting = [i for i, module in enumerate(self._learned) if not bool(module.learned)]

    def agree(self) -> None:
        """Make ranges equal, and scales of which some began to be learned since the last time. A collective."""
        with torch.no_grad():
            self._agree_on_means([x for x in self._means if x.min_val.numel() == 1])
            self._agree_on_unions([x for x in self._unions if x.min_val.numel() == 1])
            if self._waiting:
                self._begin()
            for modules in self._following.values():
                _follow([module for module in modules if not (is_learned(module) and is_on(module, "learned"))])

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, dist.ReduceOp.SUM, self._group)
        return values

    def _agree_on_means(self, owners: list[Any]) -> None:
        if not owners:
            return
        ends = torch.cat([x.reshape(-1) for owner in owners for x in (owner.min_val, owner.max_val)])
        # in float64 the mean of equal ones is that one
        low, high = ends.to(torch.float64).reshape(-1, 2).unbind(1)
        seen = low <= high
        own = torch.stack([torch.where(seen, low, 0.0), torch.where(seen, high, 0.0), seen.to(torch.float64)])
        total = self._sum(own)
        some = total[2] > 0
        _write(owners, torch.where(some, total[0] / total[2], low), torch.where(some, total[1] / total[2], high))

    def _agree_on_unions(self, owners: list[Any]) -> None:
        if not owners:
            return
        wide = torch.stack([torch.cat([-owner.min_val.reshape(-1) for owner in owners]),
                            torch.cat([owner.max_val.reshape(-1) for owner in owners])])  # fmt: skip
        dist.all_reduce(wide, dist.ReduceOp.MAX, self._group)
        _write(owners, -wide[0], wide[1])

    def _begin(self) -> None:
        """Scales that a rank set from its own data become those of all data."""
        modules = [self._learned[i] for i in self._waiting]
        learning = torch.cat([module.learned.reshape(1).to(torch.float64) for module in modules])
        own = torch.cat([(values.detach() * module.learned).reshape(-1).to(torch.float64)
                         for module in modules for values in (module.scale, module.zero_point)])  # fmt: skip
        total = self._sum(torch.cat([learning, own]))
        counts, values = total[: len(modules)].tolist(), total[len(modules) :]
        start = 0
        for index, count, module in zip(list(self._waiting), counts, modules, strict=True):
            size = module.scale.numel()
            scale, zero_point = values[start : start + 2 * size].reshape(2, size)
            start += 2 * size
            if not count:
                continue
            if self._weights[index]:  # the same weights on all ranks: a mean of equal ones
                fake_quantize.keep_qparams(module, scale / count, (zero_point / count).round())
            else:
                fake_quantize.keep_qparams(module, *fake_quantize.qparams_of_range(module))
            module.scale_before.resize_(module.scale.shape).copy_(module.scale)
            learned_offset.begin(module)
            module.learned.fill_(1)
            self._waiting.remove(index)

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Let the gradients of the scales that this optimizer trains be their mean over the ranks. A collective."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        own_parameters = [p for module in self._learned for p in learned_offset.trained(module).values()]
        scales = [parameter for parameter in own_parameters if id(parameter) in trained]
        if not scales:
            return
        own = [torch.zeros_like(scale) if scale.grad is None else scale.grad.detach() for scale in scales]
        has = torch.tensor([float(scale.grad is not None) for scale in scales], device=scales[0].device)
        total = self._sum(torch.cat([*(gradient.reshape(-1) for gradient in own), has.to(own[0].dtype)]))
        counts, mean = total[-len(scales) :].tolist(), total / dist.get_world_size(self._group)
        start = 0
        for scale, count in zip(scales, counts, strict=True):
            if count:  # else no rank has one: zero would move momenta and decay the scale
                scale.grad = mean[start : start + scale.numel()].reshape(scale.shape).clone()
            start += scale.numel()


def _formula(module: Any) -> tuple[Any, ...]:
    """What scale and zero point depend on, beside the range."""
    observer = module.activation_post_process
    ends = observer.quant_min, observer.quant_max
    return *ends, module.is_symmetric, fake_quantize.middle(observer), observer.eps.item()


def _follow(modules: list[Any]) -> None:
    """Let scales and zero points of one formula follow their ranges, of one value each, at once."""
    modules = [module for module in modules if module.activation_post_process.min_val.numel() == 1]
    if not modules:
        return
    observers = [module.activation_post_process for module in modules]
    settings = ("quant_min", "quant_max", "dtype", "has_customized_qrange", "eps")
    one = SimpleNamespace(**{name: getattr(observers[0], name) for name in settings})
    one.min_val = torch.cat([observer.min_val.reshape(1) for observer in observers])
    one.max_val = torch.cat([observer.max_val.reshape(1) for observer in observers])
    stacked = SimpleNamespace(activation_post_process=one, is_symmetric=modules[0].is_symmetric)
    for places, values in zip(
        ([module.scale for module in modules], [module.zero_point for module in modules]),
        fake_quantize.qparams_of_range(stacked),
        strict=True,
    ):
        torch._foreach_copy_(places, [x.reshape(p.shape) for x, p in zip(values.unbind(), places, strict=True)])


def _write(owners: list[Any], low: torch.Tensor, high: torch.Tensor) -> None:
    """Ranges of one value each, in the order of ``owners``."""
    ends = [end for pair in zip(low.unbind(), high.unbind(), strict=True) for end in pair]
    places = [x for owner in owners for x in (owner.min_val, owner.max_val)]
    torch._foreach_copy_(places, [end.reshape(place.shape) for end, place in zip(ends, places, strict=True)])

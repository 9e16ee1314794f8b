"""The processes that train one model together, and what one of them has to tell the others.

Only rank 0 exports, times and reports. What it finds, the others are told; what it raises, they raise, too, because a
rank that goes on alone waits for ever in its next collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightning_quant.errors import RankError

T = TypeVar("T")

#: How long ranks wait for rank 0, which may compile, export and time for long. One that died is noticed at once.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Team:
    """All processes of a run, or this one alone.

    Attributes:
        rank: Of this process.
        size: How many there are.
        group: Their process group, with gloo, for tensors on the CPU; None: this process is alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that exports and reports."""
        return self.rank == 0

    def by_first(self, run: Callable[[], T]) -> T:
        """What ``run()`` gives on rank 0, which alone calls it; it has to be something that can be pickled.

        Raises:
            RankError: On the other ranks, if it raises on rank 0 (where it is raised as it is).
        """
        if self.size == 1:
            return run()
        sent: list[Any] = [None, None]
        error: BaseException | None = None
        if self.is_first:
            try:
                sent[0] = run()
            except BaseException as raised:  # the others wait, whatever it is
                error, sent[1] = raised, _text(raised)
        dist.broadcast_object_list(sent, src=0, group=self.group)
        if error is not None:
            raise error
        if sent[1] is not None:
            raise _failed(0, sent[1])
        found: T = sent[0]
        return found

    def by_each(self, run: Callable[[], T]) -> T:
        """What ``run()`` gives on this rank, once it is done on all. It must not talk to other ranks.

        Raises:
            RankError: On the other ranks, if it raises on one (where it is raised as it is).
        """
        if self.size == 1:
            return run()
        error: BaseException | None = None
        try:
            found = run()
        except BaseException as raised:  # the others wait, whatever it is
            error = raised
        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, None if error is None else _text(error), group=self.group)
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise _failed(rank, text)
        return found

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def add(self, tensor: torch.Tensor) -> None:
        """Let a tensor on the CPU be the sum of those of all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group)

    def give(self, tensors: Iterable[torch.Tensor]) -> None:
        """Write the values that rank 0 has into the tensors of the others: the same shapes and dtypes on all."""
        if self.size == 1:
            return
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            values = tensor.detach().cpu().contiguous()
            # as bytes: gloo does not know every dtype
            dist.broadcast(values.reshape(-1).view(torch.uint8), 0, self.group)
            if not self.is_first:
                with torch.no_grad():
                    tensor.copy_(values)


ALONE = Team()

#: The group that was made last, beside the default group that it was made from.
_GROUPS: list[tuple[Any, Any]] = []


def all_ranks() -> Team:
    """All ranks of an initialised ``torch.distributed``; :data:`ALONE` without one. A collective: all have to call it.

    They get a gloo group of their own, once: the run's may be NCCL's, which sends nothing from the CPU, and its timeout
    is meant for steps of a training.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    default = dist.group.WORLD
    if not _GROUPS or _GROUPS[-1][0] is not default:
        _GROUPS[:] = [(default, dist.new_group(backend="gloo", timeout=PATIENCE))]
    return Team(dist.get_rank(), dist.get_world_size(), _GROUPS[-1][1])


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _failed(rank: int, text: str) -> RankError:
    return RankError(f"rank {rank} failed, and this one stops with it: {text}")

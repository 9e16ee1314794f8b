"""The module's own validation loop on a float, a quantized or a reloaded model.

A second, small Trainer validates a *copy* of the LightningModule, on the CPU, without loggers, with the user's
dataloaders, transfer hooks and batch limits. Nothing of the user's running Trainer is touched. Where several processes
run, each validates its share of the batches, and the metrics are those of all.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torchmetrics import Metric

from lightning_quant._roots import root_of
from lightning_quant.attachment import detach, unbind
from lightning_quant.errors import CalibrationError
from lightning_quant.placement import restore, uncompile
from lightning_quant.progress import SILENT, Advance, Progress
from lightning_quant.scripted import opened_copy
from lightning_quant.team import ALONE, Team, all_ranks

#: Hooks that build or tear down the user's module: the copy is built already, and building it again would undo what was
#: put in (``setup`` that makes the layers, ``configure_callbacks`` that brings our own callback again).
_BUILDING_HOOKS = ("prepare_data", "setup", "configure_model", "configure_callbacks", "teardown")


@dataclass(frozen=True)
class ValidationData:
    """Where validation batches come from.

    Attributes:
        root: The Lightning package of the user's Trainer.
        loaders: One iterable of batches or several, in the structure in which the user gave them.
        mode: How several are combined (``CombinedLoader``'s word).
        datamodule: The user's, whose transfer hooks apply. None if there is none.
        limit_batches: The user's ``limit_val_batches``.
        team: The processes that have a share of the batches each, and call every function of this file together.
    """

    root: ModuleType
    loaders: Any
    mode: str
    datamodule: Any
    limit_batches: int | float
    team: Team = ALONE


def at_most(data: ValidationData, batches: int | None) -> ValidationData:
    """The first ``batches`` of each dataloader, as far as that is not limited to less; None: all."""
    limit = data.limit_batches
    if batches is None or (isinstance(limit, float) and limit != 1.0):
        return data
    return replace(data, limit_batches=batches if isinstance(limit, float) else min(limit, batches))


def validation_data(trainer: Any) -> ValidationData | None:
    """The validation batches of a running ``fit`` or ``validate``, or None where there are none.

    Of each rank its own; all ranks have to call it.
    """
    fitting = trainer.state.fn == "fit"
    loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    if loop._combined_loader is None:
        if not loop._data_source.is_defined():
            return None
        loop.setup_data()
    combined = loop._combined_loader
    if combined is None:  # limit_val_batches=0, or no validation_step
        return None
    root = root_of(trainer)
    limit = trainer.limit_val_batches
    return ValidationData(root, combined.iterables, combined._mode, trainer.datamodule, limit, all_ranks())


def copy_of(module: Any) -> Any:
    """A copy of a LightningModule that can be validated: on the CPU, in eval mode, float, without what we put on it."""
    twin: Any = opened_copy(module)
    forget(twin)
    detach(twin)
    unbind(twin)
    for part in twin.modules():
        restore(part)
    uncompile(twin)
    return twin.cpu().eval()


def forget(module: Any) -> None:
    """Take off a LightningModule its Trainer, and a cache whose keys are the ids of another copy's metrics."""
    module._metric_attributes = None
    module.trainer = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the small Trainer's remarks on devices and workers to itself: the user's own Trainer made them already."""
    loggers = [logging.getLogger(f"{root}.utilities.rank_zero") for root in ("pytorch_lightning", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 with torch 2.14
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*You have overridden `.*` in .*LightningDataModule.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _no_op(*_: Any, **__: Any) -> None:
    return None


def _no_callbacks() -> list[Any]:
    return []


@contextlib.contextmanager
def _built(module: Any) -> Iterator[None]:
    """Keep Lightning from building ``module`` again."""
    for name in _BUILDING_HOOKS:
        module.__dict__[name] = _no_callbacks if name == "configure_callbacks" else _no_op
    try:
        yield
    finally:
        for name in _BUILDING_HOOKS:
            del module.__dict__[name]


def _datamodule(data: ValidationData, loaders: Any) -> Any:
    """A shallow copy of the user's datamodule, with its transfer hooks, that gives ``loaders`` and sets up nothing."""
    twin = copy.copy(data.datamodule)
    twin.trainer = None
    for name in ("prepare_data", "setup", "teardown"):
        twin.__dict__[name] = _no_op
    twin.__dict__["val_dataloader"] = lambda: loaders
    return twin


def evaluate(
    module: Any,
    data: ValidationData,
    *,
    callbacks: Sequence[Any] = (),
    progress: Progress = SILENT,
    text: str = "Validating",
) -> dict[str, float]:
    """Every metric that ``module`` logs in its validation loop.

    Args:
        module: A LightningModule that is ours: from :func:`copy_of`. Its metrics are left as the loop leaves them.
        data: The batches.
        callbacks: Lightning callbacks of this loop.
        progress: Where a line shows the batches.
        text: What the line says.

    Returns:
        Name -> value, as ``trainer.validate(module)`` gives them; of several dataloaders, merged. Of several
        processes, those of all batches, also where the module logs without ``sync_dist``: means are weighted by the
        sizes of batches, as Lightning does it, and minima, maxima and sums are those of all.

    Raises:
        CalibrationError: There was no batch.
    """
    root = data.root
    counter = _BatchCounter(root)
    shares = _Shares(root)
    with contextlib.ExitStack() as shown, _quiet(), _built(module), _synchronised(module, data.team):
        combined = root.utilities.CombinedLoader(data.loaders, data.mode)
        line = _line(root, lambda total: shown.enter_context(progress.step(text, total)))
        trainer = root.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=_strategy(root, data.team),
            logger=root.loggers.logger.DummyLogger(),
            callbacks=[counter.callback, shares.callback, *callbacks, line],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=data.limit_batches,
            use_distributed_sampler=False,
            # observers keep what they see: tensors of inference mode could not be used in training again
            inference_mode=False,
        )
        if data.datamodule is None:
            results = trainer.validate(module, dataloaders=combined, verbose=False)
        else:
            results = trainer.validate(module, datamodule=_datamodule(data, combined), verbose=False)
    forget(module)
    if not sum(data.team.gathered(counter.batches)):
        raise CalibrationError(
            "the validation dataloader gave no batch. Static quantization calibrates on it, and metrics are taken from "
            "it: give one with at least one batch, and limit_val_batches > 0."
        )
    return shares.of_all({name: float(value) for result in results for name, value in result.items()}, data.team)


@contextlib.contextmanager
def _synchronised(module: Any, team: Team) -> Iterator[None]:
    """Let the metrics of ``module`` gather their states in the group of ``team``, on the CPU; alone, not at all."""
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    before = [(metric.process_group, metric.distributed_available_fn) for metric in metrics]
    for metric in metrics:
        metric.process_group = team.group
        metric.distributed_available_fn = _alone if team.size == 1 else _together
    try:
        yield
    finally:
        for metric, (group, available) in zip(metrics, before, strict=True):
            metric.process_group, metric.distributed_available_fn = group, available


def _alone() -> bool:
    return False


def _together() -> bool:
    return True


def _strategy(root: ModuleType, team: Team) -> Any:
    """Of the small Trainer: one device, and ``team`` where the module asks for other ranks (``self.all_gather``)."""
    if team.size == 1:
        return "auto"

    class Shared(root.strategies.SingleDeviceStrategy):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__(device="cpu")
            self.global_rank, self.world_size = team.rank, team.size

        @property
        def is_global_zero(self) -> bool:
            return team.is_first

        def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
            if not isinstance(tensor, torch.Tensor):
                return tensor
            values = torch.stack(self._of_all(tensor, group))
            op = str(reduce_op).rpartition(".")[2].lower()
            if op in ("mean", "avg"):
                return (
                    values.to(torch.get_default_dtype()).mean(0) if not values.is_floating_point() else values.mean(0)
                )
            return getattr(values, {"max": "amax", "min": "amin"}.get(op, op))(0)

        def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
            return torch.stack(self._of_all(tensor, group))

        def _of_all(self, tensor: torch.Tensor, group: Any) -> list[torch.Tensor]:
            sent = tensor.detach().contiguous()
            group = group or team.group
            found = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, sent, group)
            return found

        def barrier(self, *args: Any, **kwargs: Any) -> None:
            dist.barrier(team.group)

        def broadcast(self, obj: Any, src: int = 0) -> Any:
            sent = [obj]
            dist.broadcast_object_list(sent, src, team.group)
            return sent[0]

    return Shared()


class _Shares:
    """What each rank has added to the logged values that are no metrics of torchmetrics, which gather by themselves."""

    def __init__(self, root: ModuleType) -> None:
        self.values: dict[str, tuple[str, float, float]] = {}
        outer = self

        class Reader(root.Callback):  # type: ignore[name-defined]  # of the package that the user has
            def on_validation_end(self, trainer: Any, module: Any) -> None:
                results = trainer.validate_loop._results
                for entry in results.values():
                    if entry.is_tensor and entry.meta.on_epoch:
                        weight = float(entry.cumulated_batch_size) if entry.meta.is_mean_reduction else 1.0
                        share = entry.meta.reduce_fx.__name__, float(entry.value), weight
                        outer.values |= dict.fromkeys(results._forked_name(entry, on_step=False), share)

        self.callback = Reader()

    def of_all(self, own: dict[str, float], team: Team) -> dict[str, float]:
        """The results of this rank, with values of all ranks."""
        if team.size == 1:
            return own
        merged: dict[str, float] = {}
        shares: dict[str, list[tuple[str, float, float]]] = {}
        for results, values in team.gathered((own, self.values)):
            merged = {**results, **merged}  # a value that one rank alone has is that of all
            for name, share in values.items():
                shares.setdefault(name, []).append(share)
        return {name: _reduced(shares[name]) if name in shares else value for name, value in merged.items()}


def _reduced(shares: list[tuple[str, float, float]]) -> float:
    """As ``_ResultMetric`` of Lightning, which keeps of means the sum of values times sizes of batches."""
    kind = shares[0][0]
    values = [value for _, value, _ in shares]
    if kind in ("max", "min"):
        return max(values) if kind == "max" else min(values)
    weight = sum(size for _, _, size in shares) if kind == "mean" else 1.0
    return sum(values) / weight if weight else float("nan")


class _BatchCounter:
    def __init__(self, root: ModuleType) -> None:
        self.batches = 0
        outer = self

        class Counter(root.Callback):  # type: ignore[name-defined]  # of the package that the user has
            def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
                outer.batches += 1

        self.callback = Counter()


def _line(root: ModuleType, begin: Callable[[int | None], Advance]) -> Any:
    """A callback that shows the batches of its loop; it begins when their number is known."""

    class Line(root.Callback):  # type: ignore[name-defined]  # of the package that the user has
        advance: Advance

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            total = sum(trainer.num_val_batches)
            self.advance = begin(int(total) if math.isfinite(total) else None)

        def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
            self.advance("")

    return Line()


def calibrate(
    module: Any, data: ValidationData, stop: Any, *, batches: int | None = None, progress: Progress = SILENT
) -> dict[str, float]:
    """Run the validation loop of a module whose targets show their data to observers.

    Args:
        module: From :func:`copy_of`, with its targets diverted to :class:`lightning_quant.placement.Observed`.
        data: The batches.
        stop: Called after ``batches`` batches, to take the observers off.
        batches: How many are observed; None: all. The loop always runs to its end, for the metrics.
        progress: Where a line shows the batches.

    Returns:
        The metrics, those of the module without observers to the last digit.
    """

    class Stop(data.root.Callback):  # type: ignore[name-defined]
        seen = 0

        def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
            self.seen += 1
            if self.seen == batches:
                stop()

    return evaluate(module, data, callbacks=[Stop()], progress=progress, text="Calibrating")

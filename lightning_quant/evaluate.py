"""The module's own validation loop on a float, a quantized or a reloaded model.

A second, small Trainer validates a *copy* of the LightningModule, on the CPU, without loggers, with the user's
dataloaders, transfer hooks and batch limits. Nothing of the user's running Trainer is touched.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lightning_quant._roots import root_of
from lightning_quant.attachment import detach, unbind
from lightning_quant.errors import CalibrationError
from lightning_quant.placement import restore, uncompile
from lightning_quant.scripted import opened_copy

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
    """

    root: ModuleType
    loaders: Any
    mode: str
    datamodule: Any
    limit_batches: int | float


def validation_data(trainer: Any) -> ValidationData | None:
    """The validation batches of a running ``fit`` or ``validate``, or None where there are none."""
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
    return ValidationData(root, combined.iterables, combined._mode, trainer.datamodule, trainer.limit_val_batches)


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
    module: Any, data: ValidationData, *, callbacks: Sequence[Any] = (), progress: str | None = None
) -> dict[str, float]:
    """Every metric that ``module`` logs in its validation loop.

    Args:
        module: A LightningModule that is ours: from :func:`copy_of`. Its metrics are left as the loop leaves them.
        data: The batches.
        callbacks: Lightning callbacks of this loop.
        progress: What the progress bar says; None: no bar.

    Returns:
        Name -> value, as ``trainer.validate(module)`` gives them; of several dataloaders, merged.

    Raises:
        CalibrationError: There was no batch.
    """
    root = data.root
    counter = _BatchCounter(root)
    bar = [_progress_bar(root, progress)] if progress else []
    with _quiet(), _built(module):
        combined = root.utilities.CombinedLoader(data.loaders, data.mode)
        trainer = root.Trainer(
            accelerator="cpu",
            devices=1,
            logger=root.loggers.logger.DummyLogger(),
            callbacks=[counter.callback, *callbacks, *bar],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=bool(progress),
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
    if not counter.batches:
        raise CalibrationError(
            "the validation dataloader gave no batch. Static quantization calibrates on it, and metrics are taken from "
            "it: give one with at least one batch, and limit_val_batches > 0."
        )
    return {name: float(value) for result in results for name, value in result.items()}


class _BatchCounter:
    def __init__(self, root: ModuleType) -> None:
        self.batches = 0
        outer = self

        class Counter(root.Callback):  # type: ignore[name-defined]
            def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
                outer.batches += 1

        self.callback = Counter()


def _progress_bar(root: ModuleType, text: str) -> Any:
    class Bar(root.callbacks.TQDMProgressBar):  # type: ignore[name-defined]
        @property
        def validation_description(self) -> str:
            return text

    return Bar()


def calibrate(
    module: Any, data: ValidationData, stop: Any, *, batches: int | None = None, progress: bool = True
) -> dict[str, float]:
    """Run the validation loop of a module whose targets show their data to observers.

    Args:
        module: From :func:`copy_of`, with its targets diverted to :class:`lightning_quant.placement.Observed`.
        data: The batches.
        stop: Called after ``batches`` batches, to take the observers off.
        batches: How many are observed; None: all. The loop always runs to its end, for the metrics.
        progress: Show a progress bar.

    Returns:
        The metrics, those of the module without observers to the last digit.
    """

    class Stop(data.root.Callback):  # type: ignore[name-defined]
        seen = 0

        def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
            self.seen += 1
            if self.seen == batches:
                stop()

    return evaluate(module, data, callbacks=[Stop()], progress="Calibrating" if progress else None)

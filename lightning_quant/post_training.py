"""An int8 model from a float checkpoint: post-training quantization without a Trainer of the user's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lightning_quant._roots import root_of
from lightning_quant.backends import check_classes
from lightning_quant.capture import Capture
from lightning_quant.config import (
    ExportConfig,
    PostTrainingMethod,
    QuantConfig,
    check_method,
    resolve,
    resolve_formats,
)
from lightning_quant.correcting import correct
from lightning_quant.errors import ConfigError
from lightning_quant.evaluate import copy_of, evaluate
from lightning_quant.exporters import check_writable
from lightning_quant.fallback import Task, Tuned, goal_of, within_bound
from lightning_quant.from_checkpoint import made_datamodule, read, restored, validation_data_of
from lightning_quant.inputs import isolated_rng, sample_without_trainer
from lightning_quant.parts import Graphs, convert_module
from lightning_quant.pipeline import calibrate, capture, check_dtypes, deliver, prepare_graphs
from lightning_quant.progress import SILENT, Progress
from lightning_quant.report import QuantReport
from lightning_quant.tuning import Goal
from lightning_quant.within_size import Fitted, amended, check_max_size, within_size

_THIS = "lightning_quant.quantize_checkpoint"


def quantize_checkpoint(
    checkpoint: str | Path,
    module: Any,
    config: QuantConfig | None = None,
    *,
    method: PostTrainingMethod = "static",
    datamodule: Any = None,
    calibration_batches: int | None = None,
    directory: str = "quantized",
    formats: Iterable[str] | None = None,
    progress: Progress = SILENT,
    max_drop: float | None = None,
    monitor: str | None = None,
    mode: Literal["min", "max"] | None = None,
    relative: bool = False,
    max_size: str | None = None,
) -> QuantReport:
    """Calibrate, convert, export, verify and report, from the weights of a float checkpoint.

    It does what ``Trainer.validate`` does with :class:`lightning_quant.PostTrainingQuantization`.

    Args:
        checkpoint: Saved by a Trainer, with or without this package. It is read with ``weights_only=True``: no code in
            it is run.
        module: The LightningModule that was trained (not changed), or its class, for which the checkpoint has
            hyperparameters.
        config: Default: ``QuantConfig()``.
        method: ``static`` calibrates activations on validation data; ``dynamic`` takes their ranges at run time.
        datamodule: A LightningDataModule or its class; None: the dataloaders of the module.
        calibration_batches: How many batches are observed; None: all.
        directory: Where the files go.
        formats: Which files. None: the usual ones (:class:`lightning_quant.ExportConfig`).
        progress: Where lines show the steps; :data:`lightning_quant.progress.CONSOLE`: on the terminal.
        max_drop: As that of :class:`lightning_quant.PostTrainingQuantization`; so are the next ones.
        monitor: With ``max_drop``: the name of a metric that the module logs in validation.
        mode: With ``max_drop``: ``max`` if more of it is better, ``min`` if less is; None: by the words in its name.
        relative: With ``max_drop``: it is a share of the float value.
        max_size: The size that files of ONNX and OpenVINO may have, such as ``"1.5 MB"``.

    Returns:
        The report, which has been written beside the files.

    Raises:
        ConfigError: The config cannot do the method, the module cannot be made, there is no data to calibrate on, or
            settings of the bound contradict each other.
        ArtifactError: The file cannot be read as a checkpoint.
        CaptureError: There is no input, or nothing that can be quantized.
        ExportError: A file could not be written, or computes something else.
    """
    config = config or QuantConfig()
    export = ExportConfig(directory=directory, formats=None if formats is None else tuple(formats))  # type: ignore[arg-type]  # checked by ExportConfig
    _check(config, method, export, calibration_batches)
    goal = goal_of(_THIS, config, max_drop=max_drop, monitor=monitor, mode=mode, relative=relative)
    if max_size is not None:
        check_max_size(max_size, config, method, export, max_drop)
    module, datamodule = load_pair(Path(checkpoint), module, datamodule)
    with isolated_rng(), torch.device("cpu"):
        data = validation_data_of(module, datamodule)
        if data is None and method == "static":
            raise ConfigError(
                f"static quantization calibrates on validation data, and {_name(module)} has none: give a datamodule "
                "with a val dataloader (--data my_package.MyDataModule), define validation_step, or use "
                "method='dynamic', which needs no data."
            )
        sample = sample_without_trainer(module, data, None)
        captured = capture(module, sample, config, method)
        check_dtypes(module, captured)
        graphs = prepare_graphs(copy_of(module), captured, config, method)
        metrics = None
        if data is not None and method == "static":
            metrics = calibrate(module, graphs, data, batches=calibration_batches, progress=progress)
            graphs = correct(module, graphs, data, batches=calibration_batches, progress=progress)
        found: Tuned | Fitted | None = None
        if goal is not None or max_size is not None:
            if data is None:
                raise ConfigError(f"max_drop={max_drop}: there is no validation data to evaluate {monitor!r} on.")
            task = Task(module, sample, data, config, method, calibration_batches)
            metrics = metrics or evaluate(copy_of(module), data)
            found = _searched(task, captured, graphs, goal, max_size, metrics, export)
            captured, graphs, config = found.captured, found.graphs, found.outcome.config(config)
        quantized = convert_module(module, graphs)
        return deliver(
            quantized, captured, sample, data, config, method, export, metrics_float=metrics, progress=progress,
            amend=lambda report: amended(report, found),
        )  # fmt: skip


def _searched(
    task: Task,
    captured: Capture,
    graphs: Graphs,
    goal: Goal | None,
    max_size: str | None,
    metrics: dict[str, float],
    export: ExportConfig,
) -> Tuned | Fitted:
    """What a bound asks for, on a metric or on the size of files: one of them is given."""
    if goal is not None:
        return within_bound(task, captured, graphs, goal, metrics, export.path)
    assert max_size is not None
    return within_size(task, captured, graphs, max_size, export)


def _check(
    config: QuantConfig, method: PostTrainingMethod, export: ExportConfig, calibration_batches: int | None
) -> None:
    """Find out before any work is done what would fail after it."""
    if method not in get_args(PostTrainingMethod):
        raise ConfigError(
            f"quantize_checkpoint(method={method!r}): give 'static' or 'dynamic'. To train with fake quantize, use "
            "QuantizationAwareTraining."
        )
    check_method(config, method)
    check_classes(config)
    resolve(config)
    resolve_formats(config, method, export)
    if calibration_batches is not None and calibration_batches < 1:
        raise ConfigError(f"calibration_batches={calibration_batches!r}: give 1 or more, or None for all.")
    check_writable(export.path)


def load_pair(path: Path, module: Any, datamodule: Any) -> tuple[Any, Any]:
    """The module with the weights of a checkpoint, and the datamodule; each may be given as its class.

    Raises:
        ConfigError: One of them cannot be made, or they are of two Lightning packages.
        ArtifactError: The file cannot be read as a checkpoint.
    """
    whole = read(path, _THIS)
    module = restored(module, path, whole, _THIS)
    datamodule = made_datamodule(datamodule, path, _THIS)
    check_pair(module, datamodule)
    return module, datamodule


def check_pair(module: Any, datamodule: Any) -> None:
    """Refuse a module of one Lightning package and data of the other.

    Raises:
        ConfigError: They are.
    """
    root = root_of(module)
    if datamodule is not None and not isinstance(datamodule, root.LightningDataModule):
        raise ConfigError(
            f"{_name(module)} is a LightningModule of {root.__name__}, and {_name(datamodule)} is no "
            f"LightningDataModule of it. Import both from {root.__name__}."
        )


def _name(value: Any) -> str:
    return type(value).__name__

"""PostTrainingQuantization: hooks only, no quantization logic.

The order of Lightning's hooks decides where each thing happens; the comments say why.
"""

from __future__ import annotations

import logging
from dataclasses import MISSING, fields
from typing import Any, Literal

from lightning_quant.attachment import state_of
from lightning_quant.callbacks.base import QuantizationCallback, _check_trainer
from lightning_quant.capture import Capture
from lightning_quant.config import ExportConfig, PostTrainingMethod, QuantConfig
from lightning_quant.correcting import correct
from lightning_quant.errors import CalibrationError, ConfigError
from lightning_quant.evaluate import ValidationData, copy_of, evaluate, validation_data
from lightning_quant.exporters import check_writable
from lightning_quant.fallback import Task, Tuned, goal_of, within_bound
from lightning_quant.from_checkpoint import nothing_is_lost
from lightning_quant.inputs import has_validation, isolated_rng, validation_data_of_test
from lightning_quant.parts import Graphs, convert_module
from lightning_quant.pipeline import calibrate, prepare_graphs
from lightning_quant.progress import progress_of
from lightning_quant.report import QuantReport
from lightning_quant.team import all_ranks
from lightning_quant.tuning import Goal, with_skips
from lightning_quant.within_size import Fitted, amended, check_max_size, with_layers, within_size

log = logging.getLogger(__name__)


class PostTrainingQuantization(QuantizationCallback):
    """Calibrate on the val dataloader, convert to int8, export, verify and report.

    In ``fit`` training is untouched, and quantization follows it; in ``validate`` it follows validation. Afterwards
    ``report`` and ``quantized_model`` are there, and ``test`` runs the int8 model.

    Args:
        config: What is quantized, and how.
        method: ``static`` calibrates activations on the val dataloader; ``dynamic`` takes their ranges at run time.
        calibration_batches: How many batches are observed, on each process; None: all.
        export: Which files are written, and where.
        plan_only: Write ``plan.yaml`` into the folder of ``export``, which says what would be done with each layer,
            before training or validation begins, and do nothing else: the run goes on as without this callback.
        max_drop: Leave as few layers in float as are needed so that the metric ``monitor`` is worse than in float by no
            more than this. Where that cannot be, the best that was found is delivered, with a warning. None: quantize
            all that ``config`` says.
        monitor: With ``max_drop``: the name of a metric that the module logs in validation.
        mode: With ``max_drop``: ``max`` if more of it is better, ``min`` if less is; None: by the words in its name.
        relative: With ``max_drop``: it is a share of the float value.
        max_evaluations: With ``max_drop``: how many sets of layers are tried at the most.
        max_seconds: With ``max_drop``: when no further set is tried. None: never.
        max_size: A size such as ``"1.5 MB"`` (units: B, kB, MB, GB, KiB, MiB, GiB): layers are given weights of 4 bits,
            those first where that costs least, until the files of ONNX and of OpenVINO are no larger. Where that cannot
            be, the smallest are delivered, with a warning. Not together with ``max_drop``.

    Raises:
        ConfigError: The config cannot do the method, a format that was named cannot be written, or settings of the
            bound contradict each other.
        MissingExtraError: A format that was named needs a package that is not installed.

    >>> PostTrainingQuantization(QuantConfig(skip=("*.head",)), calibration_batches=8).method
    'static'
    """

    def __init__(
        self,
        config: QuantConfig = QuantConfig(),
        *,
        method: PostTrainingMethod = "static",
        calibration_batches: int | None = None,
        export: ExportConfig = ExportConfig(),
        plan_only: bool = False,
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        relative: bool = False,
        max_evaluations: int = 20,
        max_seconds: float | None = None,
        max_size: str | None = None,
    ) -> None:
        if method not in ("static", "dynamic"):
            raise ConfigError(
                f"PostTrainingQuantization(method={method!r}): give 'static' or 'dynamic'. To train with fake "
                "quantize, use QuantizationAwareTraining."
            )
        is_count = isinstance(calibration_batches, int) and not isinstance(calibration_batches, bool)
        if calibration_batches is not None and (not is_count or calibration_batches < 1):
            raise ConfigError(f"calibration_batches={calibration_batches!r}: give 1 or more, or None for all.")
        super().__init__(config, method, export, plan_only)
        self.calibration_batches = calibration_batches
        self.goal = goal_of(
            type(self).__name__, config, max_drop=max_drop, monitor=monitor, mode=mode, relative=relative,
            max_evaluations=max_evaluations, max_seconds=max_seconds,
        )  # fmt: skip
        if max_size is not None:
            check_max_size(max_size, config, method, export, max_drop)
        self.max_size = max_size
        self._data: ValidationData | None = None
        self._tuned: Tuned | Fitted | None = None

    @property
    def tuned_config(self) -> QuantConfig | None:
        """The config that gives the last run's result without its search; None: there was none."""
        report = self.report
        if report is None or report.search is None:
            return None
        if "max_size" in report.search:
            return with_layers(self.config, report.search["layers"])
        return with_skips(self.config, report.search["left_float"])

    @property
    def _used_config(self) -> QuantConfig:
        return self.config if self._tuned is None else self._tuned.outcome.config(self.config)

    def _amended(self, report: QuantReport) -> QuantReport:
        return amended(report, self._tuned)

    def _arguments(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "method": (self.method, "static"),
            "calibration_batches": (self.calibration_batches, None),
        }
        own["max_size"] = (self.max_size, None)
        if self.goal is None:
            return own
        unset = {part.name: None if part.default is MISSING else part.default for part in fields(Goal)}
        return {**own, **{name: (getattr(self.goal, name), default) for name, default in unset.items()}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find out before any work is done what would fail after it."""
        self._take_off(pl_module)
        if stage == "test":
            _check_trainer(trainer)
            self._watch_loading(pl_module)
        if stage not in ("fit", "validate"):
            return
        _check_trainer(trainer)
        if self.method == "static" and not has_validation(trainer, pl_module):
            raise ConfigError(
                "static quantization calibrates on validation data, and there is none: give the Trainer a val "
                "dataloader, "
                "define validation_step, and leave limit_val_batches above 0. Or use method='dynamic', which needs no "
                "data."
            )
        if self.plan_only or not trainer.fast_dev_run:
            all_ranks().by_first(lambda: check_writable(self.export.path))
        if self.plan_only:
            self._when_built(pl_module, lambda module: self._plan(trainer, module))
            return
        self._when_built(pl_module, lambda module: self._captured_by_each(trainer, module))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The module is on the CPU and unwrapped, and the val dataloader is still there."""
        again = "Write the files again with trainer.validate(...) and this callback."
        with nothing_is_lost(lambda: again):
            self._quantize(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """After ``validate``, out of its inference mode; after every stage, take off what was put on."""
        self._take_off(pl_module)
        if stage == "validate":
            self._quantize(trainer, pl_module)

    def _quantize(self, trainer: Any, pl_module: Any) -> None:
        self._take_off(pl_module)
        if self.plan_only:
            return
        assert self._captured is not None
        all_ranks().give(state_of(pl_module))
        self._data = validation_data(trainer)
        self._tuned = None
        with isolated_rng():
            graphs, metrics = self._calibrated(trainer, pl_module, self._captured, self._data)
            if self.goal is not None and not trainer.fast_dev_run:
                graphs, metrics = self._within_bound(pl_module, graphs, metrics, self.goal)
            if self.max_size is not None and not trainer.fast_dev_run:
                assert self._data is not None  # static quantization has calibrated on it
                task = self._task(pl_module, self._data)
                self._tuned = within_size(task, self._captured, graphs, self.max_size, self.export)
                self._captured, graphs = self._tuned.captured, self._tuned.graphs
        self._finish(trainer, pl_module, graphs, self._data, metrics_float=metrics)

    def _within_bound(
        self, pl_module: Any, graphs: Graphs, metrics: dict[str, float] | None, goal: Goal
    ) -> tuple[Graphs, dict[str, float]]:
        assert self._captured is not None
        if self._data is None:
            raise ConfigError(f"max_drop={goal.max_drop}: there is no validation data to evaluate {goal.monitor!r} on.")
        task = self._task(pl_module, self._data)
        found = metrics if metrics is not None else evaluate(copy_of(pl_module), self._data)
        self._tuned = within_bound(task, self._captured, graphs, goal, found, self.export.path)
        self._captured = self._tuned.captured
        return self._tuned.graphs, found

    def _task(self, pl_module: Any, data: ValidationData) -> Task:
        assert self._sample is not None
        return Task(pl_module, self._sample, data, self.config, self.method, self.calibration_batches)

    def _captured_by_each(self, trainer: Any, pl_module: Any) -> None:
        all_ranks().by_each(lambda: self._capture(trainer, pl_module) and None)

    def _calibrated(
        self, trainer: Any, pl_module: Any, captured: Capture, data: ValidationData | None
    ) -> tuple[Graphs, dict[str, float] | None]:
        graphs = prepare_graphs(copy_of(pl_module), captured, self._used_config, self.method)
        if self.method == "dynamic":
            return graphs, None
        if data is None:
            raise CalibrationError("static quantization has no validation data to calibrate on.")
        progress = progress_of(trainer)
        metrics = calibrate(pl_module, graphs, data, batches=self.calibration_batches, progress=progress)
        return correct(pl_module, graphs, data, batches=self.calibration_batches, progress=progress), metrics

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Run the int8 model; with ``ckpt_path``, that of the checkpoint's weights, calibrated afresh."""
        if self.plan_only:
            return
        if self._loaded is not None:
            log.info("test: the checkpoint's weights are calibrated and converted to int8 afresh.")
            captured = self._captured or self._capture(trainer, pl_module)[1]
            with isolated_rng():
                data = self._data or validation_data_of_test(trainer, pl_module)
                graphs, _ = self._calibrated(trainer, pl_module, captured, data)
                self._converted = convert_module(pl_module, graphs).converted
        self._put_int8(pl_module)

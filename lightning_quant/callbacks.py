"""PostTrainingQuantization and QuantizationAwareTraining: hooks only, no quantization logic.

The order of Lightning's hooks decides where each thing happens; the comments say why.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from typing import Any, Literal
from uuid import uuid4

import torch

from lightning_quant._roots import Callback
from lightning_quant.attachment import (
    after_method,
    around_method,
    attach,
    attached_to,
    detach,
    keep_from_broadcast,
    relink,
    state_of,
    unbind,
)
from lightning_quant.averaging import Averages, averages_of, prepare_averages
from lightning_quant.backends import check_classes
from lightning_quant.backends.graph import info, is_initialised
from lightning_quant.capture import Capture
from lightning_quant.config import (
    ExportConfig,
    Method,
    PostTrainingMethod,
    QuantConfig,
    check_method,
    resolve,
    resolve_formats,
)
from lightning_quant.distillation import Distillation, Distiller, check_optimization
from lightning_quant.errors import CalibrationError, ConfigError
from lightning_quant.evaluate import ValidationData, copy_of, evaluate, validation_data
from lightning_quant.exporters import check_writable
from lightning_quant.fallback import Task, Tuned, goal_of, within_bound
from lightning_quant.from_checkpoint import (
    CHECKPOINT_KEY,
    check_quantized,
    example_of,
    how_to_export,
    load_observers,
    nothing_is_lost,
    settings,
    trained_graphs,
)
from lightning_quant.inputs import Sample, has_validation, isolated_rng, sample, validation_data_of_test
from lightning_quant.logging_to import log_report
from lightning_quant.parts import Graphs, convert_module
from lightning_quant.phases import FLOAT, Phase, Phases, Schedule, observer_state
from lightning_quant.pipeline import (
    calibrate,
    capture,
    check_dtypes,
    deliver,
    loaded_model,
    prepare_graphs,
    put_files,
)
from lightning_quant.placement import ToGraph, divert, recompile, restore, uncompile
from lightning_quant.planning import Plan, plan_of
from lightning_quant.precision import check_precision
from lightning_quant.progress import progress_of
from lightning_quant.provenance import made_by
from lightning_quant.pruning import check_pruning, hold, mask_gradients
from lightning_quant.rank_steps import RankSteps
from lightning_quant.ranks import check_ranks, merge_ranks
from lightning_quant.report import QuantReport, modified, report_of
from lightning_quant.scale_training import ScaleTraining, train_scales
from lightning_quant.strategies import check_strategy, is_parallel
from lightning_quant.team import all_ranks
from lightning_quant.tuning import Goal, with_skips
from lightning_quant.within_size import Fitted, amended, check_max_size, with_layers, within_size

log = logging.getLogger(__name__)


def _check_trainer(trainer: Any) -> None:
    """Refuse what would give wrong results, with the remedy."""
    check_strategy(trainer)
    check_precision(trainer)
    check_pruning(trainer)
    ours = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, QuantizationCallback)]
    if len(ours) > 1:
        raise ConfigError(
            f"the Trainer has {len(ours)} quantization callbacks, {' and '.join(ours)}: they would undo each other. "
            "Give one."
        )


#: Where Lightning's WeightAveraging puts the weights that train; those in ``state_dict`` are the average then.
_AVERAGED = "current_model_state"


def _write_state(checkpoint: dict[str, Any], state: dict[str, Any], *, averaged: bool) -> None:
    """Keep the state beside the float weights; that of optimizers only where the checkpoint has the float one.

    Args:
        checkpoint: Changed in place.
        state: Of :meth:`QuantizationAwareTraining._state`.
        averaged: The weights in ``checkpoint["state_dict"]`` are an average, and those that train lie beside them.
    """
    kept = {key: value for key, value in state.items() if key in checkpoint or key != "optimizer_states"}
    averages = kept.pop("averages", None)
    if averaged and averages is not None:
        kept |= {"observers": averages, "current_observers": kept["observers"]}
    checkpoint.setdefault(CHECKPOINT_KEY, kept)


#: What a callback has of a run. It cannot be pickled, and another process would not want it.
_OF_A_RUN: dict[str, Any] = {
    **dict.fromkeys(("_report", "_written", "_quantized_model", "_converted", "_sample", "_captured", "_loaded")),
    **dict.fromkeys(("_data", "_phase", "_kept", "_scales", "_steps", "_averages", "_tuned", "_distiller")),
    "_before": {},
    "_frozen": [],
}


class QuantizationCallback(Callback):
    """What both callbacks do: find the targets before the run, and run the int8 model in ``test``."""

    def __init__(self, config: QuantConfig, method: Method, export: ExportConfig, plan_only: bool) -> None:
        super().__init__()
        if not isinstance(config, QuantConfig):
            raise ConfigError(f"config={config!r}: give a QuantConfig, e.g. lightning_quant.recipes.int8_static.")
        if not isinstance(export, ExportConfig):
            raise ConfigError(f"export={export!r}: give an ExportConfig.")
        check_method(config, method)
        check_classes(config)
        resolve(config)
        resolve_formats(config, method, export)
        self.config = config
        self.method: Method = method
        self.export = export
        self.plan_only = plan_only
        #: With ``plan_only``: the plan of the last run.
        self.plan: Plan | None = None
        self._report: QuantReport | None = None
        self._written: int | None = None
        self._quantized_model: Any = None
        #: Written into the report: the process that started others by ddp_spawn or ddp_fork finds theirs by it.
        self._run = uuid4().hex
        self._converted: Graphs | None = None
        self._sample: Sample | None = None
        self._captured: Capture | None = None
        self._loaded: dict[str, Any] | None = None
        self._is_built = False

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizationCallback:
        """A callback belongs to its Trainer: copies of a module that holds it, ours among them, share it."""
        return self

    @property
    def report(self) -> QuantReport | None:
        """Of the last run; None: there was none. Read from its file where the run was in other processes."""
        if modified(self.export.path) != self._written and (found := report_of(self.export.path, self._run)):
            return found
        return self._report

    @property
    def quantized_model(self) -> Any:
        """The LightningModule in int8, a copy; None: there was no run.

        In the process that started others by ``ddp_spawn`` or ``ddp_fork``: the native file of their run, loaded. It is
        called as the module is; where there is a file for each target, the targets are its submodules, by name.
        """
        report = self.report
        return self._quantized_model if report is None or report is self._report else loaded_model(report)

    def __getstate__(self) -> dict[str, Any]:
        """Of a callback in another process, which begins a run of its own: what it was made with."""
        return {name: _OF_A_RUN.get(name, value) for name, value in self.__dict__.items()}

    def _capture(self, trainer: Any, pl_module: Any) -> tuple[Sample, Capture]:
        # Lightning runs configure_model with the accelerator as default device; copies are traced on the CPU
        with isolated_rng(), torch.device("cpu"):
            self._sample = sample(
                trainer,
                pl_module,
                needs_validation=self.method == "static",
                trains_quantized=self.method == "qat" and trainer.state.fn.value == "fit",
            )
            self._captured = capture(pl_module, self._sample, self.config, self.method)
        check_dtypes(pl_module, self._captured)
        return self._sample, self._captured

    def _plan(self, trainer: Any, pl_module: Any) -> None:
        """Write what would be done; after it, this callback does nothing in the run."""
        team = all_ranks()
        taken, captured = team.by_each(lambda: self._capture(trainer, pl_module))
        with isolated_rng(), torch.device("cpu"):
            self.plan = team.by_each(lambda: plan_of(pl_module, captured, taken, self.config, self.method))
        path = self.export.path / "plan.yaml"
        team.by_first(lambda: self.plan.write(path) if self.plan else None)
        log.info("plan_only: the plan is in %s. The run goes on in float, as it would without this callback.", path)

    def _finish(
        self, trainer: Any, pl_module: Any, graphs: Graphs, data: ValidationData | None, **metrics: Any
    ) -> None:
        """Convert, deliver and show; the trained module is not touched, whatever fails here."""
        assert self._sample is not None
        assert self._captured is not None
        team = all_ranks()
        progress = progress_of(trainer)
        with isolated_rng():
            with progress.step("Converting", None):
                quantized = team.by_each(lambda: convert_module(pl_module, graphs))
            self._quantized_model = quantized.module
            self._converted = quantized.converted
            if trainer.fast_dev_run:
                log.info("fast_dev_run: the int8 model was converted; nothing was written.")
                return
            self._report = deliver(
                quantized, self._captured, self._sample, data, self._used_config, self.method, self.export,
                team=team, made_by=self._made_by(), progress=progress, run=self._run, amend=self._amended, **metrics,
            )  # fmt: skip
            self._written = modified(self.export.path)
        log_report(trainer, self._report)
        if trainer.is_global_zero:
            self._report.print()

    def _made_by(self) -> dict[str, Any]:
        """The callback and its arguments, for the report."""
        path = f"{__name__.partition('.')[0]}.{type(self).__name__}"
        return made_by(path, config=(self.config, None), **self._arguments(), export=(self.export, None))

    def _arguments(self) -> dict[str, Any]:
        """Argument of its own -> (value, default)."""
        return {}

    @property
    def _used_config(self) -> QuantConfig:
        return self.config

    def _amended(self, report: QuantReport) -> QuantReport:
        """The report with what this callback knows besides."""
        return report

    def _put_int8(self, pl_module: Any) -> None:
        uncompile(pl_module)
        report = self.report
        if self._loaded is None and report is not None and report is not self._report:  # of other processes
            return put_files(pl_module, report)
        if self._converted is None:
            return self._no_int8_yet()
        for name, graph in self._converted.items():
            # what a graph keeps may carry state, which is that of the quantized model
            graph = copy.deepcopy(graph) if info(graph).kept else graph
            divert(pl_module.get_submodule(name), ToGraph(graph, info(graph).interface, on_cpu=True))
        return None

    def _take_off(self, pl_module: Any) -> None:
        """Leave nothing of ours on the user's module."""
        unbind(pl_module)
        detach(pl_module)
        for module in pl_module.modules():
            restore(module)
        recompile(pl_module)

    def _when_built(self, pl_module: Any, then: Callable[[Any], object]) -> None:
        """Call ``then`` when the layers of LightningModule.setup and configure_model exist."""
        self._is_built = False

        def built(*_: Any, **__: Any) -> None:
            self._is_built = True

        def configured(module: Any) -> None:
            if self._is_built:  # Lightning's WeightAveraging calls configure_model before anything is set up
                then(module)

        after_method(pl_module, "setup", built)
        after_method(pl_module, "configure_model", configured)

    def _watch_loading(self, pl_module: Any) -> None:
        # bound on the module: Lightning calls a callback's own load hook after the weights are loaded, and not at
        # all for
        # checkpoints that were saved with save_weights_only
        self._loaded = None

        def remember(_: Any, checkpoint: dict[str, Any]) -> None:
            self._loaded = checkpoint.get(CHECKPOINT_KEY, {})

        after_method(pl_module, "on_load_checkpoint", remember)

    def _no_int8_yet(self) -> None:
        log.warning(
            "there is no int8 model yet: this tests the float module. Run fit or validate with this callback first, or "
            "give test a ckpt_path."
        )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as a float module, with the weights that it has."""
        self._take_off(pl_module)


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
        return graphs, calibrate(pl_module, graphs, data, batches=self.calibration_batches, progress=progress)

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


class QuantizationAwareTraining(QuantizationCallback):
    """Train with fake quantize, then convert to int8, export, verify and report.

    The module keeps its layers, its Parameters and the keys of its ``state_dict``; observers are stored beside it in
    checkpoints. Afterwards ``report`` and ``quantized_model`` are there, and ``test`` runs the int8 model.

    Args:
        config: What is quantized, and how.
        start_epoch: The first epoch with fake quantize; before it, training is float training bit for bit.
        freeze_observers_epoch: From this epoch on, ranges of activations stay as they are; None: never. Later than
            ``freeze_batch_norm_epoch``: activations move when batch norms change to their running statistics, and
            ranges that are frozen by then clip them.
        freeze_batch_norm_epoch: From this epoch on, batch norms use and keep their running statistics; None: never.
        distill: Let the float module from when quantization began be a teacher in the loss of ``training_step``; see
            :class:`lightning_quant.Distillation`. None: there is none. Checkpoints hold its weights beside the others.
        export: Which files are written, and where.
        plan_only: Write ``plan.yaml`` into the folder of ``export``, which says what would be done with each layer,
            before training begins, and do nothing else: training is float training, as without this callback.

    Raises:
        ConfigError: The config cannot train, a format that was named cannot be written, or epochs are out of order.
        MissingExtraError: A format that was named needs a package that is not installed.

    >>> QuantizationAwareTraining(start_epoch=1, freeze_batch_norm_epoch=2).schedule.phase(0).quantize
    False
    """

    def __init__(
        self,
        config: QuantConfig = QuantConfig(),
        *,
        start_epoch: int = 0,
        freeze_observers_epoch: int | None = None,
        freeze_batch_norm_epoch: int | None = None,
        distill: Distillation | None = None,
        export: ExportConfig = ExportConfig(),
        plan_only: bool = False,
    ) -> None:
        super().__init__(config, "qat", export, plan_only)
        if distill is not None and not isinstance(distill, Distillation):
            raise ConfigError(f"distill={distill!r}: give a Distillation, or None.")
        self.distill = distill
        self.schedule = Schedule(
            start_epoch=start_epoch,
            freeze_observers_epoch=freeze_observers_epoch,
            freeze_batch_norm_epoch=freeze_batch_norm_epoch,
        )
        self._phases: Phases | None = None
        self._example: dict[str, Any] | None = None
        self._before: dict[str, torch.Tensor] = {}
        self._kept: tuple[weakref.ref[Any], dict[str, Any]] | None = None
        self._scales: ScaleTraining | None = None
        self._steps: RankSteps | None = None
        self._averages: Averages | None = None
        self._distiller: Distiller | None = None

    def _arguments(self) -> dict[str, Any]:
        default = Schedule()
        return {"distill": (self.distill and asdict(self.distill), None)} | {
            part.name: (getattr(self.schedule, part.name), getattr(default, part.name)) for part in fields(default)
        }

    @property
    def phase(self) -> Phase:
        """What happens to the model now; outside of ``fit`` it is float."""
        return FLOAT if self._phases is None else self._phases.phase

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prepare after the layers exist, before the checkpoint is restored and the strategy wraps the module."""
        self._take_off(pl_module)
        self._watch_loading(pl_module)
        if stage != "fit":
            # the module keeps the weights of that checkpoint: what is saved or trained next has its ranges as well
            after_method(pl_module, "on_load_checkpoint", self._keep_loaded)
            if stage == "test":
                _check_trainer(trainer)
            return
        _check_trainer(trainer)
        if self.distill is not None:
            check_optimization(pl_module)
        if self.plan_only or not trainer.fast_dev_run:
            all_ranks().by_first(lambda: check_writable(self.export.path))
        if self.plan_only:
            self._when_built(pl_module, lambda module: self._plan(trainer, module))
            return
        self._when_built(pl_module, lambda module: self._prepare(trainer, module))
        after_method(pl_module, "on_save_checkpoint", self._save)

    def _prepare(self, trainer: Any, pl_module: Any) -> None:
        if attached_to(pl_module) is not None:
            return
        team = all_ranks()
        taken, captured = team.by_each(lambda: self._capture(trainer, pl_module))
        with isolated_rng(), torch.device("cpu"):
            graphs = team.by_each(lambda: prepare_graphs(pl_module, captured, self.config, self.method))
            attached = attach(pl_module, graphs)
            self._example = example_of(pl_module, taken)
        if is_parallel(trainer):
            check_ranks(attached, team.group)
            keep_from_broadcast(pl_module)
        if self.distill is not None:
            self._distiller = Distiller(self.distill, pl_module, self._graphs(pl_module), is_parallel(trainer))
            around_method(pl_module, "training_step", self._distiller.step)
        prepare_averages(trainer, pl_module)

    def _graphs(self, pl_module: Any) -> Graphs:
        attached = attached_to(pl_module)
        return attached.named() if attached is not None else {}

    def _save(self, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Lightning calls the module's hook also for save_weights_only, a callback's it does not
        state = self._state(pl_module)
        if self._phases is None and (restored := self._restored(pl_module)):
            # a search before the training (LearningRateFinder, BatchSizeFinder): it loads this file at its end, and
            # what a checkpoint or the last run left would be forgotten
            state = restored
        _write_state(checkpoint, state, averaged=_AVERAGED in checkpoint)

    def _state(self, pl_module: Any) -> dict[str, Any]:
        state: dict[str, Any] = {
            "observers": {name: observer_state(graph) for name, graph in self._graphs(pl_module).items()},
            "phase": asdict(self.phase),
            "example": self._example,
            **settings(self.config, self.export),
        }
        if self._averages is not None and (averages := self._averages.state()) is not None:
            state["averages"] = averages
        if self._scales is not None and (kept := self._scales.state()):
            state["optimizer_states"] = kept
        if self._distiller is not None and (teacher := self._distiller.state()) is not None:
            state["teacher"] = teacher
        return state

    def _keep_loaded(self, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(CHECKPOINT_KEY)
        self._kept = (weakref.ref(pl_module), state) if state else None

    def _keep(self, pl_module: Any) -> None:
        if attached_to(pl_module) is not None:
            self._kept = (weakref.ref(pl_module), self._state(pl_module))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The weights are restored and on their device; optimizers are made, and their states not yet restored."""
        if self.plan_only:
            return
        relink(pl_module)
        self._phases = Phases(pl_module)
        self._scales = train_scales(self._graphs(pl_module), trainer.optimizers)
        self._averages = Averages(pl_module, averages_of(trainer))
        restored = self._restored(pl_module)
        if restored:
            self._load(pl_module, restored)
        if self._distiller is not None:
            self._distiller.restore(pl_module, restored or {})
        if self._loaded:
            self._scales.load_state(self._loaded.get("optimizer_states", {}))
        # on the module: after all callbacks, those that average among them
        after_method(pl_module, "on_train_batch_end", self._settle)
        after_method(pl_module, "on_train_epoch_end", self._settle)
        self._steps = RankSteps(self._graphs(pl_module).values()) if is_parallel(trainer) else None
        self._before = {name: x.detach().cpu().clone() for name, x in pl_module.state_dict().items()}
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= self.schedule.start_epoch:
            log.warning(
                "start_epoch=%d and max_epochs=%d: training ends before quantization begins, and there will be no int8 "
                "model.", self.schedule.start_epoch, trainer.max_epochs,
            )  # fmt: skip

    def _restored(self, pl_module: Any) -> dict[str, Any] | None:
        """What the observers begin with: that of the checkpoint, or of the last run. With a float one, nothing."""
        if self._loaded is not None:
            return self._loaded
        if self._kept is None or self._kept[0]() is not pl_module:
            return None
        # optimizers begin anew
        return {name: value for name, value in self._kept[1].items() if name != "optimizer_states"}

    def _load(self, pl_module: Any, state: dict[str, Any]) -> None:
        assert self._averages is not None
        averages = state["observers"]
        current = state.get("current_observers", averages) if self._averages.exist else averages
        load_observers(self._graphs(pl_module), current)
        self._averages.load(averages)

    def _settle(self, *_: Any, **__: Any) -> None:
        if self._averages is not None and self.phase.quantize:
            self._averages.settle()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Also of a run that resumes in the middle of an epoch, for which Lightning skips the epoch's hook."""
        self._enter(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Move the phase."""
        self._enter(trainer, pl_module)

    def _enter(self, trainer: Any, pl_module: Any) -> None:
        if self._phases is not None:
            self._phases.enter(self.schedule.phase(trainer.current_epoch))
        if self._distiller is not None:
            self._distiller.enabled = self.phase.quantize
            if self.phase.quantize:
                self._distiller.begin(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Frozen batch norms stay frozen whoever called ``train()`` in between, and pruned weights stay 0."""
        if self._phases is not None:
            self._phases.hold()
        if self.phase.quantize:
            hold(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """What ranks have seen becomes equal before anything is made of it: averages of weights, checkpoints."""
        self._agree()
        if self.phase.quantize:
            mask_gradients(pl_module)
        if self._steps is not None:
            self._steps.average_gradients(getattr(optimizer, "optimizer", optimizer))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Also of what came after the last step of an optimizer."""
        self._agree()

    def _agree(self) -> None:
        if self._steps is not None and self.phase.observe:
            self._steps.agree()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation leaves observers untouched; before the first training batch (sanity check) it is float."""
        self._agree()
        if self.phase.quantize:
            hold(pl_module)
        graphs = self._graphs(pl_module)
        if self._phases is not None:
            ready = bool(graphs) and all(is_initialised(graph) for graph in graphs.values())
            self._phases.pause(quantize=ready and self.schedule.phase(trainer.current_epoch).quantize)
        if self._averages is not None:  # an average takes their place now, and has to stand still as they do
            self._averages.settle()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Back to the phase of training."""
        if self._phases is not None:
            self._phases.enter(self._phases.phase)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Whatever else has observed becomes one, while the module is where its process group can send from."""
        if is_parallel(trainer) and (attached := attached_to(pl_module)) is not None:
            merge_ranks(attached)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The module is on the CPU and unwrapped; the weights are those that it holds now."""
        if self.plan_only:
            return
        # batch norms of the other ranks have the statistics of their own last batch
        team = all_ranks()
        team.give(state_of(pl_module))
        graphs = self._graphs(pl_module)
        if self._steps is not None:  # what another callback put in at the end, such as an average of weights
            RankSteps(graphs.values(), team.group).agree()
        self._keep(pl_module)
        relink(pl_module)
        with nothing_is_lost(lambda: how_to_export(trainer, pl_module)):
            self._convert(trainer, pl_module)

    def _convert(self, trainer: Any, pl_module: Any) -> None:
        graphs = self._graphs(pl_module)
        seen = {name: graph for name, graph in graphs.items() if is_initialised(graph)}
        if not seen:
            log.warning("quantization never began: no training batch ran with fake quantize. There is no int8 model.")
            return
        if len(seen) < len(graphs):
            unseen = ", ".join(name for name in graphs if name not in seen)
            log.warning("no training batch ran through %s: they stay float.", unseen)
        graphs = seen
        data = validation_data(trainer)
        metrics_before = None
        if data is not None and not trainer.fast_dev_run:
            before = copy_of(pl_module)
            before.load_state_dict(self._before)
            with isolated_rng():
                text = "Validating float, before training"
                metrics_before = evaluate(before, data, progress=progress_of(trainer), text=text)
        self._finish(trainer, pl_module, graphs, data, metrics_before=metrics_before)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Run the int8 model; with ``ckpt_path``, that of the checkpoint's weights and observers."""
        if self.plan_only:
            return
        if self._loaded is not None:
            label = "test(ckpt_path=...): this checkpoint"
            check_quantized(self._loaded, label)
            log.info("test: the checkpoint's weights and observers are converted to int8 afresh.")
            captured = self._captured or self._capture(trainer, pl_module)[1]
            with isolated_rng():
                graphs = trained_graphs(pl_module, captured, self.config, self._loaded, label)
                self._converted = convert_module(pl_module, graphs).converted
        self._put_int8(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave a float module, with the weights that it has."""
        self._keep(pl_module)
        self._take_off(pl_module)
        if self._kept is None or self._kept[0]() is not pl_module:
            return
        state = self._kept[1]

        def write(_: Any, checkpoint: dict[str, Any]) -> None:
            _write_state(checkpoint, state, averaged=_AVERAGED in checkpoint)

        def end(strategy: Any, _: BaseException) -> None:
            unbind(pl_module)
            unbind(strategy)

        # a ModelCheckpoint that saves on exceptions is called after this one; with save_weights_only it asks the
        # module alone. The strategy comes after all callbacks
        after_method(pl_module, "on_save_checkpoint", write)
        after_method(trainer.strategy, "on_exception", end)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """After the run, the module's own hook is off: checkpoints still get the observers that it ended with."""
        if attached_to(pl_module) is None and self._kept is not None and self._kept[0]() is pl_module:
            # what averages writes it in the same hook, earlier or later
            _write_state(checkpoint, self._kept[1], averaged=bool(averages_of(trainer)))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The user's module is a float module again, with the trained weights."""
        self._take_off(pl_module)

    def _take_off(self, pl_module: Any) -> None:
        if self._phases is not None:
            self._phases.end()
            self._phases = None
        if self._scales is not None:
            self._scales.end()
            self._scales = None
        if self._averages is not None:
            self._averages.end()
            self._averages = None
        self._steps = None
        self._distiller = None
        super()._take_off(pl_module)

"""What both callbacks do: hooks only, no quantization logic."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch

from lightning_quant._roots import Callback
from lightning_quant.attachment import after_method, detach, unbind
from lightning_quant.backends import check_classes
from lightning_quant.backends.graph import info
from lightning_quant.capture import Capture
from lightning_quant.config import ExportConfig, Method, QuantConfig, check_method, resolve, resolve_formats
from lightning_quant.errors import ConfigError
from lightning_quant.evaluate import ValidationData
from lightning_quant.from_checkpoint import CHECKPOINT_KEY
from lightning_quant.inputs import Sample, isolated_rng, sample
from lightning_quant.logging_to import log_report
from lightning_quant.parts import Graphs, convert_module
from lightning_quant.pipeline import capture, check_dtypes, deliver, loaded_model, put_files
from lightning_quant.placement import ToGraph, divert, recompile, restore, uncompile
from lightning_quant.planning import Plan, plan_of
from lightning_quant.precision import check_precision
from lightning_quant.progress import progress_of
from lightning_quant.provenance import made_by
from lightning_quant.pruning import check_pruning
from lightning_quant.report import QuantReport, modified, report_of
from lightning_quant.strategies import check_strategy
from lightning_quant.team import all_ranks

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


#: What a callback has of a run. It cannot be pickled, and another process would not want it.
_OF_A_RUN: dict[str, Any] = {
    **dict.fromkeys(("_report", "_written", "_quantized_model", "_converted", "_sample", "_captured", "_loaded")),
    **dict.fromkeys(
        ("_data", "_phase", "_kept", "_scales", "_steps", "_averages", "_tuned", "_distiller", "_oscillations")
    ),
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

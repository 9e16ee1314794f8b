"""My model lost accuracy: the tools of this package in the order in which a person would try them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console

from lightning_quant.analysis.sampling import standard_error
from lightning_quant.analysis.sensitivity import Sensitivity
from lightning_quant.capture import Capture
from lightning_quant.config import QuantConfig, near
from lightning_quant.correcting import correct
from lightning_quant.errors import ConfigError, QuantizationError, first_line
from lightning_quant.evaluate import copy_of, evaluate
from lightning_quant.fallback import Task, sensitivity_of, simulated_graphs, within_bound
from lightning_quant.formatting import shown_number, shown_share
from lightning_quant.from_checkpoint import validation_data_of
from lightning_quant.inputs import isolated_rng, sample_without_trainer
from lightning_quant.parts import Graphs, convert_module
from lightning_quant.pipeline import calibrate, capture, check_dtypes, prepare_graphs
from lightning_quant.post_training import load_pair
from lightning_quant.progress import SILENT, Progress
from lightning_quant.provenance import changed
from lightning_quant.samples import SampleCounter
from lightning_quant.tuning import Goal

#: Range estimators that are tried in place of the one of the config.
OBSERVERS: tuple[Literal["percentile", "entropy", "min_max"], ...] = ("percentile", "entropy", "min_max")
#: Layers that the console shows.
SHOWN = 8
#: With more of the work in float than this, training is the better way.
MUCH_FLOAT = 0.2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to quantize, tried.

    Attributes:
        text: What it is.
        config: Its settings.
        value: The metric of its int8 model.
        is_enough: It is within the bound.
    """

    text: str
    config: QuantConfig
    value: float
    is_enough: bool


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found.

    Attributes:
        goal: The bound.
        reference: The metric in float.
        error: The standard error of it; None: it cannot be known.
        trials: In the order in which they were tried; the first is the config that was given.
        not_tried: What could not be tried -> why.
        layers: What each layer costs. None: the first trial is enough.
        left_float: The share of multiply-accumulates that the search leaves in float; None: it was not needed.
    """

    goal: Goal
    reference: float
    error: float | None
    trials: tuple[Trial, ...]
    not_tried: dict[str, str]
    layers: Sensitivity | None
    left_float: float | None

    @property
    def best(self) -> Trial:
        """The first that is enough; else the one that loses least."""
        enough = [trial for trial in self.trials if trial.is_enough]
        return enough[0] if enough else min(self.trials, key=lambda t: self.goal.drop(self.reference, t.value))

    @property
    def advice(self) -> str:
        """What to do, in a sentence or two."""
        best, met = self.best, self.best.is_enough
        if met and best is self.trials[0]:
            return "Int8 is good enough as it is: there is nothing to do."
        if met and self.left_float is not None and best is self.trials[-1] and self.left_float > MUCH_FLOAT:
            return (
                f"{best.text} is enough, but {shown_share(self.left_float)} of the multiply-accumulates stay in float. "
                "Train with QuantizationAwareTraining to keep them in int8."
            )
        if met:
            return f"Use the settings below: {best.text}."
        return (
            f"Nothing that was tried is within the bound; {best.text} loses least. Train with "
            "QuantizationAwareTraining, give more or other calibration data, or allow more (--max-drop)."
        )

    def settings(self) -> str:
        """The config of the best trial, as YAML that ``lightning-quant ptq --config`` takes."""
        found = changed(self.best.config)
        return str(yaml.safe_dump(found, sort_keys=False)) if found else "{}\n"

    def print(self, console: Console | None = None) -> None:
        """Show what was found.

        Args:
            console: Where. None: on the terminal.
        """
        out = console or Console()

        def say(text: str) -> None:
            out.print(text, markup=False, highlight=False)

        sampling = "" if self.error is None else f" (standard error {self.error:.4f})"
        say(f"{self.goal.monitor} in float: {shown_number(self.reference)}{sampling}. Asked for: {self.goal.shown}.")
        for number, trial in enumerate(self.trials, 1):
            verdict = "enough" if trial.is_enough else "not enough"
            say(f"{number}. {trial.text}: {shown_number(trial.value)}, {verdict}")
        for text, why in self.not_tried.items():
            say(f"-  {text}: not tried, {why}")
        if self.layers is not None:
            out.print(self.layers.table(SHOWN))
        say(self.advice)
        if self.best is not self.trials[0]:
            say("Settings, for ptq --config:")
            say(self.settings().rstrip())


def diagnose(
    checkpoint: str | Path,
    module: Any,
    config: QuantConfig | None = None,
    *,
    monitor: str,
    max_drop: float = 0.005,
    mode: Literal["min", "max"] | None = None,
    relative: bool = False,
    datamodule: Any = None,
    calibration_batches: int | None = None,
    max_evaluations: int = 20,
    progress: Progress = SILENT,
) -> Diagnosis:
    """Find out why int8 costs accuracy, and which settings cost least.

    Tried in turn, until one is within the bound on the module's own validation metric: the config as it is, other range
    estimators, and the fewest layers left in float. Nothing is written.

    Args:
        checkpoint: Saved by a Trainer, with or without this package. No code in it is run.
        module: The LightningModule that was trained (not changed), or its class.
        config: What to begin with. Default: ``QuantConfig()``.
        monitor: Name of a metric that the module logs in validation.
        max_drop: How much worse than in float it may be.
        mode: ``max`` if more of it is better, ``min`` if less is; None: by the words in its name.
        relative: ``max_drop`` is a share of the float value.
        datamodule: A LightningDataModule or its class; None: the dataloaders of the module.
        calibration_batches: How many batches are observed; None: all.
        max_evaluations: How many sets of layers the search tries at the most.
        progress: Where lines show the steps.

    Raises:
        ConfigError: There is no validation data, the metric is not logged, or a setting cannot be.
        ArtifactError: The file cannot be read as a checkpoint.
        CaptureError: There is nothing that can be quantized.
    """
    config = config or QuantConfig()
    goal = Goal(monitor=monitor, max_drop=max_drop, mode=mode, relative=relative, max_evaluations=max_evaluations)
    if config.backend == "torchscript":
        raise ConfigError(
            "diagnose with backend='torchscript': its graphs have no float form in which single layers could be "
            "quantized. Use backend='fx', 'eager' or 'pt2e'."
        )
    module, datamodule = load_pair(Path(checkpoint), module, datamodule)
    with isolated_rng(), torch.device("cpu"):
        data = validation_data_of(module, datamodule)
        if data is None:
            raise ConfigError(
                "diagnose compares a metric of validation, and there is no validation data: give a datamodule with a "
                "val dataloader (--data my_package.MyDataModule), or define val_dataloader in the module."
            )
        sample = sample_without_trainer(module, data, None)
        counter = SampleCounter(data.root)
        floats = evaluate(copy_of(module), data, callbacks=[counter.callback], progress=progress, text="Float")
        if monitor not in floats:
            raise ConfigError(f"monitor={monitor!r}: the module does not log it in validation. {near(monitor, floats)}")
        task = Task(module, sample, data, config, "static", calibration_batches)
        error = standard_error(monitor, floats[monitor], counter.of_all(data.team))
        return _walk(task, goal, floats, error, progress)


def _walk(task: Task, goal: Goal, floats: dict[str, float], error: float | None, progress: Progress) -> Diagnosis:
    reference = floats[goal.monitor]
    trials: list[Trial] = []
    not_tried: dict[str, str] = {}

    def found(layers: Sensitivity | None = None, left_float: float | None = None) -> Diagnosis:
        return Diagnosis(
            goal=goal, reference=reference, error=error, trials=tuple(trials), not_tried=not_tried, layers=layers,
            left_float=left_float,
        )  # fmt: skip

    def attempt(text: str, config: QuantConfig) -> tuple[Capture, Graphs]:
        captured, graphs = _calibrated(replace(task, config=config), progress)
        int8 = convert_module(task.module, graphs).module
        value = evaluate(int8, task.data, progress=progress, text=f"Int8: {text}")[goal.monitor]
        trials.append(Trial(text=text, config=config, value=value, is_enough=goal.is_met(reference, value)))
        return captured, graphs

    captured, graphs = attempt("the settings as they are", task.config)
    if trials[-1].is_enough:
        return found()
    layers = sensitivity_of(task, simulated_graphs(graphs))
    for text, config in _other_ranges(task.config):
        try:
            attempt(text, config)
        except QuantizationError as refused:
            not_tried[text] = first_line(refused)
            continue
        if trials[-1].is_enough:
            return found(layers)
    drops = [goal.drop(reference, trial.value) for trial in trials]
    # other ranges are worth keeping if they win back half; of two that lose everything, one is better by chance
    start = trials[drops.index(min(drops))].config if min(drops) < drops[0] / 2 else task.config
    is_same = start is task.config
    task = replace(task, config=start)
    if not is_same:
        captured, graphs = _calibrated(task, progress)
    with tempfile.TemporaryDirectory() as folder:
        tuned = within_bound(task, captured, graphs, goal, floats, Path(folder), layers=layers if is_same else None)
    names, value = tuned.outcome.left_float, tuned.outcome.value
    if value is None:  # the budget was spent before int8 was evaluated
        value = evaluate(convert_module(task.module, tuned.graphs).module, task.data)[goal.monitor]
    text = f"{', '.join(names)} in float" if names else "no layer in float"
    config = tuned.outcome.config(start)
    trials.append(Trial(text=text, config=config, value=value, is_enough=goal.is_met(reference, value)))
    return found(layers, _share(layers, names))


def _calibrated(task: Task, progress: Progress) -> tuple[Capture, Graphs]:
    captured = capture(task.module, task.sample, task.config, task.method)
    check_dtypes(task.module, captured)
    graphs = prepare_graphs(copy_of(task.module), captured, task.config, task.method)
    calibrate(task.module, graphs, task.data, batches=task.calibration_batches, progress=progress)
    return captured, correct(task.module, graphs, task.data, batches=task.calibration_batches, progress=progress)


def _other_ranges(config: QuantConfig) -> Iterator[tuple[str, QuantConfig]]:
    for name in OBSERVERS if "choose_ranges" not in config.corrections else ():  # which chooses among them itself
        if config.activation.observer != name:
            yield f"activation ranges by {name}", replace(config, activation=replace(config.activation, observer=name))


def _share(layers: Sensitivity, names: tuple[str, ...]) -> float:
    """Of the multiply-accumulates, those in layers below one of ``names``."""
    total = sum(layer.macs for layer in layers.layers) or 1
    left = (x.macs for x in layers.layers if any(x.skip == n or x.skip.startswith(f"{n}.") for n in names))
    return sum(left) / total

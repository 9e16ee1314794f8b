"""QuantizationAwareTraining: hooks only, no quantization logic.

The order of Lightning's hooks decides where each thing happens; the comments say why.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from lightning_quant.attachment import (
    after_method,
    around_method,
    attach,
    attached_to,
    keep_from_broadcast,
    relink,
    state_of,
    unbind,
)
from lightning_quant.averaging import Averages, averages_of, prepare_averages
from lightning_quant.backends.graph import is_initialised
from lightning_quant.batch_norms import training_norms
from lightning_quant.callbacks.base import QuantizationCallback, _check_trainer
from lightning_quant.config import ExportConfig, QuantConfig
from lightning_quant.distillation import Distillation, Distiller, check_optimization
from lightning_quant.errors import ConfigError
from lightning_quant.evaluate import copy_of, evaluate, validation_data
from lightning_quant.exporters import check_writable
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
from lightning_quant.inputs import isolated_rng
from lightning_quant.oscillation import OscillationFreezing, Oscillations, threshold_at
from lightning_quant.parts import Graphs, convert_module
from lightning_quant.phases import FLOAT, Phase, Phases, Schedule, observer_state
from lightning_quant.pipeline import prepare_graphs
from lightning_quant.progress import progress_of
from lightning_quant.pruning import hold, mask_gradients
from lightning_quant.rank_steps import RankSteps
from lightning_quant.ranks import check_ranks, merge_ranks
from lightning_quant.reestimation import reestimate
from lightning_quant.report import QuantReport
from lightning_quant.scale_training import ScaleTraining, train_scales
from lightning_quant.strategies import is_parallel
from lightning_quant.team import all_ranks

log = logging.getLogger(__name__)


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


def _progress(trainer: Any, batch_idx: int, start_epoch: int) -> float:
    """The share of the quantized training that is done. It follows from where the training is, also when resumed."""
    done = 0.0
    if trainer.max_epochs is not None and trainer.max_epochs > start_epoch:
        batches = trainer.num_training_batches
        within = batch_idx / batches if 0 < batches < float("inf") else 0.0
        done = (trainer.current_epoch + within - start_epoch) / (trainer.max_epochs - start_epoch)
    if trainer.max_steps > 0:
        done = max(done, trainer.global_step / trainer.max_steps)
    return done


def _check_reestimate(batches: Any, freeze_batch_norm_epoch: int | None) -> None:
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
        raise ConfigError(f"reestimate_batches={batches!r}: give a number of batches, or 0 for none.")
    if batches and freeze_batch_norm_epoch is not None:
        raise ConfigError(
            f"reestimate_batches={batches} with freeze_batch_norm_epoch={freeze_batch_norm_epoch}: weights were "
            "trained with frozen statistics, and would be used with others. Give one of the two."
        )


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
        freeze_oscillations: Fix weights that go back and forth between two integers; see
            :class:`lightning_quant.OscillationFreezing`. None: they go on.
        reestimate_batches: At the end of the training, give batch norms the mean and variance of so many training
            batches, with the weights as they are then and with fake quantize; 0: they keep their moving averages.
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
        freeze_oscillations: OscillationFreezing | None = None,
        reestimate_batches: int = 0,
        export: ExportConfig = ExportConfig(),
        plan_only: bool = False,
    ) -> None:
        super().__init__(config, "qat", export, plan_only)
        if distill is not None and not isinstance(distill, Distillation):
            raise ConfigError(f"distill={distill!r}: give a Distillation, or None.")
        if freeze_oscillations is not None and not isinstance(freeze_oscillations, OscillationFreezing):
            raise ConfigError(f"freeze_oscillations={freeze_oscillations!r}: give an OscillationFreezing, or None.")
        _check_reestimate(reestimate_batches, freeze_batch_norm_epoch)
        self.distill = distill
        self.freeze_oscillations = freeze_oscillations
        self.reestimate_batches = reestimate_batches
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
        self._oscillations: Oscillations | None = None

    def _arguments(self) -> dict[str, Any]:
        default = Schedule()
        freezing = self.freeze_oscillations
        own = {
            "distill": (self.distill and asdict(self.distill), None),
            "freeze_oscillations": (freezing and asdict(freezing), None),
            "reestimate_batches": (self.reestimate_batches, 0),
        }
        return own | {
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
        if self.reestimate_batches and not pl_module.automatic_optimization:
            raise ConfigError(
                "reestimate_batches=... with manual optimization: training_step is run once more for the statistics of "
                "batch norms, and would move the weights. Use automatic optimization, or leave reestimate_batches out."
            )
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
        if self.reestimate_batches and not training_norms(pl_module):
            raise ConfigError(
                f"reestimate_batches={self.reestimate_batches}: {type(pl_module).__name__} has no batch norm with "
                "running statistics in training mode. Leave reestimate_batches out."
            )
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
        if self._oscillations is not None and (known := self._oscillations.state()):
            state["oscillations"] = known
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
        if self.freeze_oscillations is not None:
            self._oscillations = self._watch(trainer, pl_module, self.freeze_oscillations, restored or {})
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

    def _watch(
        self, trainer: Any, pl_module: Any, settings: OscillationFreezing, restored: dict[str, Any]
    ) -> Oscillations:
        if settings.final_threshold is not None and trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise ConfigError(
                "freeze_oscillations=...: the threshold goes to final_threshold at the end of the training, and this "
                "one has none that is known before. Give the Trainer max_epochs or max_steps, or "
                "OscillationFreezing(final_threshold=None)."
            )
        found = Oscillations(settings, self._graphs(pl_module), trainer.optimizers)
        if found.unwatched:
            log.warning(
                "freeze_oscillations: %d weights are rounded as part of a product or by a class of your own, and are "
                "not looked at (the first: %s).", len(found.unwatched), found.unwatched[0],
            )  # fmt: skip
        found.load(restored.get("oscillations", {}))
        return found

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
        if self._oscillations is not None:
            self._oscillations.enabled = self.phase.quantize
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
        if self._oscillations is not None:
            done = _progress(trainer, batch_idx, self.schedule.start_epoch)
            self._oscillations.threshold = threshold_at(self._oscillations.settings, done)

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
        relink(pl_module)
        if self.reestimate_batches and any(is_initialised(graph) for graph in graphs.values()):
            with nothing_is_lost(lambda: how_to_export(trainer, pl_module)):
                self._reestimate(trainer, pl_module)
        self._keep(pl_module)
        with nothing_is_lost(lambda: how_to_export(trainer, pl_module)):
            self._convert(trainer, pl_module)

    def _reestimate(self, trainer: Any, pl_module: Any) -> None:
        with progress_of(trainer).step("Estimating batch norms again", None):
            found = reestimate(trainer, pl_module, self.reestimate_batches, all_ranks())
        if found == 0:
            log.warning("reestimate_batches: no batch norm is in training mode at the end, and none was changed.")
        elif found < self.reestimate_batches:
            log.warning("reestimate_batches=%d: an epoch has %d batches.", self.reestimate_batches, found)

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

    def _amended(self, report: QuantReport) -> QuantReport:
        if self._oscillations is None:
            return report
        share = self._oscillations.share()
        if share == 0:
            log.warning("freeze_oscillations froze no weight: none oscillated as often as the threshold says.")
        return replace(report, notes=[*report.notes, f"{share:.2%} of the weights oscillated and were frozen."])

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
        if self._oscillations is not None:
            self._oscillations.end()
            self._oscillations = None
        self._steps = None
        self._distiller = None
        super()._take_off(pl_module)

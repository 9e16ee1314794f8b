"""The module's own validation loop on a copy, in a Trainer of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from modules import (
    RAW_MAX,
    BuiltInConfigureModel,
    BuiltInSetup,
    Classifier,
    Digits,
    OwnLoaders,
    convnet,
    different,
    merged,
    rows,
    surface,
    train_loader,
    trainer,
    val_loader,
    weights,
)
from roots import pl
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant import CalibrationError
from lightning_quant.evaluate import ValidationData, calibrate, copy_of, evaluate, validation_data
from lightning_quant.progress import Advance


class Takes(pl.Callback):
    """Takes the validation data of the run that it is in, where our callbacks do."""

    data: ValidationData | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.data = validation_data(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "validate":
            self.data = validation_data(trainer)


def data_of(model: pl.LightningModule, entry: str = "validate", data: Any = None, **limits: Any) -> ValidationData:
    takes = Takes()
    getattr(trainer(takes, **limits), entry)(model, **(data or {"datamodule": Digits()}))
    assert takes.data is not None
    return takes.data


@pytest.mark.parametrize("entry", ["fit", "validate"])
@pytest.mark.parametrize(
    ("limits", "data"),
    [
        ({}, lambda: {"datamodule": Digits()}),
        ({"limit_val_batches": 1}, lambda: {"datamodule": Digits()}),
        ({"limit_val_batches": 0.4}, lambda: {"datamodule": Digits(val_sets=2)}),
        ({}, dict),
    ],
    ids=["datamodule", "limited", "share of two", "the module's own"],
)
def test_metrics_are_those_of_trainer_validate(entry: str, limits: dict[str, Any], data: Any) -> None:
    model = OwnLoaders()
    found = data_of(model, entry, data(), **limits)
    metrics = evaluate(copy_of(model), found)
    assert metrics == merged(trainer(**limits).validate(model, **data()))
    assert evaluate(copy_of(model), found) == metrics


@pytest.mark.parametrize(
    "loaders",
    [val_loader, lambda: [val_loader(), val_loader(300, 7)], lambda: {"a": val_loader(), "b": val_loader(300, 7)}],
    ids=["one", "list", "dict"],
)
def test_bare_loaders(loaders: Any) -> None:
    model, takes = Classifier(convnet()), Takes()
    trainer(takes).fit(model, train_loader(), loaders())
    assert evaluate(copy_of(model), takes.data) == merged(trainer().validate(model, loaders()))


def test_no_data_where_there_is_no_validation() -> None:
    takes = Takes()
    trainer(takes, limit_val_batches=0).fit(Classifier(convnet()), Digits())
    assert takes.data is None


def test_a_copy_is_float_on_the_cpu_in_eval_mode_and_shares_nothing() -> None:
    model = Classifier(convnet())
    trainer().fit(model, Digits())
    before = surface(model)
    twin = copy_of(model)
    assert different(weights(twin), weights(model)) == []
    assert not any(part.training for part in twin.modules())
    assert twin._trainer is None
    tensors = [{x.data_ptr() for x in (*m.parameters(), *m.buffers())} for m in (model, twin)]
    assert not tensors[0] & tensors[1]
    assert surface(model) == before


class _Builds(BuiltInSetup):
    """Counts the hooks that would build it again."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["calls"] = []

    def prepare_data(self) -> None:
        self.__dict__["calls"].append("prepare_data")

    def setup(self, stage: str) -> None:
        self.__dict__["calls"].append("setup " + stage)
        self.net = convnet()

    def configure_model(self) -> None:
        self.__dict__["calls"].append("configure_model")

    def configure_callbacks(self) -> list[pl.Callback]:
        self.__dict__["calls"].append("configure_callbacks")
        return []

    def teardown(self, stage: str) -> None:
        self.__dict__["calls"].append("teardown " + stage)


class _Prepares(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append("setup " + stage)

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown " + stage)


def test_nothing_is_built_again() -> None:
    model, data = _Builds(), _Prepares()
    found = data_of(model, "fit", {"datamodule": data})
    calls, prepared = list(model.__dict__["calls"]), list(data.calls)
    assert prepared == ["prepare_data", "setup fit", "teardown fit"]
    twin = copy_of(model)
    state = weights(twin)
    evaluate(twin, found)
    assert different(weights(twin), state) == []
    assert model.__dict__["calls"] == calls
    assert twin.__dict__["calls"] == calls
    assert data.calls == prepared


@pytest.mark.parametrize("made_by", [BuiltInSetup, BuiltInConfigureModel])
def test_layers_that_were_made_late_stay(made_by: Any) -> None:
    model = made_by()
    found = data_of(model, "fit")
    assert evaluate(copy_of(model), found) == merged(trainer().validate(model, Digits()))


class _EvaluatesInside(pl.Callback):
    """Evaluates at the end of fit, in the middle of the user's own Trainer."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = self._look(trainer, pl_module)
        self.metrics = evaluate(copy_of(pl_module), validation_data(trainer))
        assert self._look(trainer, pl_module) == before

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        datamodule = trainer.datamodule
        return (
            module._trainer is trainer, datamodule.trainer is trainer, sorted(datamodule.__dict__),
            dict(trainer.callback_metrics), dict(trainer.logged_metrics), trainer.global_step, trainer.state.fn,
            trainer.state.stage, surface(module), module.val_acc.update_count, torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )  # fmt: skip


def test_the_running_trainer_is_left_alone() -> None:
    callback, model = _EvaluatesInside(), Classifier(convnet())
    runner = trainer(callback)
    runner.fit(model, Digits())
    assert callback.metrics == {name: runner.callback_metrics[name].item() for name in callback.metrics}


class _Demanding(Classifier):
    """Uses in validation what a Trainer gives."""

    def on_validation_start(self) -> None:
        self.batches = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.trainer.datamodule.val_sets == 1
        assert self.trainer.validating or self.trainer.sanity_checking or self.trainer.training
        self.logger.experiment.add_image("input", batch[0])
        super().validation_step(batch, batch_idx)
        self.batches += 1

    def on_validation_epoch_end(self) -> None:
        self.log("batches", float(self.batches))


def test_a_validation_step_that_uses_its_trainer() -> None:
    model = _Demanding(convnet())
    takes = Takes()
    trainer(takes, logger=pl.loggers.logger.DummyLogger()).validate(model, Digits())
    assert evaluate(copy_of(model), takes.data)["batches"] == 3


class _Halves(Digits):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 2, batch[1]


def test_every_transfer_hook_applies_once() -> None:
    seen: list[torch.Tensor] = []

    class Sees(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])
            super().validation_step(batch, batch_idx)

    model = Sees(convnet())
    found = data_of(model, data={"datamodule": _Halves()})
    seen.clear()
    evaluate(copy_of(model), found)
    raw = [batch[0] for batch in Digits().val_dataloader()]
    for ours, theirs in zip(seen, raw, strict=True):
        assert torch.equal(ours, theirs / 2 / RAW_MAX)


@pytest.mark.parametrize("empty", [DataLoader(rows(0, 0)), [DataLoader(rows(0, 0)), DataLoader(rows(0, 0))]])
@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
def test_no_batch_is_an_error(empty: Any) -> None:
    data = ValidationData(pl, empty, "sequential", None, 1.0)
    with pytest.raises(CalibrationError, match="the validation dataloader gave no batch"):
        evaluate(copy_of(Classifier(convnet())), data)


@pytest.mark.parametrize(("batches", "calls"), [(1, [1]), (3, [3]), (None, []), (9, [])])
def test_calibrate_stops_once_and_goes_on_for_the_metrics(batches: int | None, calls: list[int]) -> None:
    model = Classifier(convnet())
    found = data_of(model)
    twin, seen, stopped = copy_of(model), [], []
    twin.net.register_forward_hook(lambda *_: seen.append(1))
    metrics = calibrate(twin, found, lambda: stopped.append(len(seen)), batches=batches)
    assert stopped == calls
    assert len(seen) == 3
    assert metrics == evaluate(copy_of(model), found)


class Lines:
    """A progress bar that remembers its lines: what they say, of how many parts, and how many are done."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int | None, int]] = []

    @contextlib.contextmanager
    def step(self, text: str, total: int | None) -> Iterator[Advance]:
        done: list[str] = []
        yield done.append
        self.lines.append((text, total, len(done)))


def test_a_line_shows_the_batches(capsys: pytest.CaptureFixture[str]) -> None:
    model, lines = Classifier(convnet()), Lines()
    found = data_of(model)
    capsys.readouterr()
    evaluate(copy_of(model), found)
    evaluate(copy_of(model), found, progress=lines, text="Weighing")
    assert lines.lines == [("Weighing", 3, 3)]
    assert "".join(capsys.readouterr()) == ""


def test_a_line_of_a_loader_without_a_length_has_no_total() -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter([rows(0, 4)[i] for i in range(4)])

    model, lines = Classifier(convnet()), Lines()
    found = replace(data_of(model), loaders=DataLoader(Endless(), batch_size=2), limit_batches=1.0, datamodule=None)
    evaluate(copy_of(model), found, progress=lines, text="Weighing")
    assert lines.lines == [("Weighing", None, 2)]


def test_the_comparisons_of_these_tests_can_fail() -> None:
    model = Classifier(convnet())
    before, seen = weights(model), surface(model)
    assert different(before, weights(model)) == []
    with torch.no_grad():
        model.net[0].weight[0, 0, 0, 0] += 1e-6
    assert different(before, weights(model)) == ["net.0.weight"]
    assert different(before, {**before, "more": torch.zeros(1)}) == ["more"]
    for edit in (
        lambda m: m.net[1].eval(),
        lambda m: m.add_module("extra", nn.Identity()),
        lambda m: m.net.register_forward_hook(print),
        lambda m: m.__dict__.update(extra=1),
        lambda m: setattr(m.net, "forward", m.net[0].forward),
    ):
        twin = Classifier(convnet())
        assert surface(twin) == seen
        edit(twin)
        assert surface(twin) != seen

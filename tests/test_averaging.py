"""Averages of weights (EMA, SWA) beside quantization-aware training: their ranges are averaged with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modules import (
    BuiltInConfigureModel,
    BuiltInSetup,
    Classifier,
    Digits,
    FrozenNorm,
    as_test,
    convnet,
    different,
    merged,
    qat,
    trainer,
    weights,
)
from roots import part, pl
from torch import nn

from lightning_quant import ConfigError, QuantConfig, TensorSpec
from lightning_quant._roots import ROOTS
from lightning_quant.averaging import averages_of

EMAWeightAveraging = part("callbacks").EMAWeightAveraging
ModelCheckpoint = part("callbacks").ModelCheckpoint
StochasticWeightAveraging = part("callbacks").StochasticWeightAveraging
WeightAveraging = part("callbacks").WeightAveraging

pytestmark = [
    # of every module whose layers are found in it, as ours are
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside"),
]

KEY = "lightning_quant"
DECAY = 0.9
BOTH_KINDS = pytest.mark.parametrize("kind", ["auto", "learned"])


def settings(kind: Any) -> QuantConfig:
    return QuantConfig(activation=TensorSpec(fake_quantize=kind), weight=TensorSpec(fake_quantize=kind))


def ema(**kwargs: Any) -> Any:
    return EMAWeightAveraging(decay=DECAY, **kwargs)


def without_norm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def seeded(net: Any = convnet) -> Any:
    torch.manual_seed(11)
    return Classifier(net())


def fitted(*callbacks: Any, model: Any = None, **kwargs: Any) -> Any:
    model = model or seeded()
    runner = trainer(*callbacks, **{"max_epochs": 2, **kwargs})
    torch.manual_seed(12)
    runner.fit(model, Digits(shuffle=False))
    return runner, model


def observers_of(model: Any) -> dict[str, torch.Tensor]:
    """Of a module in training: its ranges, scales, zero points and flags."""
    attached = model._modules["_lightning_quant"]
    return {
        **{f"p.{n}": p.detach().clone() for n, p in nn.Module.named_parameters(attached) if n.endswith("scale")},
        **{n: b.detach().clone() for n, b in attached.named_buffers() if "fake_quant" in n or "post_process" in n},
    }


class Look(pl.Callback):
    """Notes the observers of the module and of its average at hooks."""

    def __init__(self, *hooks: str) -> None:
        self.current: dict[str, list[Any]] = {hook: [] for hook in hooks}
        self.average: dict[str, list[Any]] = {hook: [] for hook in hooks}
        for hook in hooks:
            setattr(self, hook, lambda trainer, module, *_, hook=hook: self._note(hook, trainer, module))

    def _note(self, hook: str, trainer: Any, module: Any) -> None:
        self.current[hook].append(observers_of(module))
        (average,) = averages_of(trainer)
        self.average[hook].append(observers_of(average.module))


def in_order(order: str, ours: Any, other: Any) -> list[Any]:
    return [ours, other] if order == "ours first" else [other, ours]


@pytest.mark.parametrize(
    ("kind", "use_buffers"),
    [("auto", True), ("learned", True), pytest.param("auto", False, marks=pytest.mark.slow), ("learned", False)],
)
@pytest.mark.parametrize("start_epoch", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_order_in_the_list_does_not_matter(kind: str, use_buffers: bool, start_epoch: int) -> None:
    ends = []
    for order in ("ours first", "ours last"):
        callback = qat(settings(kind), start_epoch=start_epoch)
        runner, model = fitted(
            *in_order(order, callback, ema(use_buffers=use_buffers)),
            model=seeded(convnet if use_buffers else without_norm),
        )
        report = callback.report
        # int8 of the average has the average's ranges: it is as near to its float model as without averages
        assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.02)
        assert merged(runner.validate(model, Digits(), verbose=False)) == report.metrics_float
        assert merged(runner.test(model, Digits(), verbose=False)) == as_test(report.metrics_int8)
        runner.save_checkpoint("after.ckpt")
        kept = torch.load("after.ckpt", weights_only=True)[KEY]["observers"]["net"]
        ends.append((weights(model), kept, report.metrics_int8))
    (first, ranges, metrics), (last, other_ranges, other_metrics) = ends
    assert different(first, last) == []
    assert different(ranges, other_ranges) == []
    assert metrics == other_metrics


@BOTH_KINDS
@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_ranges_are_averaged_from_when_they_begin(kind: str, order: str) -> None:
    """Beside an average that is computed here from what the module had after each step."""
    look = Look("on_train_batch_end", "on_train_end")
    callback = qat(settings(kind), start_epoch=1)
    fitted(*in_order(order, callback, ema()), look, max_epochs=3)
    steps = look.current["on_train_batch_end"]
    end = look.average["on_train_end"][0]
    begun = [name for name in end if name.endswith("min_val") or (kind == "learned" and name.startswith("p."))]
    assert len(begun) >= 5
    for name in begun:
        # the first step of epoch 1; weights are known before it
        first = next(i for i, step in enumerate(steps) if step[name].isfinite().all())
        assert first == (0 if "weight_fake_quant" in name else 6) or kind == "learned"
        if kind == "learned":  # a scale is trained after it has seen a pass
            flag = name.removeprefix("p.").replace("activation_post_process.min_val", "scale").rpartition(".")[0]
            first = next(i for i, step in enumerate(steps) if step[f"{flag}.learned"])
        expected = steps[first][name]
        for step in steps[first + 1 :]:
            expected = DECAY * expected + (1 - DECAY) * step[name]
        torch.testing.assert_close(end[name], expected)
    whole = [name for name, value in end.items() if not value.is_floating_point()]
    assert any(name.endswith("zero_point") for name in whole)
    assert [name for name in whole if not torch.equal(end[name], steps[-1][name])] == []


@BOTH_KINDS
@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_validation_moves_nothing_in_the_average(kind: str, order: str) -> None:
    look = Look("on_validation_start", "on_validation_end")
    fitted(*in_order(order, qat(settings(kind)), ema()), look, val_check_interval=0.5)
    for seen in (look.current, look.average):
        starts, ends = seen["on_validation_start"][1:], seen["on_validation_end"][1:]
        assert len(starts) == 4
        for start, end in zip(starts, ends, strict=True):
            follows = ("_enabled", ".scale", ".zero_point") if kind == "auto" else ("_enabled",)
            assert [n for n in different(start, end) if not n.endswith(follows)] == []


class Shown(pl.Callback):
    """What validation runs with: the average's ranges stand in the module, and nothing observes."""

    def __init__(self) -> None:
        self.ranges: list[dict[str, torch.Tensor]] = []

    def on_validation_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.ranges.append(observers_of(module))


def test_validation_runs_with_the_averages_ranges() -> None:
    shown, look = Shown(), Look("on_train_epoch_end")
    fitted(qat(), ema(), shown, look, max_epochs=1)
    average = look.average["on_train_epoch_end"][0]
    for during in shown.ranges:
        moved = [name for name in different(during, average) if not name.endswith("observer_enabled")]
        # scale and zero point follow the range
        assert [n for n in moved if not n.endswith((".scale", ".zero_point"))] == []
        assert not any(value.any() for name, value in during.items() if name.endswith("observer_enabled"))


def test_without_buffers_ranges_are_those_of_the_training() -> None:
    look = Look("on_train_batch_end", "on_train_end")
    fitted(qat(), ema(use_buffers=False), look, model=seeded(without_norm))
    last, end = look.current["on_train_batch_end"][-1], look.average["on_train_end"][0]
    assert [name for name in different(last, end) if not name.endswith("_enabled")] == []


def test_batch_norms_without_their_averages_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        fitted(qat(), ema(use_buffers=False))
    assert str(error.value) == (
        "WeightAveraging(use_buffers=False): at the end of the training, batch norms (the first: net.1) would have the "
        "statistics from before it, and int8 would be made with these. Use use_buffers=True, or keep batch norms in "
        "eval mode."
    )


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode at the start of training")
def test_frozen_batch_norms_need_no_averages() -> None:
    torch.manual_seed(11)
    callback = qat()
    fitted(callback, ema(use_buffers=False), model=FrozenNorm())
    report = callback.report
    assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.02)


@pytest.mark.parametrize("made_by", [BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_layers_that_are_built_late(made_by: Any, order: str) -> None:
    callback = qat()
    torch.manual_seed(11)
    _, model = fitted(*in_order(order, callback, ema()), model=made_by(), max_epochs=1)
    assert callback.report.targets == ["net"]
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits(), verbose=False))


def test_an_equally_weighted_average() -> None:
    callback = qat()
    fitted(callback, WeightAveraging())
    report = callback.report
    assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.02)


@pytest.mark.parametrize("kind", ["auto", pytest.param("learned", marks=pytest.mark.slow)])
def test_swa_in_both_orders(kind: str) -> None:
    ends = []
    for order in ("ours first", "ours last"):
        callback = qat(settings(kind))
        _, model = fitted(*in_order(order, callback, StochasticWeightAveraging(0.01, swa_epoch_start=1)))
        report = callback.report
        assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.05)
        assert int(model.net[1].num_batches_tracked) == 6  # its own epoch, after the averages were put in
        ends.append((weights(model), report.metrics_int8))
    assert different(ends[0][0], ends[1][0]) == []
    assert ends[0][1] == ends[1][1]


def keeper(folder: str) -> Any:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


@pytest.mark.parametrize(
    ("kind", "order", "start_epoch"),
    [
        ("auto", "ours first", 0),
        ("learned", "ours last", 1),
        *(
            pytest.param(kind, order, start, marks=pytest.mark.slow)
            for kind, order, start in (
                ("auto", "ours last", 0),
                ("auto", "ours first", 1),
                ("auto", "ours last", 1),
                ("learned", "ours first", 0),
                ("learned", "ours last", 0),
                ("learned", "ours first", 1),
            )
        ),
    ],
)
def test_resuming_equals_the_uninterrupted_run(kind: str, order: str, start_epoch: int) -> None:
    def run(folder: str, **kwargs: Any) -> Any:
        callback = qat(settings(kind), start_epoch=start_epoch)
        runner = trainer(*in_order(order, callback, ema()), keeper(folder), max_epochs=3, enable_checkpointing=True)
        model = seeded()
        runner.fit(model, Digits(shuffle=False), **kwargs)
        return weights(model), torch.load(f"{folder}/epoch=2.ckpt", weights_only=True), callback.report

    whole, whole_checkpoint, report = run("whole")
    resumed, resumed_checkpoint, again = run("resumed", ckpt_path="whole/epoch=0.ckpt")
    assert different(whole, resumed) == []
    for key in ("state_dict", "current_model_state"):
        assert different(whole_checkpoint[key], resumed_checkpoint[key]) == []
    for key in ("observers", "current_observers"):
        assert different(whole_checkpoint[KEY][key]["net"], resumed_checkpoint[KEY][key]["net"]) == []
    assert report.metrics_int8 == again.metrics_int8


@pytest.mark.slow
@BOTH_KINDS
def test_swa_resumes(kind: str) -> None:
    def run(folder: str, **kwargs: Any) -> Any:
        callback = qat(settings(kind))
        swa = StochasticWeightAveraging(0.01, swa_epoch_start=1)
        runner = trainer(callback, swa, keeper(folder), max_epochs=4, enable_checkpointing=True)
        model = seeded()
        runner.fit(model, Digits(shuffle=False), **kwargs)
        return weights(model), callback.report

    whole, report = run("whole")
    resumed, again = run("resumed", ckpt_path="whole/epoch=1.ckpt")
    assert different(whole, resumed) == []
    assert report.metrics_int8 == again.metrics_int8


def test_a_checkpoint_holds_the_averages_ranges_beside_the_average() -> None:
    """``state_dict`` is the average, and what is tested or goes on without it has the ranges of the average."""
    ended = qat()
    fitted(ended, ema(), max_epochs=1)
    fitted(qat(), ema(), keeper("ckpt"), enable_checkpointing=True)
    path = "ckpt/epoch=0.ckpt"
    tested = merged(trainer(qat()).test(seeded(), Digits(), ckpt_path=path, verbose=False, weights_only=True))
    assert tested == as_test(ended.report.metrics_int8)
    stored = torch.load(path, weights_only=True)[KEY]
    assert different(stored["observers"]["net"], stored["current_observers"]["net"])

    class Start(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            checkpoint: dict[str, Any] = {}
            module.on_save_checkpoint(checkpoint)
            self.observers = checkpoint[KEY]["observers"]["net"]

    start = Start()
    trainer(qat(), start, max_epochs=2).fit(seeded(), Digits(), ckpt_path=path, weights_only=True)
    assert different(start.observers, stored["observers"]["net"]) == []


def test_a_checkpoint_of_weights_alone_holds_those_that_train() -> None:
    """Lightning does not ask WeightAveraging for it."""
    look = Look("on_train_epoch_end")
    keep = ModelCheckpoint("ckpt", filename="{epoch}", save_weights_only=True)
    fitted(qat(), ema(), look, keep, max_epochs=1, enable_checkpointing=True)
    stored = torch.load("ckpt/epoch=0.ckpt", weights_only=True)[KEY]
    assert "current_observers" not in stored
    current = look.current["on_train_epoch_end"][0]
    name = next(name for name in current if name.endswith("min_val"))
    key = name.removeprefix("graphs.0.")
    assert torch.equal(stored["observers"]["net"][key], current[name])


def test_a_checkpoint_of_an_exception_is_consistent() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 4:
                raise ValueError("out of paper")
            return super().training_step(batch, batch_idx)

    look = Look("on_train_batch_end")
    keep = ModelCheckpoint("ckpt", save_on_exception=True)
    torch.manual_seed(11)
    with pytest.raises(ValueError, match="out of paper"):
        fitted(qat(), ema(), look, keep, model=Fails(convnet()), enable_checkpointing=True)
    (path,) = Path("ckpt").glob("*.ckpt")
    stored = torch.load(path, weights_only=True)
    for key, seen in (("observers", look.average), ("current_observers", look.current)):
        last = seen["on_train_batch_end"][-1]
        for name, value in last.items():
            if name.endswith(("min_val", "max_val")):
                assert torch.equal(stored[KEY][key]["net"][name.removeprefix("graphs.0.")], value), (key, name)


def test_nothing_is_left_on_the_average() -> None:
    averaging = ema()
    fitted(qat(settings("learned")), averaging, max_epochs=1)
    module = averaging._average_model.module
    assert "_lightning_quant" not in module._modules
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in seeded().named_parameters()]


def test_averages_of_every_lightning_package_are_found() -> None:
    for root in ROOTS:
        callback = root.callbacks.EMAWeightAveraging()
        assert averages_of(SimpleNamespace(callbacks=[callback])) == []
        callback._average_model = torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))
        assert averages_of(SimpleNamespace(callbacks=[callback, object()])) == [callback._average_model]


def test_an_average_that_never_saw_ranges_leaves_no_int8_model(caplog: pytest.LogCaptureFixture) -> None:
    callback = qat(start_epoch=2)
    fitted(callback, ema())
    assert "There is no int8 model" in caplog.text
    assert callback.report is None

"""Modules and submodules that ``torch.compile`` has wrapped, and a Trainer without inference mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Digits, as_test, convnet, different, merged, ptq, qat, trainer, weights
from roots import pl
from torch import nn

from lightning_quant.evaluate import copy_of
from lightning_quant.placement import recompile, uncompile


class Net(pl.LightningModule):
    """As little as can be: each line of a step is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convnet()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class OwnLayers(Net):
    """The graph is that of the module's own forward, which Lightning compiles as well."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    """Nothing is remembered of another test's modules."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def submodule(model: Any) -> Any:
    model.net = torch.compile(model.net, backend="eager")
    return model


def in_place(model: Any) -> Any:
    model.net.compile(backend="eager")
    return model


def run(callback: Any, compiled: Any = None, made_by: Any = Net, **kwargs: Any) -> Any:
    torch.manual_seed(11)
    model = made_by()
    runner = trainer(callback, **{"max_epochs": 2, **kwargs})
    torch.manual_seed(12)
    runner.fit(compiled(model) if compiled else model, Digits(shuffle=False))
    report = callback.report
    tested = merged(runner.test(model, Digits(), verbose=False))
    assert tested == as_test(report.metrics_int8)
    state = {name.replace("_orig_mod.", ""): value for name, value in weights(model).items()}
    return model, state, report


@pytest.mark.parametrize(
    ("compiled", "made_by", "start_epoch"),
    [
        (whole, Net, 1),
        (whole, OwnLayers, 0),
        (submodule, Net, 1),
        (in_place, Net, 1),
        pytest.param(in_place, Net, 0, marks=pytest.mark.slow),
    ],
)
def test_training_equals_that_of_the_plain_module(compiled: Any, made_by: Any, start_epoch: int) -> None:
    _, state, report = run(qat(start_epoch=start_epoch), made_by=made_by)
    _, found, same = run(qat(start_epoch=start_epoch), compiled, made_by)
    assert different(state, found) == []
    assert same.metrics_float == report.metrics_float
    assert same.metrics_int8 == report.metrics_int8


@pytest.mark.parametrize("compiled", [pytest.param(whole, marks=pytest.mark.slow), submodule, in_place])
def test_calibration_equals_that_of_the_plain_module(compiled: Any) -> None:
    _, state, report = run(ptq(), max_epochs=1)
    _, found, same = run(ptq(), compiled, max_epochs=1)
    assert different(state, found) == []
    assert same.metrics_float == report.metrics_float
    assert same.metrics_int8 == report.metrics_int8


def test_float_epochs_run_what_was_compiled() -> None:
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    counts = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            counts.append(len(graphs))

    torch.manual_seed(11)
    callback = qat(start_epoch=1)
    runner = trainer(callback, Count(), max_epochs=2)
    runner.fit(torch.compile(Net(), backend=backend), Digits(shuffle=False))
    assert counts[0] > 0
    assert counts[1] == counts[0]
    assert not any("fake_quant" in graph for graph in graphs)


def test_the_module_stays_compiled() -> None:
    plain: Any = Net()
    trainer(max_epochs=1).fit(whole(plain), Digits())
    model: Any = Net()
    trainer(qat(), max_epochs=1).fit(whole(model), Digits())
    assert list(model.state_dict()) == list(plain.state_dict())
    for name in ("forward", "training_step", "validation_step"):
        assert hasattr(model.__dict__[name], "_torchdynamo_orig_callable")
        assert hasattr(plain.__dict__[name], "_torchdynamo_orig_callable")
    assert model.__dict__.keys() == plain.__dict__.keys()


@pytest.mark.parametrize("compiled", [whole, submodule, in_place])
def test_a_copy_runs_itself(compiled: Any) -> None:
    """What was compiled is a function of the original, and a copy of the module has that function."""
    model = Net()
    trainer(max_epochs=1).fit(compiled(model), Digits())
    uncompile(model)
    twins = [copy_of(model)]
    recompile(model)
    twins.append(copy_of(model))
    x = torch.rand(2, 1, 8, 8)
    before = weights(model)
    for twin in twins:
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.count_nonzero(twin(x)) == 0
        assert torch.isfinite(twin.training_step((x, torch.tensor([1, 2])), 0))
        twin.train()(x)
    assert different(before, weights(model)) == []
    again = copy.deepcopy(model)
    recompile(again)


@pytest.mark.parametrize("compiled", [None, pytest.param(whole, marks=pytest.mark.slow)])
def test_without_inference_mode(compiled: Any) -> None:
    _, state, report = run(qat())
    _, found, same = run(qat(), compiled, inference_mode=False)
    assert different(state, found) == []
    assert same.metrics_int8 == report.metrics_int8


def test_calibration_without_inference_mode() -> None:
    reports = []
    for mode in (True, False):
        torch.manual_seed(11)
        callback, model = ptq(), Net()
        trainer(callback, inference_mode=mode).validate(model, Digits(), verbose=False)
        reports.append(callback.report)
    assert reports[0].metrics_int8 == reports[1].metrics_int8

"""Statistics of batch norms, taken once more with fake quantize, and the training that ends with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import Classifier, Digits, convnet, different, rows, trainer, weights
from roots import pl
from torch import nn

from lightning_quant import (
    ConfigError,
    ExportConfig,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    export_checkpoint,
    prepare,
    reestimate_batch_norms,
)
from lightning_quant.backends.graph import link, observers, sees_weights

BACKENDS = ["fx", "eager", "pt2e"]
SCHEMES = ["per_channel_symmetric", "per_tensor_symmetric"]


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


# ---- of a prepared module


def prepared_net(backend: Any, scheme: Any = "per_channel_symmetric") -> tuple[Any, Any]:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, momentum=None),
    ).train()  # fmt: skip
    config = QuantConfig(backend=backend, weight=TensorSpec(bits=4, qscheme=scheme))
    prepared = prepare(network, config, method="qat", example_inputs=torch.randn(4, 1, 8, 8))
    link(prepared, network)
    return network, prepared.train()


def batches(count: int = 5) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(8 - (i == count - 1) * 3, 1, 8, 8, generator=draw) * 2 + 1 for i in range(count)]


def norms_of(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_those_of_all_values(backend: Any, scheme: Any) -> None:
    """NumPy over what comes into each batch norm, by hooks of the test's own."""
    network, prepared = prepared_net(backend, scheme)
    prepared(batches()[0])
    seen: dict[int, list[np.ndarray]] = {}
    for norm in norms_of(prepared):
        norm.register_forward_hook(
            lambda module, args, _: seen.setdefault(id(module.running_mean), []).append(args[0].detach().numpy())
        )
    assert reestimate_batch_norms(prepared, batches()) == 5
    assert len(seen) == 3
    for norm in norms_of(network):
        values = np.concatenate([np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in seen[id(norm.running_mean)]], 1)
        # float64 sums of float32 values, kept in float32
        np.testing.assert_allclose(norm.running_mean, values.mean(1, dtype=np.float64), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(norm.running_var, values.var(1, ddof=1, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_else_stays_as_it_is(backend: Any) -> None:
    network, prepared = prepared_net(backend)
    prepared(batches()[0])
    found = observers(prepared)
    before = [weights(network), {n: weights(m) for n, m in found.items()}, [m.training for m in prepared.modules()]]
    momenta = [norm.momentum for norm in norms_of(prepared)]
    torch.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    reestimate_batch_norms(prepared, batches())
    assert torch.equal(torch.rand(3), drawn)  # no dropout
    changed = different(before[0], weights(network))
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var"}
    assert len(changed) == 6
    for name, module in found.items():
        if not sees_weights(prepared, name):  # those follow the weights, as in every pass of training
            assert different(before[1][name], weights(module)) == []
    assert before[2] == [m.training for m in prepared.modules()]
    assert momenta == [norm.momentum for norm in norms_of(prepared)]
    first = weights(network)
    reestimate_batch_norms(prepared, batches())
    assert different(first, weights(network)) == []


def test_frozen_ones_keep_their_statistics() -> None:
    network, prepared = prepared_net("fx")
    prepared(batches()[0])
    network[1].eval()
    for module in prepared.modules():
        if getattr(module, "running_mean", None) is network[1].running_mean:
            module.training = False
    before = weights(network)
    reestimate_batch_norms(prepared, batches())
    changed = different(before, weights(network))
    assert {name.partition(".")[0] for name in changed} == {"5", "8"}


def test_nothing_to_estimate_is_an_error() -> None:
    _, prepared = prepared_net("fx")
    text = "batch norms cannot be estimated again: there is no batch. Give at least one."
    with pytest.raises(ConfigError, match=exactly(text)):
        reestimate_batch_norms(prepared, [])
    text = (
        "reestimate_batch_norms: no batch norm with running statistics is in training mode. Call prepared.train() "
        "first, or leave it out where the model has none."
    )
    for norm in norms_of(prepared):
        norm.eval()
    with pytest.raises(ConfigError, match=exactly(text)):
        reestimate_batch_norms(prepared, batches())


# ---- at the end of a training


class Noting(Classifier):
    """Logs in ``training_step``, and notes each batch that it gets while ``noted`` is a list."""

    noted: list[Any] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if Noting.noted is not None:
            Noting.noted.append(batch[0].clone())
        self.trainer.current_epoch  # noqa: B018  a step may ask
        return super().training_step(batch, batch_idx)


def callback(backend: Any = "fx", **settings: Any) -> Any:
    formats: Any = ("pt2",) if backend == "pt2e" else ("torchscript",)
    config = QuantConfig(backend=backend, weight=TensorSpec(bits=4))
    return QuantizationAwareTraining(config, export=ExportConfig(formats=formats), **settings)


def fit(of: Any, *others: Any, **settings: Any) -> Any:
    torch.manual_seed(11)
    model = Noting(convnet())
    runner = trainer(of, *others, **{"max_epochs": 2, **settings})
    runner.fit(model, datamodule=Digits(shuffle=False), **({"weights_only": True} if "ckpt_path" in settings else {}))
    return model, runner


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_trained_module_gets_the_statistics(backend: Any) -> None:
    """The int8 model folds them, and nothing else of the training is another."""
    plain, without = fit(callback(backend))
    again = callback(backend, reestimate_batches=3)
    model, runner = fit(again)
    changed = different(weights(plain), weights(model))
    assert sorted(changed) == ["net.1.running_mean", "net.1.running_var"]
    images = torch.cat([rows(0, 48).tensors[0]])
    # the convolution before the batch norm, with the weights that int8 has
    conv, norm = model.net[0], model.net[1]
    with torch.no_grad():
        scale = conv.weight.abs().amax((1, 2, 3), keepdim=True) / 7
        x = nn.functional.conv2d(images, torch.round(conv.weight / scale) * scale, conv.bias, padding=1)
    # activations are rounded to 8 bits: half a step of an input of 1 / 255, times the sum of the weights
    bound = float((conv.weight.detach().abs().sum((1, 2, 3)) / 255).max())
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), atol=bound)
    assert torch.allclose(norm.running_var, x.var((0, 2, 3)), rtol=0.05, atol=bound)
    assert again.report.metrics_int8 is not None
    assert {k: v for k, v in runner.callback_metrics.items() if k.startswith("train")} == {
        k: v for k, v in without.callback_metrics.items() if k.startswith("train")
    }


def test_batches_are_the_first_of_an_epoch_and_random_states_are_left_alone() -> None:
    class Draw(pl.Callback):
        drawn: torch.Tensor | None = None

        def on_train_end(self, *_: Any) -> None:
            Noting.noted = []

        def on_fit_end(self, *_: Any) -> None:
            self.drawn = torch.rand(3)

    try:
        with_it, without = Draw(), Draw()
        fit(callback(reestimate_batches=4), with_it)
        noted = Noting.noted
        assert noted is not None
        assert torch.equal(torch.cat(noted), rows(0, 64).tensors[0])
        fit(callback(), without)
        assert Noting.noted == []
        assert with_it.drawn is not None
        assert without.drawn is not None
        assert torch.equal(with_it.drawn, without.drawn)
    finally:
        Noting.noted = None


def test_a_checkpoint_saved_after_fit_exports_the_same(tmp_path: Path) -> None:
    ours = callback(reestimate_batches=6)
    _, runner = fit(ours)
    runner.save_checkpoint(tmp_path / "end.ckpt")
    report = export_checkpoint(
        tmp_path / "end.ckpt", Noting(convnet()), datamodule=Digits(), directory=str(tmp_path / "again")
    )
    assert report.metrics_int8 == ours.report.metrics_int8


def test_an_epoch_that_is_shorter_is_said(caplog: Any) -> None:
    fit(callback(reestimate_batches=99), max_epochs=1)
    assert "reestimate_batches=99: an epoch has 6 batches." in [record.getMessage() for record in caplog.records]


class Plain(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


class Manual(Classifier):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("make", "settings", "text"),
    [
        (None, {"reestimate_batches": -1}, "reestimate_batches=-1: give a number of batches, or 0 for none."),
        (None, {"reestimate_batches": True}, "reestimate_batches=True: give a number of batches, or 0 for none."),
        (
            None,
            {"reestimate_batches": 5, "freeze_batch_norm_epoch": 1},
            "reestimate_batches=5 with freeze_batch_norm_epoch=1: weights were trained with frozen statistics, and "
            "would be used with others. Give one of the two.",
        ),
        (
            Plain,
            {"reestimate_batches": 5},
            "reestimate_batches=5: Plain has no batch norm with running statistics in training mode. Leave "
            "reestimate_batches out.",
        ),
        (
            lambda: Manual(convnet()),
            {"reestimate_batches": 5},
            "reestimate_batches=... with manual optimization: training_step is run once more for the statistics of "
            "batch norms, and would move the weights. Use automatic optimization, or leave reestimate_batches out.",
        ),
    ],
)
def test_what_cannot_be_is_an_error(make: Any, settings: dict[str, Any], text: str) -> None:
    def run() -> None:
        of = callback(**settings)
        trainer(of, max_epochs=1).fit(make(), datamodule=Digits())

    with pytest.raises(ConfigError, match=exactly(text)):
        run()

"""Few bits, won back by training: a depthwise CNN on Fashion-MNIST.

A float training; from its weights, post-training quantization, quantization-aware training, and as many more epochs in
float, beside which the latter is to be seen.
"""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import (
    ExportConfig,
    LayerConfig,
    OscillationFreezing,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
)

FLOAT_EPOCHS, FLOAT_LR = 4, 1e-2
LONGER_EPOCHS, LONGER_LR = 3, 3e-3


def block(cin: int, cout: int, stride: int) -> list[nn.Module]:
    """A depthwise 3x3 and a pointwise convolution, each with batch norm and ReLU (Howard et al. 2017)."""
    return [
        nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False),
        nn.BatchNorm2d(cin),
        nn.ReLU(),
        nn.Conv2d(cin, cout, 1, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(),
    ]


class Depthwise(pl.LightningModule):
    """A small MobileNet, ``(batch, 1, 28, 28)`` -> logits ``(batch, 10)``."""

    def __init__(self, lr: float = FLOAT_LR) -> None:
        super().__init__()
        self.lr = lr
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            *block(16, 32, 1),
            *block(32, 64, 2),
            *block(64, 64, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.model(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        """Accuracy."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> Any:
        """With a one-cycle schedule over the whole training."""
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Setting:
    """A number of bits, and how it is trained.

    Attributes:
        name: As the page has it.
        goal: The largest drop of accuracy, in points.
        config: What is quantized.
        epochs: Of training after the float training.
        lr: The largest learning rate of these.
        arguments: Of the callback.
    """

    name: str
    goal: float
    config: QuantConfig
    epochs: int
    lr: float
    arguments: dict[str, Any]


def _four_bits() -> QuantConfig:
    """Weights of 4 bits everywhere, activations of 8."""
    return QuantConfig(weight=TensorSpec(bits=4))


def _four_and_four() -> QuantConfig:
    """Weights and outputs of convolutions in 4 bits, but 8 for the first and the last weight, the image and the logits.

    So do LSQ, LSQ+ and Nagel et al. 2022 with first and last layers, where they give figures for 4 bits.
    """
    four = TensorSpec(bits=4)
    few = TensorSpec(bits=4, fake_quantize="learned")
    layers = (
        LayerConfig(type="torch.nn.Conv2d", weight=four, activation=few),
        LayerConfig(name="model.0", weight=TensorSpec(), activation=few),
    )
    return QuantConfig(layers=layers)


def settings() -> tuple[Setting, ...]:
    """The rows of the table."""
    return (
        Setting("weights 4 bits, activations 8", 0.4, _four_bits(), 2, 1e-3, {}),
        Setting(
            "weights 4 bits, activations 4",
            1.5,
            _four_and_four(),
            LONGER_EPOCHS,
            LONGER_LR,
            {"freeze_oscillations": OscillationFreezing(), "reestimate_batches": 50},
        ),
    )


def untrained(config: QuantConfig) -> QuantConfig:
    """The same bits without what only a training can do: scales that are learned."""

    def plain(spec: TensorSpec | None) -> TensorSpec | None:
        return None if spec is None else replace(spec, fake_quantize="auto")

    layers = tuple(
        replace(layer, activation=plain(layer.activation), weight=plain(layer.weight)) for layer in config.layers
    )
    own = {name: replace(getattr(config, name), fake_quantize="auto") for name in ("activation", "weight")}
    return replace(config, layers=layers, **own)


@dataclass(frozen=True)
class Recovered:
    """One seed and one setting: accuracies, shares of 1.

    Attributes:
        float_acc: Of the float training.
        float_longer: After as many more float epochs as the longest quantization-aware training has.
        ptq: After post-training quantization of the float training.
        qat: Of int8 after quantization-aware training.
    """

    float_acc: float
    float_longer: float
    ptq: float
    qat: float


def _fit(model: Depthwise, seed: int, epochs: int, data: tuple[TensorDataset, TensorDataset], *callbacks: Any) -> Any:
    pl.seed_everything(seed, verbose=False)
    runner = _trainer(epochs, *callbacks)
    train, val = (DataLoader(data[0], batch_size=128, shuffle=True), DataLoader(data[1], batch_size=500))
    with contextlib.redirect_stdout(io.StringIO()):  # the reports
        runner.fit(model, train, val)
    return runner


def _trainer(epochs: int, *callbacks: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=epochs, num_sanity_val_steps=0,
    )  # fmt: skip


def accuracy(runner: pl.Trainer) -> float:
    """Of the last validation, as a share of 1."""
    return float(runner.callback_metrics["val_acc"])


def _from(trained: Depthwise, lr: float) -> Depthwise:
    model = copy.deepcopy(trained)
    model.lr = lr
    return model


def run(data: tuple[TensorDataset, TensorDataset], seed: int, folder: str) -> dict[str, Recovered]:
    """All settings from one float training."""
    export = ExportConfig(directory=folder, formats=("torchscript",))
    trained = Depthwise()
    float_acc = accuracy(_fit(trained, seed, FLOAT_EPOCHS, data))
    longer = accuracy(_fit(_from(trained, LONGER_LR), seed, LONGER_EPOCHS, data))
    found = {}
    for setting in settings():
        after = PostTrainingQuantization(untrained(setting.config), export=export)
        with contextlib.redirect_stdout(io.StringIO()):
            _trainer(1, after).validate(copy.deepcopy(trained), DataLoader(data[1], batch_size=500), verbose=False)
        qat = QuantizationAwareTraining(setting.config, export=export, **setting.arguments)
        _fit(_from(trained, setting.lr), seed, setting.epochs, data, qat)
        assert after.report is not None
        assert qat.report is not None
        found[setting.name] = Recovered(
            float_acc, longer, after.report.metrics_int8["val_acc"], qat.report.metrics_int8["val_acc"]
        )
    return found

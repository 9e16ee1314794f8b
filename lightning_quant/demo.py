"""The demo: an ordinary LightningModule on scikit-learn's digits, quantized after training and while training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant._roots import ROOTS
from lightning_quant.callbacks import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.config import ExportConfig
from lightning_quant.errors import MissingExtraError
from lightning_quant.report import QuantReport

_PL: Any = ROOTS[0]


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, and their input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` and the result: ``(batch, channels, height, width)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class DigitsClassifier(_PL.LightningModule):
    """A small residual network for 8x8 grey images of ten classes. It knows nothing of quantization."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            ResidualBlock(channels),
            nn.MaxPool2d(2),
            ResidualBlock(channels),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 10),
        )
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, 1, 8, 8)`` -> logits ``(batch, 10)``."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross entropy of a batch ``(images, labels)``."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val_acc`` and ``val_loss``."""
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val_acc", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Digits(_PL.LightningDataModule):
    """scikit-learn's 1,797 labelled digits, 1,297 to train and 500 to validate, normalised after the transfer."""

    def setup(self, stage: str) -> None:
        """Read the data, which is part of scikit-learn."""
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(data.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.train_set = TensorDataset(images[order[:-500]], labels[order[:-500]])
        self.val_set = TensorDataset(images[order[-500:]], labels[order[-500:]])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of 64."""
        return DataLoader(self.train_set, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of 100."""
        return DataLoader(self.val_set, batch_size=100)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Grey values 0..16 to -1..1."""
        images, labels = batch
        return images / 8 - 1, labels


def run(directory: str = "demo_quantized", epochs: int = 4, seed: int = 0) -> dict[str, QuantReport]:
    """Train in float, quantize after training; train with fake quantize; print float beside int8.

    Args:
        directory: Files go to ``<directory>/ptq`` and ``<directory>/qat``.
        epochs: Of each training.
        seed: Of weights and order.

    Returns:
        ``{"ptq": report, "qat": report}``.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "the demo's data") from error
    console = Console()
    logging.getLogger(f"{_PL.__name__}.utilities.rank_zero").setLevel(logging.WARNING)
    reports: dict[str, QuantReport] = {}
    callbacks = {
        "ptq": PostTrainingQuantization(export=ExportConfig(directory=str(Path(directory) / "ptq"))),
        "qat": QuantizationAwareTraining(export=ExportConfig(directory=str(Path(directory) / "qat"))),
    }
    for name, callback in callbacks.items():
        console.rule("post-training quantization" if name == "ptq" else "quantization-aware training")
        _PL.seed_everything(seed, verbose=False)
        trainer = _PL.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        trainer.fit(DigitsClassifier(), datamodule=Digits())
        assert callback.report is not None
        reports[name] = callback.report
    _print_summary(console, reports, Path(directory))
    return reports


def _print_summary(console: Console, reports: dict[str, QuantReport], directory: Path) -> None:
    table = Table(title="digits, validation accuracy", title_justify="left")
    for head in ("", "float", "int8", "coverage", "files in"):
        table.add_column(head)
    for name, report in reports.items():
        table.add_row(
            name.upper(),
            f"{report.metrics_float['val_acc']:.4f}",
            f"{report.metrics_int8['val_acc']:.4f}",
            f"{100 * report.coverage:.1f} %",
            str(directory / name),
        )
    console.print(table)

"""Accuracy of int8 beside float: digits and Fashion-MNIST, mean of three seeds.

    python benchmarks/accuracy.py [--fashion-mnist FOLDER]

For each seed: a float training; its post-training quantization by each backend; and quantization-aware trainings of the
same length from the same seed, by each backend that can train. All are validated on the same images.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import ExportConfig, PostTrainingQuantization, QuantConfig, QuantizationAwareTraining, QuantReport
from lightning_quant.config import SUPPORT, BackendName, Method

SEEDS = (0, 1, 2)
CALIBRATED: tuple[BackendName, ...] = ("fx", "eager", "torchscript", "pt2e")
TRAINED: tuple[BackendName, ...] = ("fx", "eager", "pt2e")


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut, ``(batch, cin, h, w) -> (batch, cout, h', w')``."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both paths, added."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Classifier(pl.LightningModule):
    """A small residual network, trained with a one-cycle learning rate, so that it ends where it has settled."""

    def __init__(self, stem_stride: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Residual(16, 16, 1),
            Residual(16, 32, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, 1, h, w)`` -> logits ``(batch, 10)``."""
        return self.model(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        """Accuracy."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> dict[str, object]:
        """Adam with a one-cycle schedule over the whole training."""
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Task:
    """Data and length of a training."""

    name: str
    train: TensorDataset
    val: TensorDataset
    epochs: int
    stem_stride: int


def digits_task() -> Task:
    """scikit-learn's 1,797 digits, 8x8: 1,000 to train, 797 to validate."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.images[order], dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target[order])
    train, val = TensorDataset(images[:1000], labels[:1000]), TensorDataset(images[1000:], labels[1000:])
    return Task("digits", train, val, epochs=20, stem_stride=1)


def fashion_mnist_task(folder: Path, train_images: int = 60_000, epochs: int = 2) -> Task:
    """Fashion-MNIST from its IDX files, 28x28: 60,000 to train, 10,000 to validate."""

    def read(name: str, offset: int) -> np.ndarray:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    def part(prefix: str, count: int) -> TensorDataset:
        images = read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[:count]
        labels = read(f"{prefix}-labels-idx1-ubyte.gz", 8)[:count]
        return TensorDataset(torch.tensor(images).float() / 127.5 - 1, torch.tensor(labels).long())

    return Task("Fashion-MNIST", part("train", train_images), part("t10k", 10_000), epochs, stem_stride=2)


@dataclass(frozen=True)
class Figures:
    """One seed: the accuracy in float, a share of 1, and the reports by backend."""

    float_acc: float
    ptq: dict[str, QuantReport]
    qat: dict[str, QuantReport]


def int8_acc(report: QuantReport) -> float:
    """The accuracy of the int8 model, a share of 1."""
    return report.metrics_int8["val_acc"]


def _trainer(task: Task, callback: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=task.epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=task.epochs,
        num_sanity_val_steps=0,
    )


def _fit(task: Task, seed: int, callback: pl.Callback) -> Classifier:
    pl.seed_everything(seed, verbose=False)
    train = DataLoader(task.train, batch_size=64 if task.epochs > 10 else 128, shuffle=True)
    model = Classifier(task.stem_stride)
    _trainer(task, callback).fit(model, train, _validation(task))
    return model


def _validation(task: Task) -> DataLoader:
    return DataLoader(task.val, batch_size=500)


def _report(callback: PostTrainingQuantization | QuantizationAwareTraining) -> QuantReport:
    assert callback.report is not None
    return callback.report


def run(task: Task, seed: int) -> Figures:
    """Train in float and with fake quantize from one seed; quantize the first after training."""
    ptq: dict[str, QuantReport] = {}
    qat: dict[str, QuantReport] = {}
    with tempfile.TemporaryDirectory() as folder:

        def native(backend: BackendName, method: Method) -> ExportConfig:
            return ExportConfig(directory=folder, formats=SUPPORT[backend, method][:1])

        first = PostTrainingQuantization(QuantConfig(backend=CALIBRATED[0]), export=native(CALIBRATED[0], "static"))
        model = _fit(task, seed, first)
        ptq[CALIBRATED[0]] = _report(first)
        for backend in CALIBRATED[1:]:
            after = PostTrainingQuantization(QuantConfig(backend=backend), export=native(backend, "static"))
            _trainer(task, after).validate(model, _validation(task), verbose=False)
            ptq[backend] = _report(after)
        for backend in TRAINED:
            trained = QuantizationAwareTraining(QuantConfig(backend=backend), export=native(backend, "qat"))
            _fit(task, seed, trained)
            qat[backend] = _report(trained)
    return Figures(ptq[CALIBRATED[0]].metrics_float["val_acc"], ptq, qat)


def _cells(row: Figures) -> list[float]:
    return [row.float_acc, *map(int8_acc, row.ptq.values()), *map(int8_acc, row.qat.values())]


def main() -> None:
    """Run both tasks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    installed = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=installed if installed.is_dir() else ".data/fashion-mnist"
    )
    options = parser.parse_args()
    table = Table(title="validation accuracy, %")
    for head in ("data", "seed", "float", *(f"PTQ {b}" for b in CALIBRATED), *(f"QAT {b}" for b in TRAINED)):
        table.add_column(head)
    for task in (digits_task(), fashion_mnist_task(Path(options.fashion_mnist))):
        rows = [_cells(run(task, seed)) for seed in SEEDS]
        for seed, cells in [*zip(map(str, SEEDS), rows, strict=True), ("mean", [*map(mean, zip(*rows, strict=True))])]:
            table.add_row(task.name, seed, *(f"{100 * value:.2f}" for value in cells))
    Console().print(table)


if __name__ == "__main__":
    main()

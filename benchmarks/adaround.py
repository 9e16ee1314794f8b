"""Weights of 4 bits without training: Fashion-MNIST, a network of depthwise convolutions, three seeds.

    python benchmarks/adaround.py [--fashion-mnist FOLDER]

For each seed: a float training of two epochs; its post-training quantization with weights of 8 and of 4 bits and
activations of 8, the latter rounded to nearest and by AdaRound, on 1,024 training images. All are validated as int8
models on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean

import torch
from accuracy import SEEDS, Task, fashion_mnist_task
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, TensorSpec, convert, prepare
from lightning_quant.corrections.rounding import adaround

CALIBRATION = 1024
BATCH = 128


def _pair(cin: int, cout: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False), nn.BatchNorm2d(cin), nn.ReLU6(),
        nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU6(),
    ]  # fmt: skip


def depthwise_net(width: int = 16) -> nn.Sequential:
    """As a MobileNet: ``(batch, 1, 28, 28)`` -> logits ``(batch, 10)``."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(),
        *_pair(width, 2 * width, 1), *_pair(2 * width, 2 * width, 1), *_pair(2 * width, 4 * width, 2),
        *_pair(4 * width, 4 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def trained(task: Task, seed: int) -> nn.Sequential:
    """In float, with Adam and a one-cycle learning rate."""
    torch.manual_seed(seed)
    net = depthwise_net()
    images, labels = task.train.tensors
    steps = len(images) // BATCH
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=task.epochs * steps)
    for _ in range(task.epochs):
        order = torch.randperm(len(images))
        for rows in order[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def accuracy(model: nn.Module, task: Task) -> float:
    """On the validation images, per cent."""
    images, labels = task.val.tensors
    with torch.no_grad():
        right = [
            model(rows).argmax(1) == known for rows, known in zip(images.split(500), labels.split(500), strict=True)
        ]
    return 100 * torch.cat(right).float().mean().item()


def run(task: Task, seed: int) -> list[float]:
    """Accuracy in float, with 8 bits, with 4 bits to nearest and by AdaRound; and the seconds that took."""
    net = trained(task, seed)
    images = task.train.tensors[0][:CALIBRATION]
    found = [accuracy(net, task)]
    for bits in (8, 4):
        prepared = prepare(
            net,
            QuantConfig(weight=TensorSpec(bits=bits, observer="min_max")),
            method="static",
            example_inputs=images[:2],
        ).eval()
        with torch.no_grad():
            prepared(images)
        found.append(accuracy(convert(prepared), task))
    began = time.monotonic()
    rounded = adaround(prepared, images.split(BATCH))
    seconds = time.monotonic() - began
    return [*found, accuracy(convert(rounded), task), seconds]


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    installed = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=installed if installed.is_dir() else ".data/fashion-mnist"
    )
    options = parser.parse_args()
    task = fashion_mnist_task(Path(options.fashion_mnist))
    table = Table(title="validation accuracy, %, activations of 8 bits")
    for head in ("seed", "float", "8 bits", "4 bits to nearest", "4 bits by AdaRound", "AdaRound, s"):
        table.add_column(head, justify="right")
    rows = [run(task, seed) for seed in SEEDS]
    for name, cells in [*zip(map(str, SEEDS), rows, strict=True), ("mean", [*map(mean, zip(*rows, strict=True))])]:
        table.add_row(name, *(f"{value:.2f}" for value in cells))
    Console().print(table)


if __name__ == "__main__":
    main()

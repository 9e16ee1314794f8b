"""Segmentation: a small U-Net names the digit of every pixel; skip connections are concatenated in int8.

    python examples/segmentation.py fit --config examples/segmentation.yaml

Scenes are made of scikit-learn's real handwritten digits. They need the extra `demo`.
"""

import torch
import torchmetrics
from pytorch_lightning import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.cli import QuantCLI

SIZE, BACKGROUND = 24, 10


def double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(LightningModule):
    def __init__(self, channels: int = 16, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.down1, self.down2 = double(1, channels), double(channels, 2 * channels)
        self.middle = double(2 * channels, 2 * channels)
        self.up2, self.up1 = double(4 * channels, channels), double(2 * channels, channels)
        self.head = nn.Conv2d(channels, 11, 1)
        self.iou = torchmetrics.JaccardIndex(task="multiclass", num_classes=11)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=11)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        a = self.down1(image)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.middle(F.max_pool2d(b, 2))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2.0), b], 1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0), a], 1))
        return self.head(x)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        image, label = batch
        return F.cross_entropy(self(image), label)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        image, label = batch
        scores = self(image)
        self.accuracy(scores, label)
        self.iou(scores, label)
        self.log("val_acc", self.accuracy, prog_bar=True)
        self.log("val_iou", self.iou, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams["lr"])


class Scenes(LightningDataModule):
    """Two to five digits on a canvas; the label of a pixel is the digit whose ink it is, or background."""

    def __init__(self, train: int = 1500, val: int = 300, batch_size: int = 32) -> None:
        super().__init__()
        self.counts, self.batch_size = (train, val), batch_size

    def setup(self, stage: str) -> None:
        images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
        images = images.reshape(-1, 8, 8).float() / 8 - 1
        middle = len(images) * 3 // 4  # no digit is in both sets
        self.train_set = self.scenes(images[:middle], labels[:middle], self.counts[0], seed=0)
        self.val_set = self.scenes(images[middle:], labels[middle:], self.counts[1], seed=1)

    def scenes(self, images: torch.Tensor, labels: torch.Tensor, count: int, seed: int) -> TensorDataset:
        draw = torch.Generator().manual_seed(seed)
        canvas, target = -torch.ones(count, 1, SIZE, SIZE), torch.full((count, SIZE, SIZE), BACKGROUND)
        for scene in range(count):
            for cell in torch.randperm(9, generator=draw)[: torch.randint(2, 6, (), generator=draw)].tolist():
                which = torch.randint(len(images), (), generator=draw)
                place = (scene, slice(cell // 3 * 8, cell // 3 * 8 + 8), slice(cell % 3 * 8, cell % 3 * 8 + 8))
                canvas[place[0], 0, place[1], place[2]] = images[which]
                target[place][images[which] > 0] = labels[which]
        return TensorDataset(canvas, target)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 2 * self.batch_size)

    test_dataloader = val_dataloader


if __name__ == "__main__":
    QuantCLI(UNet, Scenes, seed_everything_default=0)

"""A GAN with manual optimization, of which only the generator is deployed, and quantized.

    python examples/gan_generator.py fit --config examples/gan_generator.yaml

It learns scikit-learn's digits, which need the extra `demo`.
"""

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.cli import QuantCLI


class Gan(LightningModule):
    def __init__(self, latent: int = 32, width: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(latent, 4 * width * 4), nn.ReLU(), nn.Unflatten(1, (4 * width, 2, 2)),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.LeakyReLU(0.2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * 16, 1),
        )  # fmt: skip

    def training_step(self, batch: list[torch.Tensor], _: int) -> None:
        real, noise = batch
        of_generator, of_discriminator = self.optimizers()
        fake = self.generator(noise)
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        of_generator.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
        of_generator.step()

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """How far generated images are from real ones, pixel by pixel: in their mean and their spread."""
        real, noise = batch
        fake = self.generator(noise)
        self.log("val_mean_gap", (fake.mean(0) - real.mean(0)).abs().mean(), prog_bar=True)
        self.log("val_std_gap", (fake.std(0) - real.std(0)).abs().mean(), prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        nets = (self.generator, self.discriminator)
        return [torch.optim.Adam(net.parameters(), self.hparams["lr"], betas=(0.5, 0.99)) for net in nets]


class DigitsAndNoise(LightningDataModule):
    def __init__(self, latent: int = 32, batch_size: int = 64) -> None:
        super().__init__()
        self.latent, self.batch_size = latent, batch_size

    def setup(self, stage: str) -> None:
        images = torch.tensor(load_digits().data).reshape(-1, 1, 8, 8).float() / 8 - 1
        noise = torch.randn(len(images), self.latent, generator=torch.Generator().manual_seed(0))
        self.train_set = TensorDataset(images[:1400], noise[:1400])
        self.val_set = TensorDataset(images[1400:], noise[1400:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 397)


if __name__ == "__main__":
    QuantCLI(Gan, DigitsAndNoise, seed_everything_default=0)

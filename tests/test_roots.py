"""The same callbacks for ``pytorch_lightning`` and ``lightning.pytorch``, whose classes refuse each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import ExportConfig, PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant._roots import ROOTS, root_of

BOTH = pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)


def loader() -> DataLoader:
    x = torch.randn(96, 3, 8, 8)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=32)


def module_of(root: Any) -> Any:
    """A LightningModule of this root, as its users write it."""

    class Network(root.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)
            )
            self.acc = torchmetrics.Accuracy("multiclass", num_classes=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.acc(self(batch[0]), batch[1])
            self.log("acc", self.acc)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Network()


def trainer_of(root: Any, callback: Any, **kwargs: Any) -> Any:
    return root.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], **kwargs,
    )  # fmt: skip


@BOTH
def test_after_training(root: Any) -> None:
    callback = PostTrainingQuantization(export=ExportConfig(formats=("torchscript",)))
    trainer, module = trainer_of(root, callback), module_of(root)
    metrics = trainer.validate(module, loader(), verbose=False)[0]
    assert callback.report is not None
    assert callback.report.metrics_float == metrics
    assert isinstance(callback.quantized_model, root.LightningModule)
    assert root_of(callback.quantized_model) is root


@BOTH
def test_with_training(root: Any) -> None:
    callback = QuantizationAwareTraining(export=ExportConfig(formats=("torchscript",)))
    trainer, module = trainer_of(root, callback, max_epochs=1), module_of(root)
    trainer.fit(module, loader(), loader())
    assert callback.report is not None
    assert callback.report.coverage == 1
    assert isinstance(callback.quantized_model, root.LightningModule)


@BOTH
@pytest.mark.parametrize("kind", [PostTrainingQuantization, QuantizationAwareTraining])
def test_the_callbacks_are_callbacks_of_each(root: Any, kind: Any) -> None:
    assert issubclass(kind, root.Callback)


def test_who_is_of_no_root() -> None:
    with pytest.raises(TypeError, match=r"^int is no Trainer or LightningModule of "):
        root_of(3)

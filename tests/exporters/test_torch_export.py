"""torch.export between Python code that goes other ways while it is exported."""

from __future__ import annotations

from pathlib import Path

import torch
from models import Mlp, calibrated, decibels
from torch import nn

from lightning_quant import ExportConfig, QuantConfig, export, load


class Masked(nn.Module):
    """As attention of transformers: a mask is made while torch.export follows it, and none else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(x) if torch.compiler.is_exporting() else None
        return self.layer(x, mask)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.net(x if mask is None else x * mask)


def test_layers_are_called_as_they_were_when_they_were_captured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    x = torch.randn(64, 4)
    prepared = calibrated(model, x, config=QuantConfig(targets=("layer",)))
    path = export(prepared, None, ExportConfig(directory=tmp_path, formats=("pt2",)), x)["pt2"]
    assert not torch.compiler.is_exporting()
    with torch.no_grad():
        assert decibels(model(x), load(path)(x)) > 25

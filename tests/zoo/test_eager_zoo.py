"""Architectures that nobody here wrote, through eager mode."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, Architecture
from measure import measure

from lightning_quant import QuantConfig

FEW = ("resnet18", "mobilenet_v2", "mobilenet_v3_small")


@pytest.mark.torchvision
@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in ARCHITECTURES if e.name in FEW])
def test_static(entry: Architecture) -> None:
    pytest.importorskip("torchvision")
    row = measure(entry, QuantConfig(backend="eager"))
    assert row.sqnr_db >= entry.min_sqnr_db
    assert row.coverage >= entry.min_coverage

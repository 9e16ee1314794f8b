"""What was prepared and converted is gone when nobody holds it: torch.ao keeps all models in a cache of its own."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Residual, calibrated
from torch import nn

from lightning_quant import QuantConfig, convert, coverage
from lightning_quant._torch_ao import FakeQuantize
from lightning_quant.config import SUPPORT


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


def life(config: QuantConfig, method: Any) -> list[weakref.ref[nn.Module]]:
    """References to all modules of a model, prepared and converted, that nobody holds any longer."""
    x = torch.randn(8, 3, 8, 8)
    model = Residual()
    prepared = calibrated(model if method == "qat" else model.eval(), x, method=method, config=config)
    int8 = convert(prepared)
    coverage(int8, x)
    copy.deepcopy(prepared)
    return [weakref.ref(module) for part in (model, prepared, int8) for module in part.modules()]


@pytest.mark.parametrize(("backend", "method"), SUPPORT)
def test_a_model_is_freed(backend: Any, method: Any) -> None:
    references = life(QuantConfig(backend=backend), method)
    gc.collect()
    left = {type(module).__name__ for reference in references if (module := reference()) is not None}
    assert not left
    assert len(references) > 20


def test_the_check_can_fail() -> None:
    held = FakeQuantize()
    reference = weakref.ref(held)
    gc.collect()
    assert reference() is held

"""Ranges are torch's to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY

from lightning_quant._torch_ao import HistogramObserver as TorchHistogramObserver
from lightning_quant.observers import HistogramObserver

DATA: dict[str, Any] = {
    "normal": lambda: torch.randn(4000),
    "relu": lambda: torch.relu(torch.randn(4000)),
    "few": lambda: torch.randn(7),
    "outlier": lambda: torch.cat([torch.randn(500) * 1e-3, torch.tensor([1000.0])]),
    "heavy tail": lambda: torch.exp(torch.randn(300) * 3),
    "one value": lambda: torch.full((9,), 2.5),
    "two values": lambda: torch.cat([torch.zeros(300), torch.ones(1)]),
}


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", DATA)
def test_the_range_is_that_of_torch(name: str, batches: int) -> None:
    torch.manual_seed(0)
    ours, theirs = HistogramObserver(bins=256), TorchHistogramObserver(bins=256)
    for _ in range(batches):
        x = DATA[name]()
        ours(x)
        theirs(x)
    assert ours._non_linear_param_search() == theirs._non_linear_param_search()
    for a, b in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert torch.equal(a, b)


@PROPERTY
@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.1, 4))
def test_the_range_of_any_histogram_is_that_of_torch(seed: int, filled: int, tail: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    histogram = torch.zeros(64)
    places = torch.randint(0, 64, (filled,), generator=generator)
    histogram[places] = torch.exp(torch.randn(filled, generator=generator) * tail).ceil()
    found = []
    for kind in (HistogramObserver, TorchHistogramObserver):
        observer = kind(bins=64)
        observer.histogram.copy_(histogram)
        observer.min_val, observer.max_val = torch.tensor(-1.5), torch.tensor(3.0)
        found.append(observer._non_linear_param_search())
    assert found[0] == found[1]

"""Decibels, against the formula in NumPy."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY

from lightning_quant.analysis.sqnr import float_tensors, sqnr_db

NAN, INF = math.nan, math.inf


@PROPERTY
@given(st.integers(1, 40), st.floats(1e-3, 10), st.integers(0, 2**31))
def test_the_formula(size: int, noise: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    reference = generator.normal(size=size)
    quantized = reference + noise * generator.normal(size=size)
    expected = 10 * np.log10((reference**2).sum() / ((reference - quantized) ** 2).sum())
    ours = sqnr_db(torch.from_numpy(reference), torch.from_numpy(quantized))
    # torchmetrics adds the machine epsilon to both sums
    assert ours == pytest.approx(expected, abs=1e-6)
    # containers are one tensor
    half = size // 2
    parts = [{"a": torch.from_numpy(x[:half]), "b": (torch.from_numpy(x[half:]),)} for x in (reference, quantized)]
    assert sqnr_db(*parts) == pytest.approx(ours)


@pytest.mark.parametrize(
    ("reference", "quantized", "expected"),
    [
        ([1.0, -1.0], [1.1, -1.1], 20.0),
        ([1.0, 2.0], [1.0, 2.0], INF),
        ([0.0, 0.0], [0.0, 0.0], INF),
        ([1.0, 2.0], [1.0, NAN], -INF),
        ([1.0, 2.0], [1.0, INF], -INF),
        # masks: what is infinite on purpose has to be the same, and does not count
        ([1.0, -INF], [1.1, -INF], 20.0),
        ([1.0, -INF], [1.0, -INF], INF),
        ([1.0, -INF], [1.0, INF], -INF),
        ([1.0, -INF], [1.0, 5.0], -INF),
        ([1.0, NAN], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, 0.5], -INF),
    ],
)
def test_special_values(reference: list[float], quantized: list[float], expected: float) -> None:
    assert sqnr_db(torch.tensor(reference), torch.tensor(quantized)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_summed_in_double(dtype: torch.dtype) -> None:
    reference = torch.full((4096,), 0.01, dtype=dtype)
    assert sqnr_db(reference, 0.5 * reference) == pytest.approx(20 * math.log10(2), abs=1e-6)


@pytest.mark.parametrize(
    ("reference", "quantized", "shapes"),
    [
        (torch.ones(2), torch.ones(3), "[(2,)] against [(3,)]"),
        (torch.ones(2), (torch.ones(2), torch.ones(2)), "[(2,)] against [(2,), (2,)]"),
        (torch.ones(2), None, "[(2,)] against []"),
    ],
)
def test_outputs_that_differ_in_structure(reference: Any, quantized: Any, shapes: str) -> None:
    with pytest.raises(ValueError, match=f"^outputs cannot be compared: {re.escape(shapes)}"):
        sqnr_db(reference, quantized)


def test_integers_and_other_values_do_not_count() -> None:
    output = {"y": torch.ones(2), "n": torch.ones(2, dtype=torch.long), "name": "x", "all": [torch.zeros(1)]}
    assert [tuple(x.shape) for x in float_tensors(output)] == [(2,), (1,)]
    assert (
        sqnr_db(output, {**output, "n": torch.zeros(5), "name": "y"} | {"n": torch.zeros(2, dtype=torch.long)}) == INF
    )


def test_gradients_and_inputs_are_left_alone() -> None:
    reference = torch.ones(2, requires_grad=True)
    assert sqnr_db(reference, 1.1 * reference) == pytest.approx(20, abs=1e-4)
    assert reference.grad is None

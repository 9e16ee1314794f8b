"""Spreads of values, by counting them by hand and by NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_quant.analysis.histograms import BINS, SAMPLE, sampled, spread


def test_counts_are_numpys() -> None:
    x = torch.randn(50, 60)
    found = spread(x)
    assert found is not None
    expected, edges = np.histogram(x.numpy(), BINS)
    assert (found.low, found.high) == (pytest.approx(edges[0]), pytest.approx(edges[-1]))
    # a value at an edge may be in either bin
    assert np.abs(np.array(found.counts) - expected).sum() <= 4
    assert sum(found.counts) == x.numel()


def test_of_a_large_tensor_shares_are_those_of_all() -> None:
    x = torch.randn(4 * SAMPLE)
    found = spread(x)
    assert found is not None
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    expected, _ = np.histogram(x.numpy(), BINS)
    shares, expected = np.array(found.counts) / SAMPLE, expected / x.numel()
    assert np.abs(shares - expected).max() < 5 * 0.5 / math.sqrt(SAMPLE)  # five standard errors


def test_what_is_cut_off_is_counted_and_what_is_rounded_is_not() -> None:
    x = torch.tensor([0.0, 0.3, 0.9, 1.02, 1.2, 5.0, -3.0, 0.5])
    scale = 0.1
    rounded = torch.clamp(torch.round(x / scale), 0, 10) * scale
    found = spread(x, rounded, torch.tensor(scale))
    assert found is not None
    assert found.clipped == 3 / 8  # 1.2, 5 and -3


def test_each_channel_has_a_step_of_its_own() -> None:
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    rounded = torch.tensor([[1.0, 1.8], [10.0, 19.8]])
    assert spread(x, rounded, torch.tensor([[0.1], [1.0]])).clipped == 1 / 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_count(bad: float) -> None:
    found = spread(torch.tensor([1.0, bad, 3.0, bad]), bins=2)
    assert found is not None
    assert (found.low, found.high, found.counts) == (1.0, 3.0, (1, 1))


@pytest.mark.parametrize("x", [torch.empty(0, 3), torch.full((4,), math.nan)])
def test_of_nothing_there_is_none(x: torch.Tensor) -> None:
    assert spread(x) is None


def test_of_equal_values_there_is_one_bin() -> None:
    assert spread(torch.full((2, 3), 0.5)).counts == (6,)


def test_samples_of_two_tensors_are_of_the_same_places() -> None:
    x = torch.arange(3.0 * SAMPLE)
    a, b = sampled(x), sampled(2 * x)
    assert a.shape == (SAMPLE,)
    assert torch.equal(b, 2 * a)
    assert torch.equal(sampled(x[:5].reshape(5, 1)), x[:5])


def test_the_users_random_numbers_stay_as_they_are() -> None:
    before = torch.get_rng_state()
    sampled(torch.zeros(2 * SAMPLE))
    assert torch.equal(torch.get_rng_state(), before)

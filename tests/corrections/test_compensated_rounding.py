"""Weights that are rounded input by input: against exhaustive search, and where the answer is known."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_quant.corrections import compensated_rounding as module
from lightning_quant.corrections.compensated_rounding import Inputs, compensated_rounding
from lightning_quant.corrections.grids import Grid


def grid(rows: int, bits: int = 3, groups: int = 1, step: float = 0.25, zero_point: int = 0) -> Grid:
    shape = (groups, rows, 1)
    low = -(2 ** (bits - 1))
    return Grid(
        scale=torch.full(shape, step), zero_point=torch.full(shape, float(zero_point)), low=low, high=-low - 1
    )  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alike(x: torch.Tensor) -> Inputs:
    return Inputs(floating=x, quantized=x)


def hadamard() -> torch.Tensor:
    """``(1, 16, 15)``: columns without a mean, orthogonal to each other."""
    found = torch.ones(1, 1)
    for _ in range(4):
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found[None, :, 1:]


def test_inputs_that_know_nothing_of_each_other_are_rounded_to_nearest() -> None:
    weight, x = drawn(1, 7, 15) / 2, hadamard()
    values = grid(7)
    assert torch.equal(compensated_rounding(weight, alike(x), values), values.nearest(weight))


def test_it_comes_near_to_the_best_of_all_roundings() -> None:
    """Of seven weights with two neighbours each, all 128 are tried."""
    outputs, count = 40, 7
    weight = drawn(1, outputs, count) / 3
    # most of each input is what they all have
    x = torch.relu(drawn(1, 500, 1, seed=1) + drawn(1, 500, count, seed=2) / 4)
    values = grid(outputs, bits=4)
    centred = x[0] - x[0].mean(0)

    def errors(integers: torch.Tensor) -> torch.Tensor:
        return ((values.values(integers) - weight)[0] @ centred.T).square().mean(1)

    below = torch.floor(weight / values.scale)
    ups = itertools.product((0.0, 1.0), repeat=count)
    best = torch.stack([errors(below + torch.tensor(up)) for up in ups]).amin(0)
    found, nearest = errors(compensated_rounding(weight, alike(x), values)), errors(values.nearest(weight))
    assert (found <= nearest * 1.0001).all()
    assert nearest.sum() > 4 * best.sum()
    assert found.sum() < 1.2 * best.sum()


def test_means_are_left_to_the_bias() -> None:
    weight, x = drawn(1, 5, 6) / 2, drawn(1, 300, 6, seed=1)
    mean = 100 * drawn(6, seed=2)
    values = grid(5)
    one, other = (compensated_rounding(weight, inputs, values) for inputs in (alike(x), alike(x + mean)))
    assert torch.equal(one, other)
    moved = compensated_rounding(weight, Inputs(floating=x, quantized=x + mean), values)
    assert torch.equal(one, moved)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_weight_makes_up_for_inputs_that_are_too_small(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of ``share`` of their size want weights of ``1 / share``; of that a ridge ``r`` allows ``1 / (1 + r)``."""
    fine = grid(4, bits=16, step=1e-4)
    weight, x = drawn(1, 4, 15) / 2, hadamard()
    for ridge in (1e-9, 3.0):
        monkeypatch.setattr(module, "_RIDGE", ridge)
        found = fine.values(compensated_rounding(weight, Inputs(floating=x, quantized=share * x), fine))
        torch.testing.assert_close(found, weight * (1 + (1 / share - 1) / (1 + ridge)), rtol=0, atol=6e-5)


def test_blocks_change_nothing_but_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = drawn(2, 9, 20) / 2, drawn(2, 200, 20, seed=1) @ drawn(20, 20, seed=2)
    values = grid(9, groups=2)
    whole = compensated_rounding(weight, alike(x), values)
    monkeypatch.setattr(module, "_TOGETHER", 3)
    assert torch.equal(compensated_rounding(weight, alike(x), values), whole)


def test_each_group_has_inputs_of_its_own() -> None:
    weight, x = drawn(3, 4, 5) / 2, drawn(3, 200, 5, seed=1) @ drawn(3, 5, 5, seed=2)
    together = compensated_rounding(weight, alike(x), grid(4, groups=3))
    for number in range(3):
        part = slice(number, number + 1)
        alone = compensated_rounding(weight[part], alike(x[part]), grid(4))
        assert torch.equal(together[part], alone)


@pytest.mark.parametrize("zero_point", [0, -2])
def test_integers_stay_within_their_range(zero_point: int) -> None:
    weight, x = 3 * drawn(1, 6, 8), drawn(1, 100, 8, seed=1) @ drawn(8, 8, seed=2)
    values = grid(6, zero_point=zero_point)
    found = compensated_rounding(weight, alike(x), values)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.round())
    assert (float(found.min()), float(found.max())) == (-4, 3)


@pytest.mark.parametrize("positions", [1, 3])
def test_few_or_equal_positions_tell_little(positions: int) -> None:
    weight = drawn(1, 4, 6) / 2
    values = grid(4)
    same = torch.ones(1, positions, 6)
    assert torch.equal(compensated_rounding(weight, alike(same), values), values.nearest(weight))
    few = compensated_rounding(weight, alike(drawn(1, positions, 6, seed=1)), values)
    # no weight goes further than to a neighbour of where it was
    assert ((few - weight / values.scale).abs()[(few > values.low) & (few < values.high)] < 1).all()


def test_it_holds_for_inputs_that_it_has_not_seen() -> None:
    weight = drawn(1, 32, 64)
    seen, other = (torch.relu(drawn(1, 2000, 1, seed=n) + drawn(1, 2000, 64, seed=n + 1) / 2) for n in (2, 4))
    values = grid(32, bits=4, step=0.5)

    def error(integers: torch.Tensor) -> float:
        found = other[0] @ (values.values(integers) - weight)[0].T
        return float(found.var(0).sum())

    assert error(compensated_rounding(weight, alike(seen), values)) < error(values.nearest(weight)) / 2

"""Which way weights are rounded: against every way there is, against autograd, and never worse than to nearest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_quant.corrections import learned_rounding as module
from lightning_quant.corrections.learned_rounding import Grid, Layer, learned_rounding


def problem(
    groups: int = 1, outputs: int = 3, inputs: int = 6, bits: int = 3, activation: Any = None, seed: int = 0
) -> tuple[Layer, Grid]:
    """A layer whose inputs are correlated and noisy, as those of a quantized model are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, inputs, generator=generator)
    given = torch.randn(groups, 512, inputs, generator=generator) @ torch.rand(inputs, inputs, generator=generator)
    bias = 0.1 * torch.randn(groups, 1, outputs, generator=generator)
    wanted = given @ weight.transpose(1, 2) + bias
    given = given + 0.02 * torch.randn(given.shape, generator=generator)
    high = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(-1, keepdim=True) / high
    layer = Layer(
        weight=weight,
        given=given,
        wanted=wanted if activation is None else activation(wanted),
        bias=bias,
        activation=activation,
    )
    return layer, Grid(scale=scale, zero_point=torch.zeros_like(scale), low=-high, high=high)


def learned(layer: Layer, grid: Grid, iterations: int = 500, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return learned_rounding(layer, grid, iterations=iterations, generator=torch.Generator().manual_seed(seed))


def least_error(layer: Layer, grid: Grid) -> torch.Tensor:
    """Of all roundings there are, by trying each: ``(groups, outputs)``, with plain loops and float64."""
    groups, outputs, _ = layer.weight.shape
    found = torch.empty(groups, outputs, dtype=torch.float64)
    for group, output in itertools.product(range(groups), range(outputs)):
        exact = (layer.weight / grid.scale)[group, output].double()
        choices = itertools.product(*({int(x.floor()), int(x.ceil())} for x in exact))
        integers = torch.tensor(list(choices), dtype=torch.float64).clamp(grid.low, grid.high)
        y = layer.given[group].double() @ (integers * grid.scale[group, output].double()).t()
        y = y + layer.bias[group, 0, output].double()
        y = y if layer.activation is None else layer.activation(y)
        found[group, output] = (y - layer.wanted[group, :, output, None].double()).square().mean(0).min()
    return found


@pytest.mark.parametrize("activation", [None, F.relu, F.relu6, F.silu])
@pytest.mark.parametrize("seed", range(4))
def test_about_the_best_of_all_roundings(activation: Any, seed: int) -> None:
    layer, grid = problem(groups=2, inputs=8, activation=activation, seed=seed)
    with torch.no_grad():
        best = least_error(layer, grid)
        nearest = layer.error(grid.values(grid.nearest(layer.weight))).double()
        found = layer.error(grid.values(learned(layer, grid))).double()
    assert (found >= best * (1 - 1e-4)).all()  # float32 against float64
    # of what all ways of rounding could save, most is saved
    saved = (nearest - found).sum() / (nearest - best).sum()
    assert saved > 0.8, saved


def test_only_neighbours_on_the_grid() -> None:
    layer, grid = problem(groups=2, outputs=5, inputs=40, bits=4)
    integers = learned(layer, grid)
    assert torch.equal(integers, integers.round())
    assert integers.min() >= grid.low
    assert integers.max() <= grid.high
    assert ((integers - layer.weight / grid.scale).abs() < 1 + 1e-5).all()
    assert not torch.equal(integers, grid.nearest(layer.weight))


def test_what_is_beyond_the_range_is_at_its_end() -> None:
    layer, grid = problem(inputs=20, bits=4)
    narrow = Grid(scale=grid.scale / 2, zero_point=grid.zero_point, low=grid.low, high=grid.high)
    integers = learned(layer, narrow)
    exact = layer.weight / narrow.scale
    assert (exact.abs() > 7).any()
    assert (integers[exact > 7] == 7).all()
    assert (integers[exact < -7] == -7).all()


def test_the_largest_weight_stays_where_the_range_ends() -> None:
    """So that an observer of the new weight finds the same range."""
    layer, grid = problem(outputs=16, inputs=40, bits=4)
    integers = learned(layer, grid)
    assert (integers.abs().amax(-1) == 7).all()


def test_a_zero_point() -> None:
    layer, _ = problem(inputs=12, bits=4)
    low, high = layer.weight.amin(-1, keepdim=True), layer.weight.amax(-1, keepdim=True)
    scale = (high - low) / 15
    affine = Grid(scale=scale, zero_point=torch.round(-8 - low / scale), low=-8, high=7)
    integers = learned(layer, affine)
    assert integers.min() >= -8
    assert integers.max() <= 7
    assert ((affine.values(integers) - layer.weight).abs() < scale * (1 + 1e-5)).all()
    nearest = affine.values(affine.nearest(layer.weight))
    assert layer.error(affine.values(integers)).sum() < layer.error(nearest).sum()


@pytest.mark.parametrize("shape", [(1, 8, 64), (16, 1, 9), (4, 8, 18)])
def test_no_output_is_worse_than_with_rounding_to_nearest(shape: tuple[int, int, int]) -> None:
    layer, grid = problem(*shape, bits=4, activation=F.relu)
    found, nearest = learned(layer, grid), grid.nearest(layer.weight)
    errors = layer.error(grid.values(found)), layer.error(grid.values(nearest))
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()


def test_rounding_to_nearest_where_nothing_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, grid = problem(inputs=20)
    monkeypatch.setattr(module, "_learned", lambda part, *_: -grid.nearest(part.weight))
    assert torch.equal(learned(layer, grid), grid.nearest(layer.weight))


def test_the_same_by_seed_and_no_other_random_numbers() -> None:
    layer, grid = problem(outputs=8, inputs=64, bits=4)
    before = torch.get_rng_state()
    first, again, other = (learned(layer, grid, 100, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, together in (((1, 7, 10), 25), ((5, 3, 4), 30), ((5, 3, 4), 5), ((2, 2, 2), 10**6)):
        monkeypatch.setattr(module, "_TOGETHER", together)
        count = torch.zeros(shape)
        for groups, outputs in module._parts(count):
            part = count[groups, outputs]
            assert part.numel() <= max(together, shape[2])
            part += 1
        assert (count == 1).all()


@pytest.mark.parametrize("activation", [None, F.relu, F.relu6])
def test_gradient_is_that_of_autograd(activation: Any) -> None:
    """Of equations 21 and 24 of the paper, written down as they stand there."""
    layer, grid = problem(groups=2, activation=activation)
    rows = slice(100, 164)
    below, above = module._neighbours(layer.weight, grid)
    base, step = grid.values(below), (above - below) * grid.scale
    logits = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    h = torch.clamp(torch.sigmoid(logits) * 1.2 - 0.1, 0, 1)
    y = layer.given[:, rows] @ (base + step * h).transpose(1, 2) + layer.bias
    y = y if activation is None else activation(y)
    added = (step.square() * layer.given.square().mean(1)[:, None]).sum(-1) / 12
    error = ((y - layer.wanted[:, rows]).square().mean(1) / added).sum() * layer.weight.shape[2]
    exponent = 10
    term = module._PULL * (1 - (2 * h - 1).abs() ** exponent).sum()
    (expected,) = torch.autograd.grad(error + term, logits)

    soft = module._Soft(torch.zeros_like(base))
    soft.logits = logits.detach()
    with torch.no_grad():
        found = module._error_gradient(layer, rows, base + step * soft.values())
        gradient = torch.bmm(found.transpose(1, 2), layer.given[:, rows]) * module._weighing(layer, step)
        soft.pull(gradient, 0.2)  # the second of five stages
        soft.step(gradient, 1)
    # Adam does not see the stretch of the sigmoid, a factor of all; float32 sums of 64 products
    torch.testing.assert_close(1.2 * soft.first / 0.1, expected, rtol=1e-4, atol=1e-5)


def test_adam_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    soft = module._Soft(torch.rand(3, 4, generator=generator).mul_(0.8).add_(0.1))
    logits = soft.logits.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=module._RATE, betas=module._MOMENTA)
    for number in range(1, 6):
        weighing = torch.randn(3, 4, generator=generator)
        adam.zero_grad()
        (torch.clamp(torch.sigmoid(logits) * 1.2 - 0.1, 0, 1) * weighing).sum().backward()
        adam.step()
        with torch.no_grad():
            soft.values()
            soft.step(weighing.clone(), number)
    torch.testing.assert_close(soft.logits, logits.detach(), rtol=1e-5, atol=1e-6)


def test_it_ends_when_all_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, grid = problem(inputs=4)
    exact = Layer(
        weight=grid.values(grid.nearest(layer.weight)), given=layer.given, wanted=layer.wanted, bias=layer.bias
    )
    calls: list[int] = []
    step = module._Soft.step
    monkeypatch.setattr(module._Soft, "step", lambda self, g, number: (calls.append(number), step(self, g, number)))
    assert torch.equal(learned(exact, grid, 1000), grid.nearest(layer.weight))
    assert len(calls) == 200  # the second term begins there, and with it the look

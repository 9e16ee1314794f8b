"""A weight rounded input by input, each time moving what is not yet rounded so that it makes up for the error.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1): with ``H = E[x x^T]`` of the inputs of a
layer and the upper Cholesky factor ``U`` of its inverse, input ``j`` of all outputs is rounded, and ``error / U_jj *
U_j,j:`` taken off the inputs behind it.

Before that the weight moves to where it gives, of the inputs as the quantized model has them, what the float weight
gives of the float inputs: the asymmetric calibration of Li et al. 2025 (https://arxiv.org/abs/2504.02692), as a ridge
regression of what is missing.

What is ours: all inputs are centred, because the mean of what a layer gives is its bias's; and the ridges are large.
Few images know few directions of their inputs well, and in the others the weight has to stay where it was trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_quant.corrections.grids import Grid

#: Added to the diagonal of ``H`` for the regression, as a share of its mean. It is the larger one: the weight may move
#: by many steps there, and by about one while it is rounded.
_RIDGE = 3.0
#: The same while it is rounded.
_DAMPING = 0.1
#: Of the diagonal of ``H`` where all inputs are constant.
_LEAST = 1e-10
#: Inputs that are rounded before those behind them are touched, which is what takes time (section 3.3 of GPTQ).
_TOGETHER = 128


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a layer reads, at some positions of its output.

    Attributes:
        floating: ``(groups, positions, inputs)``, float32, in the float model.
        quantized: The same in the quantized model.
    """

    floating: torch.Tensor
    quantized: torch.Tensor


def compensated_rounding(weight: torch.Tensor, inputs: Inputs, grid: Grid) -> torch.Tensor:
    """The integers of a weight, ``(groups, outputs, inputs)`` in float32.

    An output that rounding to nearest brings nearer to its float values, on ``inputs``, is rounded to nearest.

    Args:
        weight: ``(groups, outputs, inputs)``, float32.
        inputs: What the layer reads.
        grid: The values that the weight can have.
    """
    given = inputs.quantized - inputs.quantized.mean(1, keepdim=True)
    missing = inputs.floating - inputs.floating.mean(1, keepdim=True) - given
    positions = given.shape[1]
    squares = (given.transpose(1, 2) @ given).double() / positions
    wanted = weight.double() + _moved(weight, squares, (given.transpose(1, 2) @ missing).double() / positions)
    grid = Grid(scale=grid.scale.double(), zero_point=grid.zero_point.double(), low=grid.low, high=grid.high)
    found, nearest = _one_by_one(wanted, _with_ridge(squares, _DAMPING), grid), grid.nearest(weight.double())
    is_better = _error(grid.values(found) - wanted, squares) <= _error(grid.values(nearest) - wanted, squares)
    return torch.where(is_better, found, nearest).float()


def _with_ridge(squares: torch.Tensor, share: float) -> torch.Tensor:
    mean = squares.diagonal(dim1=1, dim2=2).mean(1)
    return squares + torch.diag_embed((share * mean).clamp_min(_LEAST)[:, None].expand(-1, squares.shape[-1]))


def _moved(weight: torch.Tensor, squares: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """By how much the weight has to move to make up for errors of its inputs."""
    factor = torch.linalg.cholesky(_with_ridge(squares, _RIDGE))
    return torch.cholesky_solve(missing @ weight.double().transpose(1, 2), factor).transpose(1, 2)


def _one_by_one(weight: torch.Tensor, squares: torch.Tensor, grid: Grid) -> torch.Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(squares))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rest, integers = weight.clone(), torch.empty_like(weight)
    for first in range(0, weight.shape[-1], _TOGETHER):
        last = min(first + _TOGETHER, weight.shape[-1])
        errors = torch.empty_like(rest[..., first:last])
        for column in range(first, last):
            exact = rest[..., column : column + 1]
            integers[..., column : column + 1] = rounded = grid.nearest(exact)
            error = (exact - grid.values(rounded)) / factor[:, column, column][:, None, None]
            rest[..., column:last] -= error * factor[:, column : column + 1, column:last]
            errors[..., column - first] = error[..., 0]
        rest[..., last:] -= errors @ factor[:, first:last, last:]
    return integers


def _error(error: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """``(groups, outputs, 1)``: the mean squared error of each output."""
    return ((error @ squares) * error).sum(-1, keepdim=True)

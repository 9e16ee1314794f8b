"""Which way each weight of a layer is rounded, up or down, so that what the layer gives changes least.

AdaRound (Nagel et al. 2020, https://arxiv.org/abs/2004.10568): a weight ``w = scale * (floor(w / scale) + h)`` has a
soft rounding ``h`` between 0 and 1, a stretched sigmoid that is clipped (equation 23), trained by Adam to give what the
float layer gives behind its activation function (equation 25), with a term that draws each ``h`` to 0 or 1
(equation 24), the more the longer it takes.

What is ours: outputs of a layer do not depend on each other's weights, so that they are trained in parts that fit into
the cache of a processor core; the gradient is written out; and the error is measured in units of what rounding to
nearest would add, so that one weight of the term fits layers of every size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lightning_quant.corrections.grids import Grid

#: Equation 23: the sigmoid is stretched to these ends.
_LEAST, _MOST = -0.1, 1.1
#: Share of the iterations before the second term begins (Nagel et al., and AIMET).
_WARM_UP = 0.2
#: The exponent of the second term goes down by these stages, 18, 10, 6, 4, 2: far from 0 and 1 it draws late.
_SQUARES = (3, 2, 1, 0, None)
#: Of Adam. Ten times the rate of AIMET, which takes ten times as many iterations.
_RATE = 0.05
_MOMENTA = (0.9, 0.999)
_LEAST_SQUARE = 1e-16
#: Weight of the second term, beside an error in units of that of rounding to nearest.
_PULL = 1.0
#: Positions of the output in one iteration.
_POSITIONS = 64
#: Weights that are trained together. Fewer make products of matrices slow, more leave the cache.
_TOGETHER = 2**18
#: A weight so near to an integer stays there: its other neighbour is a whole step away.
_ON_GRID = 1e-4
#: How often it is looked whether all roundings are decided.
_LOOK_EVERY = 50

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer or convolution as a product of matrices, of each of its groups.

    Attributes:
        weight: ``(groups, outputs, inputs)``, float32.
        given: ``(groups, positions, inputs)``: what it reads in the quantized model, in random order.
        wanted: ``(groups, positions, outputs)``: what it gives in float for these, behind its activation function.
        bias: ``(groups, 1, outputs)``.
        activation: What follows it; None: nothing.
    """

    weight: torch.Tensor
    given: torch.Tensor
    wanted: torch.Tensor
    bias: torch.Tensor
    activation: Activation | None = None

    def error(self, weight: torch.Tensor) -> torch.Tensor:
        """Mean squared error of each output with this weight, ``(groups, outputs)``."""
        found = torch.baddbmm(self.bias, self.given, weight.transpose(1, 2))
        if self.activation is not None:
            found = self.activation(found)
        return (found - self.wanted).square_().mean(1)


def learned_rounding(layer: Layer, grid: Grid, *, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """The integers of the weight, ``(groups, outputs, inputs)`` in float32, each a neighbour of the float value.

    An output for which rounding to nearest is better on ``layer.given`` is rounded to nearest.

    Args:
        layer: Its weight is not changed.
        grid: What its weight can be.
        iterations: Steps of Adam.
        generator: Draws which positions each step looks at.
    """
    nearest = grid.nearest(layer.weight)
    learned = torch.empty_like(nearest)
    starts = _starts(layer, iterations, generator)
    for groups, outputs in _parts(layer.weight):
        part = Layer(
            weight=layer.weight[groups, outputs],
            given=layer.given[groups],
            wanted=layer.wanted[groups, :, outputs],
            bias=layer.bias[groups, :, outputs],
            activation=layer.activation,
        )
        own = Grid(
            scale=grid.scale[groups, outputs], zero_point=grid.zero_point[groups, outputs], low=grid.low, high=grid.high
        )
        learned[groups, outputs] = _learned(part, own, starts)
    better = layer.error(grid.values(learned)) < layer.error(grid.values(nearest))
    return torch.where(better[..., None], learned, nearest)


def _starts(layer: Layer, iterations: int, generator: torch.Generator) -> list[int]:
    """Where the positions of each iteration begin."""
    last = max(1, layer.given.shape[1] - _POSITIONS + 1)
    starts: list[int] = torch.randint(last, (iterations,), generator=generator).tolist()
    return starts


def _parts(weight: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    groups, outputs, inputs = weight.shape
    some = max(1, _TOGETHER // inputs)
    few = max(1, _TOGETHER // (inputs * outputs))
    for group in range(0, groups, few):
        for output in range(0, outputs, some):
            yield slice(group, group + few), slice(output, output + some)


def _learned(layer: Layer, grid: Grid, starts: list[int]) -> torch.Tensor:
    below, above = _neighbours(layer.weight, grid)
    base, step = grid.values(below), (above - below) * grid.scale
    weighing = _weighing(layer, step)
    soft = _Soft(((layer.weight - base) / step).nan_to_num_(0.0).clamp_(0.0, 1.0))
    weight, gradient = torch.empty_like(base), torch.empty_like(base)
    warm_up = int(_WARM_UP * len(starts))
    for number, start in enumerate(starts):
        rows = slice(start, start + _POSITIONS)
        torch.addcmul(base, step, soft.values(), out=weight)
        error = _error_gradient(layer, rows, weight)
        torch.bmm(error.transpose(1, 2), layer.given[:, rows], out=gradient)
        gradient.mul_(weighing)
        if number >= warm_up:
            if number % _LOOK_EVERY == 0 and soft.is_decided():
                break
            soft.pull(gradient, (number - warm_up) / (len(starts) - warm_up))
        soft.step(gradient, number + 1)
    return torch.where(soft.is_up(), above, below)


def _neighbours(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers below and above; the same where there is only one that can be taken."""
    exact = weight / grid.scale
    near = torch.round(exact)
    stays = (exact - near).abs() <= _ON_GRID
    low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
    below = torch.where(stays, near, torch.floor(exact))
    above = torch.where(stays, near, below + 1)
    return below.clamp(low, high) + grid.zero_point, above.clamp(low, high) + grid.zero_point


def _weighing(layer: Layer, step: torch.Tensor) -> torch.Tensor:
    """What turns the gradient of a sum of squares by the weight into that of the error in its units, by ``h``."""
    inputs = step.shape[-1]
    power = layer.given.square().mean(1)[:, None]  # (groups, 1, inputs)
    # a value rounded to nearest is off by a twelfth of the squared step (uniform between its neighbours)
    added = (step.square() * power).sum(-1, keepdim=True) / 12
    count = min(_POSITIONS, layer.given.shape[1])
    return step * (2 * inputs / count / added.clamp_min(torch.finfo(torch.float32).tiny))


def _error_gradient(layer: Layer, rows: slice, weight: torch.Tensor) -> torch.Tensor:
    """Half the gradient of the squared error by what the layer gives before its activation function."""
    found = torch.bmm(layer.given[:, rows], weight.transpose(1, 2)).add_(layer.bias)
    wanted = layer.wanted[:, rows]
    if layer.activation is None:
        return found.sub_(wanted)
    with torch.enable_grad():
        found.requires_grad_()
        behind = layer.activation(found)
        (gradient,) = torch.autograd.grad(behind, found, behind.detach() - wanted)
    return gradient


class _Soft:
    """Soft roundings ``h``, and Adam on the numbers of which they are the stretched sigmoid, all in place.

    A tensor that is made anew costs more than what is computed in it: its memory comes page by page from the system.
    """

    def __init__(self, start: torch.Tensor) -> None:
        self.sigmoid = (start - _LEAST) / (_MOST - _LEAST)
        self.logits = torch.logit(self.sigmoid)
        self.first, self.second = torch.zeros_like(start), torch.zeros_like(start)
        self.h, self.one, self.other = start.clone(), torch.empty_like(start), torch.empty_like(start)

    def values(self) -> torch.Tensor:
        """``h``."""
        torch.sigmoid(self.logits, out=self.sigmoid)
        torch.mul(self.sigmoid, _MOST - _LEAST, out=self.h)
        return self.h.add_(_LEAST).clamp_(0, 1)

    def pull(self, gradient: torch.Tensor, done: float) -> None:
        """Add the gradient of ``_PULL * (1 - |2h - 1| ** exponent)``; ``done`` is the share of the time that is over.

        The exponent is two more than a power of two, or two, so that the power is made of squares.
        """
        squares = _SQUARES[min(int(done * len(_SQUARES)), len(_SQUARES) - 1)]
        torch.mul(self.h, 2, out=self.one)
        away = self.one.sub_(1)
        if squares is None:
            gradient.add_(away, alpha=-4 * _PULL)
            return
        torch.mul(away, away, out=self.other)
        for _ in range(squares):
            self.other.mul_(self.other)
        gradient.addcmul_(away, self.other, value=-2 * _PULL * (2 + 2 ** (squares + 1)))

    def step(self, gradient: torch.Tensor, number: int) -> None:
        """One step of Adam, given the gradient by ``h``; where ``h`` is clipped it is 0.

        The stretch of the sigmoid is left out of the gradient: Adam does not see a factor of all.
        """
        aten = torch.ops.aten
        aten.hardtanh_backward.grad_input(gradient, self.h, 0, 1, grad_input=self.one)
        aten.sigmoid_backward.grad_input(self.one, self.sigmoid, grad_input=self.other)
        one, two = _MOMENTA
        self.first.lerp_(self.other, 1 - one)
        self.second.mul_(two).addcmul_(self.other, self.other, value=1 - two)
        torch.mul(self.second, 1 / (1 - two**number), out=self.one)
        # inside of the root: that of a number with fewer digits than a float32 has takes 40 times as long
        self.one.add_(_LEAST_SQUARE).sqrt_()
        self.logits.addcdiv_(self.first, self.one, value=-_RATE / (1 - one**number))

    def is_decided(self) -> bool:
        """Whether all are up or down."""
        return bool(((self.h == 0) | (self.h == 1)).all())

    def is_up(self) -> torch.Tensor:
        """Which are."""
        return self.logits >= 0

"""How far one output is from another, in decibels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten
from torchmetrics.functional.audio import signal_noise_ratio


def float_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output (a tensor, or containers of them), in order."""
    return [x for x in tree_flatten(output)[0] if isinstance(x, torch.Tensor) and x.is_floating_point()]


@dataclass
class Power:
    """Signal and noise of many outputs, summed up: :attr:`sqnr_db` is that of :func:`sqnr_db` over all of them.

    Attributes:
        signal: Sum of the squares of the references.
        noise: Sum of the squares of the differences; infinite, where one has NaN or infinity that the other lacks.
    """

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Any, quantized: Any) -> None:
        """Add two outputs of one structure: tensors, or containers of them. Values that are not floats do not count."""
        for a, b in zip(float_tensors(reference), float_tensors(quantized), strict=True):
            signal, noise = _squares(a.detach()), _squares(a.detach() - b.detach())
            if math.isfinite(signal + noise):
                self.signal += signal
                self.noise += noise
                continue
            ref, other = a.detach().double(), b.detach().double()
            finite = torch.isfinite(ref)
            same = torch.where(finite, True, (ref == other) | (ref.isnan() & other.isnan()))
            if not bool(same.all() & torch.isfinite(other[finite]).all()):
                self.noise = math.inf
                continue
            self.signal += float(ref[finite].square().sum())
            self.noise += float((ref[finite] - other[finite]).square().sum())

    @property
    def sqnr_db(self) -> float:
        """Decibels; infinite where there is no noise."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise < math.inf else -math.inf


def _squares(x: torch.Tensor) -> float:
    flat = x.reshape(-1)
    return float(torch.dot(flat, flat))


def sqnr_db(reference: Any, quantized: Any) -> float:
    """``10 * log10(sum(ref^2) / sum((ref - q)^2))`` over all floating-point tensors of two outputs of one structure.

    Args:
        reference: A tensor of any shape, or containers of tensors.
        quantized: The same structure and shapes.

    Returns:
        Decibels; ``inf`` where both are equal, ``-inf`` where ``quantized`` has NaN or infinity that ``reference``
        does not have.

    Raises:
        ValueError: The numbers or shapes of the tensors differ, or there is no floating-point tensor.

    >>> round(sqnr_db(torch.tensor([1.0, -1.0]), torch.tensor([1.1, -1.1])), 2)
    20.0
    """
    references, others = float_tensors(reference), float_tensors(quantized)
    if [x.shape for x in references] != [x.shape for x in others] or not references:
        raise ValueError(
            f"outputs cannot be compared: {[tuple(x.shape) for x in references]} against "
            f"{[tuple(x.shape) for x in others]}"
        )
    ref = torch.cat([x.detach().reshape(-1).double().cpu() for x in references])
    other = torch.cat([x.detach().reshape(-1).double().cpu() for x in others])
    if torch.equal(ref, other):
        return float("inf")
    finite = torch.isfinite(ref)
    if not torch.isfinite(other[finite]).all():
        return float("-inf")
    # masked attention gives -inf on purpose: those values must be the same, and do not count
    if not torch.equal(ref[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return float("-inf")
    if torch.equal(ref[finite], other[finite]):
        return float("inf")
    return float(signal_noise_ratio(other[finite], ref[finite]))

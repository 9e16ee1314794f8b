"""The step of a weight with which its errors of rounding add up to least.

Of inputs with one mean ``m`` and variance ``v``, errors ``e`` of the weights that are summed for one output make an
error with the mean square ``v * sum(e ** 2) + m ** 2 * sum(e) ** 2``. Behind a ReLU means are not small, and
neighbouring inputs go with each other, as if they were larger; and the second term is the same for every image: it
shifts what follows. The step that makes the largest weight 127 is one of many. One that is up to a sixteenth larger
costs little of the first term, and among a few of them there is nearly always one with little of the second.

No data is needed. The second term is what data-free bias correction (Nagel et al. 2019,
https://arxiv.org/abs/1906.04721, section 4.2) puts right afterwards, and what SQuant (Guo et al. 2022,
https://arxiv.org/abs/2202.07471) avoids by flipping the rounding of single weights.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_quant._torch_ao import PerChannelMinMaxObserver

#: How many steps are tried, and the largest as a share of the least.
_STEPS, _LARGEST = 16, 1 + 1 / 16
#: ``m ** 2 / v``. Behind a ReLU of a normal distribution it is 0.47; that inputs go with each other counts as more.
_MEAN_COUNTS = 2.0
#: Weights that are tried together, so that they stay in the cache of a processor core.
_TOGETHER = 2**17


class BalancedObserver(PerChannelMinMaxObserver):
    """Observes a weight with one symmetric scale for each output channel; see the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        complete(self)

    def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
        """Take the steps of ``x_orig``, and give it back."""
        super().forward(x_orig)
        observe(self, x_orig, super().calculate_qparams()[0])
        return x_orig

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]  # torch.ao declares no types
        """``(scale, zero_point)``, each ``(channels,)``."""
        return widened(self, *super().calculate_qparams())


def complete(observer: Any) -> None:
    """Give a new observer, of torch.ao or torchao, what the functions below work with."""
    observer.is_balanced = True
    observer.register_buffer("share", torch.ones(()), persistent=False)


def is_balanced(observer: Any) -> bool:
    """Whether an observer, of torch.ao or torchao, is one of these."""
    return getattr(observer, "is_balanced", False) is True


def observe(observer: Any, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Choose the steps for a weight, as shares of ``scale``."""
    rows = weight.detach().movedim(observer.ch_axis, 0).flatten(1)
    observer.share = best_shares(rows, scale.to(rows.device))


def widened(observer: Any, scale: torch.Tensor, zero_point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With the steps that were chosen."""
    return scale * observer.share.to(scale), zero_point


def best_shares(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``(channels,)``: how much larger than ``scale`` the step with the least error is, 1 to ``1 + 1 / 16``.

    Args:
        rows: ``(channels, weights)``, floating point. Steps of a meta tensor, whose values are not there, are 1.
        scale: ``(channels,)``, above 0: the least step that cuts nothing off.
    """
    shares = torch.linspace(1, _LARGEST, _STEPS, device=rows.device)
    if rows.is_meta or not rows.numel():
        return torch.ones_like(scale)
    count = max(1, _TOGETHER // rows.shape[1])
    found = [_best(part, step, shares) for part, step in zip(rows.split(count), scale.split(count), strict=True)]
    return torch.cat(found).to(scale)


def _best(rows: torch.Tensor, scale: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    errors = []
    rows = rows.float()
    for share in shares:
        step = (scale.float() * share)[:, None]
        error = rows * (1.0 / step)  # in steps
        error = error.round().sub_(error)
        errors.append((error.square().sum(1) + _MEAN_COUNTS * error.sum(1).square()) * step[:, 0].square())
    return shares[torch.stack(errors).argmin(0)]

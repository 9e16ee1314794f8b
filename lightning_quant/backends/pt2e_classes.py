"""Our fake quantizes and our histogram as torchao knows them: derived from its classes, once it is there."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from lightning_quant import balanced, fake_quantize, learned_scale, observers
from lightning_quant._torch_ao import pt2e


@cache
def fake_quantize_class() -> Any:
    """:class:`lightning_quant.fake_quantize.FakeQuantize`, derived from torchao's."""
    base: Any = pt2e().FakeQuantize

    class FakeQuantize(base):
        """Torchao's, computed by :func:`lightning_quant.fake_quantize.fake_quantize`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            fake_quantize.complete(self)

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            """As torch.ao's."""
            return fake_quantize.fake_quantize(self, X)

    return FakeQuantize


@cache
def learned_class() -> Any:
    """:class:`lightning_quant.learned_scale.LearnedFakeQuantize`, derived from torchao's."""
    base: Any = pt2e().FakeQuantize

    class LearnedFakeQuantize(base):
        """Torchao's, computed by :func:`lightning_quant.learned_scale.fake_quantize`."""

        def __init__(self, *args: Any, sees_weights: bool = False, with_offset: bool = False, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            fake_quantize.complete(self)
            learned_scale.complete(self, sees_weights, with_offset)

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            """As torch.ao's."""
            return learned_scale.fake_quantize(self, X)

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            """``(scale, zero_point)`` as they were learned."""
            return learned_scale.qparams(self)

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            with learned_scale.resizable(self, state_dict, prefix):
                super()._load_from_state_dict(state_dict, prefix, *args)

    return LearnedFakeQuantize


@cache
def histogram_class() -> Any:
    """:class:`lightning_quant.observers.HistogramObserver`, derived from torchao's base of observers."""
    base: Any = pt2e().UniformQuantizationObserverBase

    class HistogramObserver(base):
        """Computed by :func:`lightning_quant.observers.observe`."""

        def __init__(self, search: str = "histogram", percentile: float = 99.99, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            observers.complete(self, search, percentile)

        def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
            """As torch.ao's."""
            observers.observe(self, x_orig)
            return x_orig

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            """As torch.ao's."""
            found: tuple[torch.Tensor, torch.Tensor] = self._calculate_qparams(*observers.chosen_range(self))
            return found

    return HistogramObserver


@cache
def balanced_class() -> Any:
    """:class:`lightning_quant.balanced.BalancedObserver`, derived from torchao's."""
    base: Any = pt2e().PerChannelMinMaxObserver

    class BalancedObserver(base):
        """Computed by :func:`lightning_quant.balanced.best_shares`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            balanced.complete(self)

        def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
            """As torch.ao's."""
            super().forward(x_orig)
            balanced.observe(self, x_orig, super().calculate_qparams()[0])
            return x_orig

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            """As torch.ao's."""
            return balanced.widened(self, *super().calculate_qparams())

    return BalancedObserver


@cache
def fixed_class() -> Any:
    """:class:`lightning_quant.observers.FixedRange`, derived from torchao's base of observers."""
    base: Any = pt2e().ObserverBase

    class FixedRange(base):
        """As :class:`lightning_quant.observers.FixedRange`."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """``x``."""
            return x

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            """As they were given."""
            return self.get_buffer("scale"), self.get_buffer("zero_point")

        @classmethod
        def like(cls, observer: Any, scale: torch.Tensor, zero_point: torch.Tensor) -> Any:
            """As :meth:`lightning_quant.observers.FixedRange.like`."""
            made = cls(dtype=observer.dtype)
            observers.copy_settings(made, observer, scale, zero_point)
            return made

    return FixedRange

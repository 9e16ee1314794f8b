"""Our fake quantize as torchao knows one."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from lightning_quant._torch_ao import pt2e
from lightning_quant.fake_quantize import complete, fake_quantize


@cache
def fake_quantize_class() -> Any:
    """:class:`lightning_quant.fake_quantize.FakeQuantize`, derived from torchao's. Made when torchao is there."""
    base: Any = pt2e().FakeQuantize

    class FakeQuantize(base):
        """Torchao's, computed by :func:`lightning_quant.fake_quantize.fake_quantize`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            complete(self)

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            """As torch.ao's."""
            return fake_quantize(self, X)

    return FakeQuantize

"""``torch.export`` of int8 graphs between Python code of other people."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_quant.errors import CaptureError


class _Variadic(nn.Module):
    """One signature for every program, so that the shapes of its inputs can be said in one way."""

    def __init__(self, module: nn.Module, noticed: bool) -> None:
        super().__init__()
        self.module = module
        self._noticed = noticed

    def forward(self, *data: Any) -> Any:
        """What the program gives."""
        if self._noticed:
            return self.module(*data)
        before = torch.compiler._is_exporting_flag
        torch.compiler._is_exporting_flag = False
        try:
            return self.module(*data)
        finally:
            torch.compiler._is_exporting_flag = before


def capture(
    module: nn.Module, inputs: tuple[Any, ...], shapes: tuple[Any, ...] | None = None
) -> torch.export.ExportedProgram:
    """``module`` by ``torch.export.export``, not strict.

    Code that asks ``torch.compiler.is_exporting()`` may call its layers otherwise than it did when these were captured:
    transformers makes a mask for every attention then. Where a layer refuses that, the answer becomes no, as it was.

    Args:
        module: Takes the data by position; put into evaluation mode.
        inputs: Its arguments.
        shapes: Of each of them, which dimensions are free; None: all are fixed.

    Raises:
        RuntimeError: Of torch.export, or of the operators that it runs.
    """
    dynamic = None if shapes is None else (shapes,)

    def exported(noticed: bool) -> torch.export.ExportedProgram:
        root = _Variadic(module, noticed).eval()
        return torch.export.export(root, inputs, dynamic_shapes=dynamic, strict=False)

    try:
        return exported(True)
    except CaptureError:
        return exported(False)

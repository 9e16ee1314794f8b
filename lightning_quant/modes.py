"""Settings of torch that hold while something runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Run attention as the operators that it is made of: those that do all at once hide its projections."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """``torch.load`` unpickles tensors and containers of them alone, also where torch asks it for more.

    ``torch.export.load`` does, for what it calls the sample inputs and for weights of classes of their own.
    """
    variables = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    os.environ[variables[0]] = "1"
    try:
        yield
    finally:
        del os.environ[variables[0]]
        os.environ.update(before)

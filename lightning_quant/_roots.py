"""Which Lightning packages are installed: ``pytorch_lightning``, ``lightning.pytorch``, or both.

They are two trees of classes with the same names: a LightningModule of one is refused by the Trainer of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def _installed() -> tuple[ModuleType, ...]:
    found = [import_module("pytorch_lightning")] if find_spec("pytorch_lightning") else []
    if find_spec("lightning") and find_spec("lightning.pytorch"):
        found.append(import_module("lightning.pytorch"))
    if not found:
        raise ImportError(
            "lightning_quant needs PyTorch Lightning: pip install 'lightning-quant[pytorch-lightning]', or "
            "'lightning-quant[lightning]' where the code imports lightning.pytorch."
        )
    return tuple(found)


#: The installed packages, ``pytorch_lightning`` first.
ROOTS: tuple[ModuleType, ...] = _installed()


def _callback_base() -> type:
    """A class that is a ``Callback`` of every installed root, so that the Trainer and the CLI of each accept it."""
    bases = tuple(root.Callback for root in ROOTS)
    return bases[0] if len(bases) == 1 else type("Callback", bases, {"__doc__": "A callback of every Lightning root."})


Callback: Any = _callback_base()


@contextmanager
def detached_modules() -> Iterator[None]:
    """Let LightningModules be traced that no Trainer holds: their property ``trainer`` is None, and does not raise."""
    before = [root.LightningModule._jit_is_scripting for root in ROOTS]
    for root in ROOTS:
        root.LightningModule._jit_is_scripting = True
    try:
        yield
    finally:
        for root, value in zip(ROOTS, before, strict=True):
            root.LightningModule._jit_is_scripting = value


def root_of(trainer_or_module: object) -> ModuleType:
    """The root that ``trainer_or_module`` (a Trainer or a LightningModule) is of."""
    for root in ROOTS:
        if isinstance(trainer_or_module, (root.Trainer, root.LightningModule)):
            return root
    raise TypeError(
        f"{type(trainer_or_module).__name__} is no Trainer or LightningModule of {[r.__name__ for r in ROOTS]}"
    )

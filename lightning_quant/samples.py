"""How many samples a validation loop looks at, where that can be known."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from lightning_quant.team import Team


class SampleCounter:
    """Counts the samples of a validation loop; give ``callback`` to it.

    Samples are the rows of a batch: the first dimension, where all of its tensors agree on that.
    """

    def __init__(self, root: ModuleType) -> None:
        self._samples: int | None = 0
        outer = self

        class Counter(root.Callback):  # type: ignore[name-defined]  # of the package that the user has
            def on_validation_batch_end(
                self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
            ) -> None:
                outer.add(batch, dataloader_idx)

        self.callback = Counter()

    def add(self, batch: Any, dataloader_idx: int = 0) -> None:
        """Count one batch. Metrics of several dataloaders are of different samples: that is not known here."""
        rows = {x.shape[0] for x in tree_flatten(batch)[0] if isinstance(x, torch.Tensor) and x.dim()}
        known = self._samples is not None and len(rows) == 1 and not dataloader_idx
        self._samples = (self._samples or 0) + rows.pop() if known else None

    def of_all(self, team: Team) -> int | None:
        """Of all processes together; None: it is not known."""
        found = team.gathered(self._samples)
        known = [n for n in found if n is not None]
        return sum(known) or None if len(known) == len(found) else None

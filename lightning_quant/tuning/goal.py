"""How much a metric may drop, and what may be spent on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_quant.errors import ConfigError

_WORDS: dict[str, tuple[str, ...]] = {
    "min": ("loss", "err", "error", "mse", "mae", "rmse", "mape", "perplexity", "ppl", "wer", "cer", "nll", "fid",
            "lpips"),
    "max": ("acc", "accuracy", "f1", "auc", "auroc", "map", "ap", "iou", "miou", "dice", "precision", "recall", "psnr",
            "ssim", "r2", "bleu", "kappa", "corr", "top1", "top5"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What has to hold of a metric, and what may be spent on it.

    Attributes:
        monitor: Name of a metric that the module logs in validation.
        max_drop: How much worse than in float it may be: at least 0.
        mode: ``max`` if more is better, ``min`` if less is; None: by the words in its name.
        relative: ``max_drop`` is a share of the float value.
        max_evaluations: How many sets of layers are evaluated at the most, at least 2.
        max_seconds: When no further set is evaluated. None: never.

    Raises:
        ConfigError: A value cannot be, or the name does not say which way is better.

    >>> Goal(monitor="val_loss", max_drop=0.1).mode
    'min'
    """

    monitor: str
    max_drop: float
    mode: Literal["min", "max"] | None = None
    relative: bool = False
    max_evaluations: int = 20
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ConfigError(
                f"max_drop={self.max_drop!r} needs monitor=..., the name of a metric that the module logs in "
                "validation."
            )
        if isinstance(self.max_drop, bool) or not isinstance(self.max_drop, (int, float)) or not self.max_drop >= 0:
            raise ConfigError(f"max_drop={self.max_drop!r}: give how much worse {self.monitor!r} may be, 0 or more.")
        if self.mode is None:
            object.__setattr__(self, "mode", _mode_of(self.monitor))
        if self.mode not in ("min", "max"):
            raise ConfigError(f"mode={self.mode!r}: give 'max' if more is better, 'min' if less is.")
        if (
            isinstance(self.max_evaluations, bool)
            or not isinstance(self.max_evaluations, int)
            or self.max_evaluations < 2
        ):
            raise ConfigError(f"max_evaluations={self.max_evaluations!r}: give 2 or more.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"max_seconds={self.max_seconds!r}: give a number above 0, or None.")

    def drop(self, reference: float, value: float) -> float:
        """How much worse ``value`` is than ``reference``; infinite if it is NaN."""
        lost = reference - value if self.mode == "max" else value - reference
        if math.isnan(lost):
            return math.inf
        return lost / max(abs(reference), 1e-12) if self.relative else lost

    def is_met(self, reference: float, value: float) -> bool:
        """Whether the drop is within the bound, but for the last bits of the difference."""
        return self.drop(reference, value) <= self.max_drop + 1e-9

    @property
    def shown(self) -> str:
        """The bound in words."""
        bound = f"{self.max_drop:.4g}" if not self.relative else f"{100 * self.max_drop:.4g} %"
        return f"{self.monitor} {'drops' if self.mode == 'max' else 'rises'} by at most {bound}"


def _mode_of(monitor: str) -> Literal["min", "max"]:
    words = set("".join(c if c.isalnum() else " " for c in monitor.lower()).split())
    less, more = (bool(words & set(_WORDS[mode])) for mode in ("min", "max"))
    if less == more:
        raise ConfigError(
            f"monitor={monitor!r}: its name does not say whether more or less is better. Give mode='max' or mode='min'."
        )
    return "min" if less else "max"

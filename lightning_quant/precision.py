"""Which of Lightning's precisions quantization works with: those that keep float32 weights."""

from __future__ import annotations

from typing import Any

from lightning_quant.errors import ConfigError

#: ``Trainer.precision`` where Parameters are float32. In mixed precision, layers compute in half; fake quantizes take
#: ranges and scales in float32, and what is evaluated and converted at the end is float32 altogether.
SUPPORTED = ("32-true", "bf16-mixed", "16-mixed")


def check_precision(trainer: Any) -> None:
    """Refuse a Trainer that casts weights.

    Raises:
        ConfigError: Its precision is none of ``SUPPORTED``.
    """
    precision = str(trainer.precision)
    if precision in SUPPORTED:
        return
    remedy = "Use Trainer(precision='32-true')"
    if precision in ("bf16-true", "16-true"):
        mixed = precision.replace("true", "mixed")
        remedy += f", or {mixed!r}: layers compute in half as here, and their weights stay float32"
    raise ConfigError(
        f"Trainer(precision={precision!r}): int8 is made from float32 weights, and this precision casts them. {remedy}."
    )

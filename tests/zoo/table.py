"""Write docs/zoo.md: what static quantization leaves of each architecture of the zoo.

python tests/zoo/table.py [names]    (without names: all, and the file is written)
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from architectures import ARCHITECTURES, MIN_COVERAGE, MIN_SQNR_DB, by_name
from measure import BATCH, CALIBRATION_BATCHES, SETTLING_STEPS, Row, measure

from lightning_quant import QuantConfig
from lightning_quant.config import cpu_has_vnni, resolve

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def page(rows: list[Row]) -> str:
    """The page as Markdown."""
    config = resolve(QuantConfig())
    lines = [
        "# The zoo",
        "",
        f"Static post-training quantization of {len(rows)} architectures with the default `QuantConfig()` and no "
        "exclusions. Made by `make zoo`.",
        "",
        f"Weights are random, and batch norms have seen noise in {SETTLING_STEPS} forward passes; "
        f"{CALIBRATION_BATCHES} batches of {BATCH} samples of noise calibrate, another one is compared. *SQNR*: signal "
        "to quantization noise of the output against the float network, in dB. *Coverage*: share of the "
        "multiply-accumulates of layers with weights that run in int8. Asked for are "
        f"{MIN_SQNR_DB:.0f} dB and {MIN_COVERAGE}. A random network amplifies roundings that a trained one does not, "
        "so that these figures find what is broken, and say little about accuracy.",
        "",
        f"torch {torch.__version__}, engine `{config.engine}`, "
        f"{'VNNI' if cpu_has_vnni() else 'no VNNI: weights of 7 bits'}.",
        "",
        "| architecture | library | family | SQNR, dB | coverage | remark |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        entry = row.entry
        lines.append(
            f"| {entry.name} | {entry.library} | {entry.family} | {row.sqnr_db:.1f} | {row.coverage:.3f} | "
            f"{entry.reason} |"
        )
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    """Measure, print, and write the page if all were measured."""
    warnings.simplefilter("ignore")
    rows = []
    for entry in [by_name(name) for name in names] or ARCHITECTURES:
        row = measure(entry)
        print(f"{entry.name:36s} {row.sqnr_db:6.1f} dB  coverage {row.coverage:.3f}  "
              f"prepare {row.prepare_s:5.1f} s  convert {row.convert_s:5.1f} s", flush=True)  # fmt: skip
        rows.append(row)
    if not names:
        PAGE.write_text(page(rows), encoding="utf8")


if __name__ == "__main__":
    main(sys.argv[1:])

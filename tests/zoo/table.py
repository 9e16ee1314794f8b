"""Write docs/zoo.md: what static quantization leaves of each architecture of the zoo, and what training does to it.

python tests/zoo/table.py [names]    (without names: all, one of each family is trained, and the file is written)

Without names, what the tests have kept (tests/zoo/results.py) is not measured again.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from architectures import ARCHITECTURES, FAMILIES, MIN_COVERAGE, MIN_SQNR_DB, by_name
from epoch import BATCH as TRAINING_BATCH
from epoch import LEARNING_RATE, TRAINED, Epoch, pl, train
from measure import BATCH, CALIBRATION_BATCHES, SETTLING_STEPS, Files, Row, files, measure
from results import kept
from tasks import SAMPLES

from lightning_quant import QuantConfig
from lightning_quant.config import cpu_has_vnni, resolve

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def page(rows: list[Row], of_files: list[Files], epochs: list[Epoch]) -> str:
    """The page as Markdown."""
    return "\n".join([*_static(rows, of_files), "", *_training(epochs)]) + "\n"


def _static(rows: list[Row], of_files: list[Files]) -> list[str]:
    config = resolve(QuantConfig())
    lines = [
        "# The zoo",
        "",
        f"Static post-training quantization of {len(rows)} architectures with the default `QuantConfig()` and no "
        "exclusions. Made by `make zoo`.",
        "",
        f"Weights are random, and batch norms have seen noise in {SETTLING_STEPS} forward passes; "
        f"{CALIBRATION_BATCHES} batches of {BATCH} samples of noise calibrate, another one is compared. *SQNR*: signal "
        "to quantization noise of the output against the float network, in dB: of the converted network in torch, and "
        "of its files in ONNX Runtime and OpenVINO. *Coverage*: share of the "
        "multiply-accumulates of layers with weights that run in int8. Asked for are "
        f"{MIN_SQNR_DB:.0f} dB and {MIN_COVERAGE}. A random network amplifies roundings that a trained one does not, "
        "so that these figures find what is broken, and say little about accuracy.",
        "",
        f"torch {torch.__version__}, engine `{config.engine}`, "
        f"{'VNNI' if cpu_has_vnni() else 'no VNNI: weights of 7 bits'}.",
        "",
        "| architecture | library | family | SQNR, dB | ONNX | OpenVINO | coverage | remark |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, written in zip(rows, of_files, strict=True):
        entry = row.entry
        remarks = "; ".join(text for text in (entry.reason, *dict.fromkeys(entry.without.values())) if text)
        lines.append(
            f"| {entry.name} | {entry.library} | {entry.family} | {row.sqnr_db:.1f} | {_file(written, 'onnx')} | "
            f"{_file(written, 'openvino')} | {row.coverage:.3f} | {remarks} |"
        )
    return lines


def _file(written: Files, name: str) -> str:
    return "none" if name in written.entry.without else f"{written.sqnr_db[name]:.1f}"


def _training(epochs: list[Epoch]) -> list[str]:
    lines = [
        "## Training",
        "",
        "One architecture of each family through one epoch of a `Trainer` with the callback "
        "`QuantizationAwareTraining()`, which ends in an int8 file; and through the same epoch without it, from the "
        "same weights.",
        "",
        f"Weights are random, and batch norms have seen the training data in {SETTLING_STEPS} forward passes. The data "
        f"is real and small: {TRAINED} samples in batches of {TRAINING_BATCH} train, {SAMPLES - TRAINED} others "
        f"validate. Adam, learning rate {LEARNING_RATE}. *Training loss*: of the first and the last batch. "
        "*Validation loss*, and *accuracy*: after the epoch in float; after the epoch with fake quantize, as "
        "it was validated in training; and of the int8 file. So short a training shows that all of it runs and that "
        "int8 follows what was trained. It says nothing of the accuracy that a long one reaches: with random weights, "
        "one rounding changes every output.",
        "",
        "| family | architecture | task | training loss: float | fake quantize "
        "| validation loss: float | fake quantize | int8 | accuracy: float | fake quantize | int8 | coverage |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for epoch in epochs:
        entry = epoch.entry
        metrics = (epoch.float_metrics, epoch.fake_metrics, epoch.file_metrics)
        cells = [
            entry.family,
            entry.name,
            entry.task.name,
            *(f"{losses[0]:.2f} → {losses[-1]:.2f}" for losses in (epoch.float_losses, epoch.fake_losses)),
            *(f"{m['val_loss']:.3f}" for m in metrics),
            *(f"{m['val_acc']:.2f}" for m in metrics),
            f"{epoch.coverage:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _trained(name: str) -> Epoch:
    with tempfile.TemporaryDirectory() as directory:
        return train(by_name(name), Path(directory))


def main(names: list[str]) -> None:
    """Measure, print, and write the page if all were measured."""
    warnings.simplefilter("ignore")
    logging.getLogger(f"{pl.__name__}.utilities.rank_zero").setLevel(logging.WARNING)
    rows, of_files, epochs = [], [], []
    for name in names or [entry.name for entry in ARCHITECTURES]:
        row = (None if names else kept(Row, by_name(name))) or measure(by_name(name))
        print(f"{name:36s} {row.sqnr_db:6.1f} dB  coverage {row.coverage:.3f}  "
              f"prepare {row.prepare_s:5.1f} s  convert {row.convert_s:5.1f} s", flush=True)  # fmt: skip
        rows.append(row)
        of_files.append((None if names else kept(Files, by_name(name))) or files(by_name(name)))
        print(f"{name:36s} files: {of_files[-1].sqnr_db}", flush=True)
    for name in names or [entry.name for entry in FAMILIES.values()]:
        epoch = (None if names else kept(Epoch, by_name(name))) or _trained(name)
        print(f"{name:36s} last training loss: float {epoch.float_losses[-1]:.3f}  "
              f"fake quantize {epoch.fake_losses[-1]:.3f}  validation: "
              f"float {epoch.float_metrics['val_loss']:.3f}  fake quantize {epoch.fake_metrics['val_loss']:.3f}  "
              f"int8 {epoch.file_metrics['val_loss']:.3f}  {epoch.seconds:5.1f} s", flush=True)  # fmt: skip
        epochs.append(epoch)
    if not names:
        PAGE.write_text(page(rows, of_files, epochs), encoding="utf8")


if __name__ == "__main__":
    main(sys.argv[1:])

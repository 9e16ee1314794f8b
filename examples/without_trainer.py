"""The functions behind the callbacks, on a plain module: prepare, calibrate, convert, export, load.

python examples/without_trainer.py
"""

import torch
from torch import nn

from lightning_quant import ExportConfig, QuantConfig, convert, coverage, export, load, prepare


def main() -> None:
    """Quantize a small network with random weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(256, 10),
    ).eval()  # fmt: skip
    images = torch.randn(32, 3, 32, 32)

    config = QuantConfig()
    prepared = prepare(model, config, method="static", example_inputs=images)
    for batch in images.split(8):  # calibration
        prepared(batch)
    int8 = convert(prepared, config)
    print(int8)

    covered = coverage(int8, images)
    print(f"{100 * covered.share:.1f} % of the multiply-accumulates run in int8")
    for row in covered.rows:
        print(f"  {row.name:10} {row.op:28} {row.macs:>12,} {'int8' if row.int8 else row.reason}")

    paths = export(prepared, config, ExportConfig(directory="quantized/without_trainer"), images)
    for name, path in paths.items():
        output = load(path)(images)
        print(name, path, f"largest difference {float((output - int8(images)).abs().max()):.4f}")


if __name__ == "__main__":
    main()

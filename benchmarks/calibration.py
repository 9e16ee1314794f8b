"""What calibration costs beside a float pass, and how good its ranges are, beside other tools.

    python benchmarks/calibration.py [--rounds N] [--markdown FILE]

Ratios of one run: in each round every contestant sees one batch, and the figure is the median over rounds of its time
by that of the float network. NNCF has no pass of its own to time: the whole of its quantization of 300 images, by as
many float passes, is beside the whole of ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import KEEP_MEMORY, THREADS, make_model

MODELS = ("resnet18", "mobilenet_v2", "vit_tiny")
CONTESTANTS = ("ours, fx", "ours, eager", "ours, pt2e", "torch FX", "torchao PT2E")
BATCH = 16
#: Images of a whole quantization.
IMAGES = 304


def make_observed(contestant: str, model: Any, x: Any) -> Any:
    """``model`` with observers, as this tool's own documentation makes it."""
    import torch

    if contestant.startswith("ours"):
        from lightning_quant import QuantConfig, prepare

        backend: Any = contestant.rpartition(" ")[2]
        return prepare(model, QuantConfig(backend=backend), method="static", example_inputs=x)
    if contestant == "torch FX":
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        return prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    exported = torch.export.export(model, (x,), strict=True).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    return prepare_pt2e(exported, quantizer)


def passes(name: str, rounds: int) -> dict[str, float]:
    """Contestant -> the median of its time by that of a float pass; and ``float ms``."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 96, 96)
    model = make_model(name).eval()
    networks: dict[str, Callable[..., Any]] = {"float": model}
    for contestant in CONTESTANTS:
        try:
            networks[contestant] = make_observed(contestant, make_model(name).eval(), x)
        except Exception as error:  # what a tool cannot do is a result
            print(f"{name}, {contestant}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    taken: dict[str, list[float]] = {contestant: [] for contestant in networks}
    with torch.no_grad():
        for _ in range(2):
            for network in networks.values():
                network(x)
        for _ in range(rounds):
            for contestant, network in networks.items():
                start = time.perf_counter()
                network(x)
                taken[contestant].append(time.perf_counter() - start)
    floats = taken.pop("float")
    ratios = {c: statistics.median(a / b for a, b in zip(t, floats, strict=True)) for c, t in taken.items()}
    return {"float ms": 1000 * statistics.median(floats), **ratios}


def whole(name: str) -> dict[str, float]:
    """Contestant -> the time of a whole quantization of ``IMAGES`` images by that of as many float passes."""
    import torch

    data = [torch.randn(BATCH, 3, 96, 96) for _ in range(IMAGES // BATCH)]
    model = make_model(name).eval()
    with torch.no_grad():
        model(data[0])
        start = time.perf_counter()
        for x in data:
            model(x)
    floats = time.perf_counter() - start

    def ours() -> None:
        from lightning_quant import QuantConfig, convert, prepare

        prepared = prepare(model, QuantConfig(), method="static", example_inputs=data[0])
        with torch.no_grad():
            for x in data:
                prepared(x)
        convert(prepared)

    def nncf() -> None:
        import nncf

        nncf.quantize(model, nncf.Dataset(data), subset_size=len(data))

    found = {}
    for contestant, run in (("ours", ours), ("NNCF", nncf)):
        try:
            start = time.perf_counter()
            run()
            found[contestant] = (time.perf_counter() - start) / floats
        except Exception as error:  # what a tool cannot do is a result
            print(f"{name}, {contestant}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="file to which the table is written")
    parser.add_argument("--models", nargs="*", default=MODELS)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(THREADS)
    heads = [*CONTESTANTS, "all of it: ours", "all of it: NNCF"]
    lines = ["| | float pass | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for name in options.models:
        row, total = passes(name, options.rounds), whole(name)
        values = [*(row.get(c) for c in CONTESTANTS), total.get("ours"), total.get("NNCF")]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {name} | {row['float ms']:.0f} ms | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n", encoding="utf8")


if __name__ == "__main__":
    main()

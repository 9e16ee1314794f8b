"""What a training step costs with fake quantize, beside a float step and beside other tools: time and memory.

    python benchmarks/training.py [--rounds N] [--markdown FILE]

Ratios of one run: in each round every contestant does one step, and the figure is the median over rounds of its time by
that of float. Peak memory is that of all tensors in a step, in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: glibc gives freed memory back to the system and gets it again page by page, in which process and at which step
#: depends on what else was allocated: up to a third of a step, for float as for the others. All keep theirs here.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**35)}

MODELS = ("resnet18", "mobilenet_v2", "vit_tiny")
CONTESTANTS = ("ours, fx", "ours, eager", "ours, pt2e", "torch FX", "torchao PT2E", "NNCF")
THREADS = 2


def make_model(name: str) -> Any:
    """An untrained network for images of 96x96, with 10 classes."""
    if name == "vit_tiny":
        import timm

        return timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=10)
    import torchvision

    return getattr(torchvision.models, name)(num_classes=10)


def make_trainable(contestant: str, model: Any, x: Any) -> Any:
    """``model`` with fake quantize, as this tool's own documentation makes it, in training mode."""
    import torch

    if contestant == "float":
        return model.train()
    if contestant.startswith("ours"):
        from lightning_quant import QuantConfig, prepare

        backend: Any = contestant.rpartition(" ")[2]
        return prepare(model, QuantConfig(backend=backend), method="qat", example_inputs=x).train()
    if contestant == "torch FX":
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (x,))
    if contestant == "torchao PT2E":
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
        from torchao.quantization.pt2e import move_exported_model_to_train
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

        exported = torch.export.export(model.train(), (x,), strict=True).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
        return move_exported_model_to_train(prepare_qat_pt2e(exported, quantizer))
    import nncf

    return nncf.quantize(model.eval(), nncf.Dataset([x]), subset_size=1).train()


def make_step(contestant: str, name: str) -> Callable[[], None]:
    """One step of SGD with momentum on a batch of 16."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 96, 96), torch.randint(0, 10, (16,))
    model = make_trainable(contestant, make_model(name), x)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def times(name: str, rounds: int) -> dict[str, float]:
    """Contestant -> the median of its time by that of float; and ``float ms``."""
    steps = {}
    for contestant in ("float", *CONTESTANTS):
        try:
            steps[contestant] = make_step(contestant, name)
            steps[contestant]()
        except Exception as error:  # what a tool cannot do is a result
            print(f"{name}, {contestant}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            steps.pop(contestant, None)
    for step in steps.values():
        step()
    gc.collect()
    taken: dict[str, list[float]] = {contestant: [] for contestant in steps}
    for _ in range(rounds):
        for contestant, step in steps.items():
            start = time.perf_counter()
            step()
            taken[contestant].append(time.perf_counter() - start)
    floats = taken.pop("float")
    ratios = {c: statistics.median(a / b for a, b in zip(t, floats, strict=True)) for c, t in taken.items()}
    return {"float ms": 1000 * statistics.median(floats), **ratios}


def _held() -> int:
    """Bytes of all tensors that Python can reach."""
    import torch

    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def peak(contestant: str, name: str) -> float:
    """Megabytes of tensors at the most in a training step: weights, gradients, optimizer, activations, all that is."""
    from torch.profiler import ProfilerActivity, profile

    step = make_step(contestant, name)
    step()
    step()
    before = _held()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    most = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return (before + most) / 1e6


def _peak_in_own_process(contestant: str, name: str) -> float | None:
    command = [sys.executable, __file__, "--peak", contestant, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def _table(rows: dict[str, dict[str, float]], memory: dict[str, dict[str, float | None]]) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    lines = ["| | float step | " + " | ".join(CONTESTANTS) + " |", "|---|---|" + "---|" * len(CONTESTANTS)]
    for name, row in rows.items():
        lines.append(
            f"| {name}, step by float step | {row['float ms']:.0f} ms | "
            + " | ".join(cell(row.get(c)) for c in CONTESTANTS)
            + " |"
        )
    for name, peaks in memory.items():
        floats = peaks["float"]
        assert floats is not None
        cells = [cell(None if (value := peaks[c]) is None else value / floats) for c in CONTESTANTS]
        lines.append(f"| {name}, peak memory by float's | {floats:.0f} MB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="file to which the table is written")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()) and not options.peak:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(THREADS)
    if options.peak:
        print(peak(*options.peak))
        return
    rows = {name: times(name, options.rounds) for name in options.models}
    memory = {name: {c: _peak_in_own_process(c, name) for c in ("float", *CONTESTANTS)} for name in options.models}
    table = _table(rows, memory)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n", encoding="utf8")


if __name__ == "__main__":
    main()

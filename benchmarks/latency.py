"""How fast our files are beside those of each runtime's own tools: one sample and sixteen, 2 threads.

    python benchmarks/latency.py [--models resnet50,...] [--rounds N] [--page FILE]

Every contestant's file is written once, from the same float model and the same calibration data. Then, in each round,
each file is timed in a process of its own, one after the other, and the figure is the median over the rounds of the
process's median. Weights are random, batch norms settled: what is timed does not depend on their values, but for zeros.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "vit_tiny", "mobilenet_v3_small", "densenet121")
BATCHES = (1, 16)
THREADS = 2
SIZE = 224
PAGE = Path(__file__).parents[1] / "docs" / "latency.md"
BACKENDS = ("fx", "pt2e")
#: Name of a contestant -> (the runtime that times it, its file).
PEERS = {
    "float": ("onnxruntime", "float.onnx"),
    "float ": ("openvino", "float.onnx"),
    "own quantizer": ("onnxruntime", "ort.onnx"),
    "own quantizer ": ("openvino", "ort.onnx"),
    "NNCF": ("openvino", "nncf.xml"),
}
#: pt2e does not observe what ONNX Runtime's convolutions need before a SiLU and the like: its files are OpenVINO's.
OURS = {
    "ours, fx, all in int8": ("onnxruntime", "int8/model.onnx"),
    "ours, fx": ("onnxruntime", "fx/model.onnx"),
    "ours, fx ": ("openvino", "fx/model.xml"),
    "ours, pt2e ": ("openvino", "pt2e/model.xml"),
}

HEAD = """# Latency

Made by `make bench-latency`. Milliseconds on 2 threads, 224x224: medians over rounds, in each of which every file is
timed in a process of its own. All files of a network come from the same float model and the same calibration data.
OpenVINO runs a shape that is fixed. *own quantizer*: `onnxruntime.quantization.quantize_static` (QDQ, weights per
channel), whose file OpenVINO runs as well. *NNCF*: `nncf.quantize` of the OpenVINO model. *ours*:
`ExportConfig(skip_slow=True)`, one file for both batches; *all in int8*: without it. The last column is the
fastest of ours by the fastest of all others: the median of that ratio over the rounds.
"""


def make_model(name: str) -> Any:
    """The float network, its batch norms settled and no weight or bias zero: a runtime leaves out what adds nothing."""
    import timm
    import torch
    import torchvision
    from torch import nn

    torch.manual_seed(0)
    made: nn.Module = (
        timm.create_model("vit_tiny_patch16_224") if name == "vit_tiny" else getattr(torchvision.models, name)()
    )
    made.train()
    with torch.no_grad():
        for _ in range(5):
            made(torch.randn(16, 3, SIZE, SIZE))
        for weight in made.parameters():
            if weight.dim() > 1 and not weight.any():  # timm's heads
                nn.init.normal_(weight, std=0.02)
        for module in made.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter) and not bias.any():
                nn.init.normal_(bias, std=0.1)
    return made.eval()


def write_files(name: str, folder: Path) -> None:
    """Every contestant's file."""
    import openvino
    import torch
    from peers import nncf_int8, write_onnx, write_onnxruntime_int8

    from lightning_quant import ExportConfig, QuantConfig, export, prepare

    model = make_model(name)
    data = [torch.randn(4, 3, SIZE, SIZE) for _ in range(4)]
    write_onnx(model, data[0], folder / "float.onnx")
    write_onnxruntime_int8(folder / "float.onnx", data, folder / "ort.onnx")
    quantized = nncf_int8(model, data, transformer=name.startswith("vit"))
    openvino.save_model(quantized, str(folder / "nncf.xml"), compress_to_fp16=False)
    for backend in BACKENDS:
        config: Any = QuantConfig(backend=backend)  # type: ignore[arg-type]
        prepared = prepare(model, config, method="static", example_inputs=data[0][:2])
        with torch.no_grad():
            for x in data:
                prepared(x)
        formats: Any = ("onnx", "openvino") if backend == "fx" else ("openvino",)
        files = [ExportConfig(directory=str(folder / backend), formats=formats, skip_slow=True)]
        if backend == "fx":
            files.append(ExportConfig(directory=str(folder / "int8"), formats=("onnx",)))
        for config_of_files in files:
            export(prepared, None, config_of_files, example_inputs=data[0])


def timed(runtime: str, path: Path, batch: int, seconds: float = 0.7) -> float:
    """Median milliseconds of a file in this process."""
    import numpy as np

    x = np.random.default_rng(0).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}

        def run() -> None:
            session.run(None, feed)
    else:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(path))
        model.reshape({model.inputs[0]: list(x.shape)})
        settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def run() -> None:
            request.infer([x], share_inputs=True)

    for _ in range(3):
        run()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def race(folder: Path, batch: int, rounds: int) -> dict[str, float]:
    """Contestant -> milliseconds; and ``ratio``, the median over rounds of our fastest by the fastest other."""
    contestants = {**PEERS, **OURS}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (runtime, file) in contestants.items():
            command = [sys.executable, __file__, "--time", runtime, str(folder / file), str(batch)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode and name in OURS:
                raise RuntimeError(f"{file}: {done.stderr}")
            # a runtime may end its process on a peer's file: that one has no time
            times[name].append(math.inf if done.returncode else float(done.stdout))
    ratios = [min(times[n][i] for n in OURS) / min(times[n][i] for n in PEERS) for i in range(rounds)]
    return {"ratio": statistics.median(ratios), **{name: statistics.median(values) for name, values in times.items()}}


def left_float(folder: Path) -> dict[str, int]:
    """Our file -> how many of its layers were left in float."""
    from lightning_quant.runtime.metadata import read_metadata

    return {name: len(read_metadata(folder / file)["left_float"]) for name, (_, file) in OURS.items()}


def page(results: dict[str, dict[int, dict[str, float]]], left: dict[str, dict[str, int]], path: Path) -> None:
    """Write the tables."""
    names = [*PEERS, *OURS]
    runtimes = {name: runtime for name, (runtime, _) in {**PEERS, **OURS}.items()}
    shown = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    head = [f"{name.strip()}: {shown[runtimes[name]]}" for name in names]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino", "nncf"))
    lines = [HEAD, f"{packages}. In brackets: layers of the file that were left in float.", ""]
    for batch in BATCHES:
        lines += [f"## Batch {batch}", "", "| | " + " | ".join(head) + " | ours by the fastest other |"]
        lines += ["|" + "---|" * (len(head) + 2)]
        for model, by_batch in results.items():
            times = by_batch[batch]
            cells = [_cell(times[n], left[model].get(n, 0)) for n in names]
            lines.append(f"| {model} | " + " | ".join(cells) + f" | {times['ratio']:.2f} |")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf8")


def _cell(milliseconds: float, left: int) -> str:
    if math.isinf(milliseconds):
        return "the runtime crashes"
    return f"{milliseconds:.2f}" + (f" ({left})" if left else "")


def main() -> None:
    """Write files, time them, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--folder", type=Path, help="keep the files here; those that are there are not written again")
    parser.add_argument("--time", nargs=3, metavar=("RUNTIME", "FILE", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        runtime, file, batch = options.time
        sys.stdout.write(str(timed(runtime, Path(file), int(batch))))
        return
    if options.write:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        import torch

        torch.set_num_threads(THREADS)
        write_files(options.write[0], Path(options.write[1]))
        return
    results: dict[str, dict[int, dict[str, float]]] = {}
    left: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models.split(","):
            folder = (options.folder or Path(scratch)) / model
            if not (folder / BACKENDS[-1] / "model.xml").exists():
                folder.mkdir(parents=True, exist_ok=True)
                subprocess.run([sys.executable, __file__, "--write", model, str(folder)], check=True)
            left[model] = left_float(folder)
            results[model] = {batch: race(folder, batch, options.rounds) for batch in BATCHES}
            sys.stdout.write(f"{model}: {json.dumps(results[model])}\n")
            sys.stdout.flush()
            page(results, left, options.page)


if __name__ == "__main__":
    main()

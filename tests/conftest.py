"""What holds for every test: warnings are errors, skips speak, seeds are fixed, files land in a folder of their own."""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch

REPO = Path(__file__).parents[1]

#: Set it, and a skip fails, so that no run can pass by not testing. "unavoidable: ..." as a reason is let through.
NO_SKIPS = "LIGHTNING_QUANT_NO_SKIPS"
UNAVOIDABLE = "unavoidable:"

FASHION_MNIST = "LIGHTNING_QUANT_FASHION_MNIST"
FASHION_MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

#: Warnings that nobody here can act on, one regex each, matched from the start of the text. All others are errors.
#: No colon in a regex: it separates the fields of a filter.
IGNORED_WARNINGS = (
    # torch.ao.quantization announces its own removal ("in 2.10") on every call, and is still whole in 2.14
    r"torch\.ao\.quantization is deprecated and will be removed",
    # torch's observers announce it about the argument that torch's own default qconfigs give them
    r"Please use quant_min and quant_max to specify the range for observers",
    # int8 tensors cannot be made any other way (C++, once per process)
    r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other quantized tensor creation functions",
    # TorchScript is the one format that torch's int8 kernels can be saved in
    r"`torch\.jit\.\w+` is deprecated",
    r"`torch\.jit\.\w+` is not supported in Python 3\.14",
    # raised inside torch, where an int8 tensor is copied or loaded
    r"TypedStorage is deprecated",
    # Lightning still compares with a class that torch deprecates
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # raised by the import of dependencies that still use setuptools' module
    r"pkg_resources is deprecated as an API",
    r"Deprecated call to `pkg_resources\.declare_namespace",
    # Lightning's advice on speed, of no use for data that fits in memory; the first depends on the machine's cores
    r"The '.*' does not have many workers which may be a bottleneck",
    r"The number of training batches .* is smaller than the logging interval",
    # which logger Lightning takes by default depends on what else is installed
    r"Starting from v1\.9\.0, `tensorboardX` has been removed as a dependency",
    # torch.compile of torch 2.13 makes one of each autograd function that it meets
    r"<class 'torch\.autograd\.function\.Function'> should not be instantiated",
    # int8 runs on the CPU, whatever else the machine has
    r"GPU available but not used",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    for text in IGNORED_WARNINGS:  # later lines win over earlier ones
        config.addinivalue_line("filterwarnings", f"ignore:{text}")


def _refuse_avoidable_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure where ``NO_SKIPS`` is set. An expected failure (xfail) is no skip."""
    if not os.environ.get(NO_SKIPS) or not report.skipped or hasattr(report, "wasxfail"):
        return
    # pytest keeps a skip as (file, line, "Skipped: reason")
    where, reason = "", str(report.longrepr)
    if isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        where = f"{path}:{line}: "
    reason = reason.removeprefix("Skipped: ")
    if reason.startswith(UNAVOIDABLE):
        return
    report.outcome = "failed"
    report.longrepr = (
        f"{where}skipped: {reason}\n{NO_SKIPS} is set, so that a skip is a failure. Install what is missing, or start "
        f"the reason with {UNAVOIDABLE!r} where no installation can help."
    )


# tryfirst: outermost, so that pytest's own wrapper has marked expected failures by the time ours looks
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_avoidable_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_avoidable_skip(report)
    return report


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Random tensors of a test module are the same in every run, whatever was imported before it."""
    if isinstance(collector, pytest.Module):
        _seed()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed seeds, and a folder of its own for what a test writes without being told where (``lightning_logs``)."""
    _seed()
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def fashion_mnist_path() -> Path:
    """The folder with the four gzipped IDX files of Fashion-MNIST."""
    named = os.environ.get(FASHION_MNIST)
    # relative to the repository, because a test's working directory is its own
    folders = [REPO / named] if named else [Path("/usr/share/datasets/fashion-mnist"), REPO / ".data" / "fashion-mnist"]
    for folder in folders:
        if all((folder / name).is_file() for name in FASHION_MNIST_FILES):
            return folder
    if named:  # somebody asked for this folder: a skip would hide the mistake
        pytest.fail(f"{FASHION_MNIST}={named}: the folder does not hold {', '.join(FASHION_MNIST_FILES)}.")
    pytest.skip("Fashion-MNIST is not installed: run `make data`")

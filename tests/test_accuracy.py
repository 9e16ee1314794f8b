"""Int8 accuracy beside float on real data, as benchmarks/accuracy.py measures it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest
import torch
from torch.utils.data import TensorDataset

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def accuracy() -> ModuleType:
    return benchmark("accuracy")


def _check(rows: list, accuracy: ModuleType) -> None:
    # the goals of the package: 0.5 point after training, 0.3 point with training, means over the seeds
    for row in rows:
        for report in row.ptq.values():
            assert row.float_acc - accuracy.int8_acc(report) <= 0.005
        for report in (*row.ptq.values(), *row.qat.values()):
            assert report.coverage >= 0.99
    for backend in accuracy.TRAINED:
        trained = mean(accuracy.int8_acc(row.qat[backend]) for row in rows)
        assert mean(row.float_acc for row in rows) - trained <= 0.003


@pytest.mark.slow
def test_digits(accuracy: ModuleType) -> None:
    rows = [accuracy.run(accuracy.digits_task(), seed) for seed in accuracy.SEEDS]
    assert min(row.float_acc for row in rows) > 0.95
    _check(rows, accuracy)


@pytest.mark.slow
def test_fashion_mnist(accuracy: ModuleType, fashion_mnist_path: Path) -> None:
    rows = [accuracy.run(accuracy.fashion_mnist_task(fashion_mnist_path), seed) for seed in accuracy.SEEDS]
    assert min(row.float_acc for row in rows) > 0.87
    _check(rows, accuracy)


@pytest.mark.slow
def test_the_rows_of_few_bits_run(tmp_path: Path) -> None:
    """On noise: what is measured is there for each setting. The figures are those of `make bench-accuracy`."""
    recovery = benchmark("recovery")
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(256, 1, 28, 28), torch.randint(0, 10, (256,)))
    found = recovery.run((data, data), 0, str(tmp_path))
    assert list(found) == [setting.name for setting in recovery.settings()]
    for row in found.values():
        assert 0 <= row.ptq <= 1
        assert 0 <= row.qat <= 1


@pytest.mark.slow
def test_learned_rounding_of_four_bits(fashion_mnist_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a depthwise network, as benchmarks/adaround.py measures it: within a point of float, without training."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    adaround = importlib.import_module("adaround")
    task = adaround.fashion_mnist_task(fashion_mnist_path)
    for seed in adaround.SEEDS:
        in_float, _, to_nearest, learned, _ = adaround.run(task, seed)
        assert in_float > 87
        assert in_float - learned <= 1.0
        assert learned > to_nearest + 1.0

"""Int8 accuracy beside float on real data, as benchmarks/accuracy.py measures it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def accuracy() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "accuracy.py"
    spec = importlib.util.spec_from_file_location("benchmarks_accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
def test_learned_rounding_of_four_bits(fashion_mnist_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a depthwise network, as benchmarks/adaround.py measures it: within a point of float, without training."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    benchmark = importlib.import_module("adaround")
    task = benchmark.fashion_mnist_task(fashion_mnist_path)
    for seed in benchmark.SEEDS:
        in_float, _, to_nearest, learned, _ = benchmark.run(task, seed)
        assert in_float > 87
        assert in_float - learned <= 1.0
        assert learned > to_nearest + 1.0

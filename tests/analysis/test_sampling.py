"""Sampling errors: the formula by experiment, and where there is none to give."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_quant.analysis.sampling import standard_error


def test_it_is_the_spread_of_accuracies_of_many_samples() -> None:
    p, n, trials = 0.85, 400, 20_000
    accuracies = np.random.default_rng(0).binomial(n, p, trials) / n
    # the standard deviation of so many trials is known to 1 / sqrt(2 * trials), 0.5 %; four times that
    assert standard_error("val_acc", p, n) == pytest.approx(accuracies.std(), rel=0.02)


@pytest.mark.parametrize("name", ["val_acc", "acc", "val/accuracy", "Accuracy", "val_top5", "top_1", "error_rate"])
def test_of_accuracies(name: str) -> None:
    assert standard_error(name, 0.5, 100) == 0.05


@pytest.mark.parametrize("name", ["val_loss", "iou", "f1", "accumulated", "vacc", "auroc", "val_acceptance"])
def test_of_other_metrics_it_cannot_be_known(name: str) -> None:
    assert standard_error(name, 0.5, 100) is None


@pytest.mark.parametrize("value", [1.5, -0.1, 85.0, float("nan"), 0.0, 1.0])
def test_of_what_is_no_share_it_cannot_be_known(value: float) -> None:
    assert standard_error("val_acc", value, 100) is None


def test_without_the_number_of_samples_it_cannot_be_known() -> None:
    assert standard_error("val_acc", 0.5, None) is None

"""Of several ranges of an activation, the one with which the layers that read it err least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from correction_nets import BACKENDS, batch, int8_db, made, observed
from torch import nn

from lightning_quant import ConfigError, TensorSpec, choose_ranges
from lightning_quant.backends.graph import info, observers, sees_weights
from lightning_quant.backends.weighted import weighted_layers
from lightning_quant.corrections.ranges import CANDIDATES


class OneMatters(nn.Module):
    """Takes ``(N, 8)``: of its inputs the layer reads one much, which alone has large values, and the others little."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        with torch.no_grad():
            self.layer.weight[:, 1:] *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def outliers(seed: int) -> torch.Tensor:
    """``(4096, 8)``: one value of the first channel in two hundred is forty times as large."""
    x = batch(4096, 8, seed=seed)
    x[::200, 0] *= 40
    return x


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_range_that_the_layer_needs_is_kept(backend: str) -> None:
    net, x = made(OneMatters), outliers(1)
    prepared = observed(net, backend, x, activation=TensorSpec(observer="percentile", percentile=99.0))
    chosen = choose_ranges(prepared, [x[:2048], x[2048:]])
    assert int8_db(net, chosen, outliers(2)) > int8_db(net, prepared, outliers(2)) + 10
    assert [(one.name, one.changes) for one in info(chosen).corrected] == [("choose_ranges", 1)]  # no output is rounded


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_best_of_all_by_hand(backend: str) -> None:
    net, x = made(OneMatters), outliers(1)
    prepared: Any = observed(net, backend, x)
    errors = {}
    # of eager mode, in what quantizes the input; elsewhere it is the first
    names = [name for name in observers(prepared) if not sees_weights(prepared, name)]
    first = next(name for name in names if backend != "eager" or "quantize" in name)
    for search, percentile in CANDIDATES:
        observer: Any = prepared.get_submodule(first)
        observer.search, observer.percentile = search, percentile
        scale, zero_point = (float(v) for v in observer.calculate_qparams())
        rounded = ((x / scale + zero_point).round().clamp(0, 255) - zero_point) * scale
        errors[search, percentile] = float((net(rounded) - net(x)).detach().square().sum())
    observer.search, observer.percentile = "histogram", 99.99
    chosen: Any = choose_ranges(prepared, [x])
    found = chosen.get_submodule(first)
    best = min(errors.values())
    assert errors[found.search, found.percentile] == pytest.approx(best, rel=1e-3)
    assert max(errors.values()) > 1.5 * best  # it matters which
    assert len(weighted_layers(chosen)) == 1


def test_there_has_to_be_a_histogram() -> None:
    x = batch(16, 8)
    prepared = observed(made(OneMatters), "fx", x, activation=TensorSpec(observer="min_max"))
    with pytest.raises(ConfigError, match="choose_ranges chooses among the ranges of histograms"):
        choose_ranges(prepared, [x])

"""What each layer costs, against passes that are run one by one, and the remedy against causes that were put in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Mlp, Residual, calibrated, decibels, settle
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from lightning_quant import (
    CalibrationError,
    CaptureError,
    ConfigError,
    QuantConfig,
    TensorSpec,
    convert,
    coverage,
    plot_sensitivity,
    prepare,
    sensitivity,
)
from lightning_quant.analysis.sensitivity import PASSES, Sensitivity
from lightning_quant.analysis.simulation import simulate, simulation, switch
from lightning_quant.analysis.sqnr import Power, sqnr_db
from lightning_quant.backends import reference
from lightning_quant.config import BackendName

BACKENDS: tuple[BackendName, ...] = ("fx", "eager", "pt2e")
#: Where each of many graphs is exported.
WITH_SLOW = ["fx", "eager", pytest.param("pt2e", marks=pytest.mark.slow)]
ALL = 1e9  # passes: no data is left out


class InPlace(nn.Module):
    """Changes what it has computed, and reads it again: ``(N, 4)`` to ``(N, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.second(F.relu(y, inplace=True))
        y.sub_(0.3)
        return self.third(y * z.sigmoid_())


class Together(nn.Module):
    """Its rows are not independent of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y - y.mean(0, keepdim=True))


def _one_by_one(prepared: nn.Module, x: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Layer -> SQNR with it alone and with all but it: a whole pass for each."""
    simulated = simulate(prepared)
    names = [layer.name for layer in simulation(simulated).layers]

    def output(on: list[str]) -> torch.Tensor:
        switch(simulated, on)
        with torch.no_grad():
            return simulated(x.clone())

    expected = output([])
    return {
        name: (decibels(expected, output([name])), decibels(expected, output([n for n in names if n != name])))
        for name in names
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [lambda: settle(Residual()), lambda: InPlace().eval()], ids=["residual", "in place"])
def test_branches_give_what_whole_passes_give(make: Callable[[], nn.Module], backend: BackendName) -> None:
    model = make()
    x = torch.randn(6, 3, 8, 8) if isinstance(model, Residual) else torch.randn(16, 4)
    prepared = calibrated(model, x.clone(), config=QuantConfig(backend=backend))
    found = sensitivity(prepared, [x.clone()], passes=ALL)
    expected = _one_by_one(prepared, x)
    assert [layer.name for layer in found.layers] == list(expected)
    for layer in found.layers:
        # the same operators on the same values; only sums of decibels are taken otherwise
        assert layer.sqnr_only_db == pytest.approx(expected[layer.name][0], abs=1e-3)
        assert layer.sqnr_all_but_db == pytest.approx(expected[layer.name][1], abs=1e-3)
    assert found.rows == len(x)


@pytest.mark.parametrize("backend", WITH_SLOW)
def test_a_layer_alone_costs_what_it_costs_when_all_others_are_skipped(backend: BackendName) -> None:
    """By a real conversion for each: brute force."""
    model, x = settle(Residual()), torch.randn(32, 3, 8, 8)
    found = sensitivity(calibrated(model, x, config=QuantConfig(backend=backend)), [x], passes=ALL)
    names = {layer.skip for layer in found.layers}
    with torch.no_grad():
        expected = model(x)
        # fx and eager give the pool the range of what it reads: the head alone reads a pool in float instead
        for layer in [layer for layer in found.layers if layer.name != "fc" or backend == "pt2e"]:
            config = QuantConfig(backend=backend, skip=tuple(sorted(names - {layer.skip})))
            alone = decibels(expected, reference(calibrated(model, x, config=config))(x))
            # histograms draw where they count, so that ranges differ by a step: another draw of 160 roundings,
            # whose squares sum up to 1 dB more or less; three times that
            assert layer.sqnr_only_db == pytest.approx(alone, abs=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_multiply_accumulates_are_those_of_coverage(backend: BackendName) -> None:
    model, x = settle(Residual()), torch.randn(4, 3, 8, 8)
    prepared = calibrated(model, x, config=QuantConfig(backend=backend))
    rows = {row.name: row.macs for row in coverage(model, x).rows}
    assert {layer.name: layer.macs for layer in sensitivity(prepared, [x], passes=ALL).layers} == rows


def test_recurrent_and_dynamic_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.recurrent(x)[0])

    model, x = Net().eval(), torch.randn(3, 7, 5)
    found = sensitivity(calibrated(model, x, method="dynamic"), [x])
    assert {row.name: row.macs for row in coverage(model, x).rows} == {layer.name: layer.macs for layer in found.layers}
    assert [layer.kind for layer in found.layers] == ["LSTM", "Linear"]
    assert all(math.isfinite(layer.sqnr_only_db) for layer in found.layers)
    assert found.layers[0].sqnr_all_but_db == pytest.approx(found.layers[1].sqnr_only_db, abs=1e-6)


class InParts(nn.Module):
    """Looks at values between its parts, so that each of them is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Mlp(), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(self.up(x), (0, 1))
        return self.down(y if float(y.sum()) < 1e9 else x)


def test_several_graphs_have_the_layers_of_all() -> None:
    model, x = InParts().eval(), torch.randn(8, 4)
    prepared = prepare(model, method="static", example_inputs=x)
    with pytest.raises(CalibrationError):
        sensitivity(prepared, [x])
    with torch.no_grad():
        prepared(x)
    found = sensitivity(prepared, [x, {"x": -x}])
    assert [layer.name for layer in found.layers] == ["up.first", "up.second", "down.first", "down.second"]
    assert [layer.skip for layer in found.layers] == [layer.name for layer in found.layers]
    # each at the output of its own graph
    alone = sensitivity(calibrated(model.up, x), [x, -x])
    assert [layer.sqnr_only_db for layer in found.layers[:2]] == pytest.approx(
        [layer.sqnr_only_db for layer in alone.layers], abs=1
    )


# ---- how much of the data is used


def _deep(layers: int = 12) -> nn.Module:
    parts = [part for _ in range(layers) for part in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(16, 3)).eval()


def test_few_rows_are_used_of_much_data() -> None:
    model, data = _deep(), [torch.randn(64, 16) for _ in range(4)]
    prepared = calibrated(model, data[0])
    few, all_of_it = sensitivity(prepared, data, passes=4), sensitivity(prepared, data, passes=ALL)
    assert all_of_it.rows == 256
    assert 8 <= few.rows < 64
    assert sensitivity(prepared, data, passes=1e-9).rows == 8
    order = [layer.name for layer in all_of_it.worst_first]
    assert few.worst_first[0].name in order[:4]


def test_rows_that_depend_on_each_other_are_not_separated() -> None:
    model, x = Together().eval(), torch.randn(32, 4)
    assert sensitivity(calibrated(model, x), [x], passes=1e-9).rows == 32


def test_a_part_of_the_batches_is_used_where_that_is_enough() -> None:
    model, data = Mlp().eval(), [torch.randn(4, 4) for _ in range(40)]
    prepared = calibrated(model, data[0])
    assert sensitivity(prepared, data, passes=PASSES).rows % 4 == 0
    assert sensitivity(prepared, data, passes=1).rows < 160


# ---- causes that are put in


def _worst(model: nn.Module, x: torch.Tensor, **config: Any) -> tuple[Sensitivity, Any]:
    found = sensitivity(calibrated(model.eval(), x, config=QuantConfig(**config)), [x], passes=ALL)
    return found, found.worst_first[0]


def _with_outlier(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """The third channel between the first two layers is 2000 times as large, and the second layer divides by it."""
    if kind == "linear":
        model: Any = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        x = torch.randn(64, 8)
    else:
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)]
        model, x = nn.Sequential(*layers), torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        model[0].bias += 0.2
        for tensor in (model[0].weight, model[0].bias):
            tensor[3] *= 2000
        model[2].weight[:, 3] /= 2000
    return model, x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "text"), [("linear", "SmoothQuant"), ("conv", "equalize with the layer before")])
def test_an_outlier_channel_is_found_and_named(kind: str, text: str, backend: BackendName) -> None:
    found, worst = _worst(*_with_outlier(kind), backend=backend, activation=TensorSpec(observer="min_max"))
    # both sides of the tensor with the channel; of pt2e what reads it
    around = {layer.name for layer in found.worst_first[:2]}
    assert "2" in (around if backend != "pt2e" else {worst.name})
    layer = next(layer for layer in found.layers if layer.name == "2")
    assert layer.outlier_channels == (3,)
    assert text in layer.remedy
    assert layer.sqnr_only_db < 20
    assert layer.sqnr_input_db < layer.sqnr_weight_db
    assert layer.input_range is not None
    assert layer.kept_range is not None
    assert layer.kept_range[1] == pytest.approx(layer.input_range[1], rel=0.01)
    harmless = next(layer for layer in found.layers if layer.name == "4")
    assert harmless.outlier_channels == ()
    assert harmless.remedy == ""


def test_weights_of_very_different_channels_ask_for_a_scale_each() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = 100
    spec = TensorSpec(qscheme="per_tensor_symmetric")
    x = torch.randn(64, 8)
    x[:, 0] = 0  # the large weight has no large result
    _, worst = _worst(model, x, backend="pt2e", weight=spec)
    assert worst.name == "0"
    assert "per_channel_symmetric" in worst.remedy
    _, better = _worst(model, x, backend="pt2e")
    assert better.sqnr_only_db > worst.sqnr_only_db + 10


def test_rare_values_ask_for_a_percentile() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(512, 8)
    x[0, 0] = 400
    _, worst = _worst(model, x[:, torch.arange(8)], backend="pt2e", activation=TensorSpec(observer="min_max"))
    assert worst.name == "0"
    assert worst.input_range is not None
    assert worst.input_range[1] == 400
    assert "percentile" in worst.remedy or worst.outlier_channels == (0,)


def test_a_range_that_clips_asks_for_a_wider_one() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 8)
    prepared = calibrated(model, 0.1 * x, config=QuantConfig(backend="pt2e"))
    worst = sensitivity(prepared, [x], passes=ALL).worst_first[0]
    assert "wider range" in worst.remedy


# ---- what is shown, and errors


def test_table_and_plot_name_the_worst_first() -> None:
    model, x = _with_outlier("linear")
    found, _ = _worst(model, x, activation=TensorSpec(observer="min_max"))
    console = Console(width=200, record=True)
    found.print(console)
    shown = console.export_text()
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == [layer.name for layer in found.worst_first]
    assert "SmoothQuant" in shown
    assert len(found.table(limit=1).rows) == 1
    figure = plot_sensitivity(found)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [layer.name for layer in found.worst_first]
    bars = [bar.get_width() for bar in axes.patches]
    assert bars == sorted(bars) == [layer.sqnr_only_db for layer in found.worst_first]


def test_errors_say_what_to_do() -> None:
    model, x = Mlp().eval(), torch.randn(8, 4)
    prepared = calibrated(model, x)
    with pytest.raises(ConfigError, match=r"there is no batch\. Give some of the data that it was calibrated on"):
        sensitivity(prepared, [])
    with pytest.raises(ConfigError, match=r"sensitivity\(passes=0\): give a number above 0"):
        sensitivity(prepared, [x], passes=0)
    with pytest.raises(CaptureError, match="prepare it first"):
        sensitivity(model, [x])
    with pytest.raises(CalibrationError, match="observers saw no data"):
        sensitivity(prepare(model, method="static", example_inputs=x), [x])


def test_powers_add_up_to_the_sqnr_of_all() -> None:
    pairs = [(torch.randn(5, 3), torch.randn(5, 3)) for _ in range(3)]
    power = Power()
    for reference_, other in pairs:
        power.add(reference_, other)
    assert power.sqnr_db == pytest.approx(sqnr_db([a for a, _ in pairs], [b for _, b in pairs]), abs=1e-4)
    assert Power().sqnr_db == math.inf
    power.add(torch.tensor([1.0, -math.inf]), torch.tensor([1.0, -math.inf]))  # a mask
    assert math.isfinite(power.sqnr_db)
    power.add(torch.tensor([1.0]), torch.tensor([math.nan]))
    assert power.sqnr_db == -math.inf
    huge = Power()
    huge.add(torch.tensor([3e30]), torch.tensor([2e30]))  # the square is no float32
    assert huge.sqnr_db == pytest.approx(20 * math.log10(3), abs=1e-4)


def test_all_int8_is_near_what_is_converted() -> None:
    model, x = settle(Residual()), torch.randn(16, 3, 8, 8)
    prepared = calibrated(model, x)
    with torch.no_grad():
        real = decibels(model(x), convert(prepared)(x))
    # int8 sums round once where q/dq pairs do twice
    assert sensitivity(prepared, [x], passes=ALL).sqnr_db == pytest.approx(real, abs=2)

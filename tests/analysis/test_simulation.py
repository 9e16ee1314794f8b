"""A simulated graph against what the backends convert, with every set of layers that is left in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Mlp, Residual, calibrated, decibels, settle
from torch import nn
from torch.nn import functional as F

from lightning_quant import ExportError, QuantConfig, convert, prepare
from lightning_quant.analysis.simulation import simulate, simulation, switch, switched_on
from lightning_quant.analysis.switches import rounded
from lightning_quant.backends import reference
from lightning_quant.config import BackendName, Method

BACKENDS: tuple[BackendName, ...] = ("fx", "eager", "pt2e")


class Mixed(nn.Module):
    """An embedding, a recurrent layer, attention, a product with a stored matrix: ``(N, 6)`` integers to ``(N, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(8, 16))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.recurrent(self.table(x))
        y = self.attention(y, y, y)[0]
        return self.head(F.relu(F.linear(y, self.matrix)).mean(1))


NETS: dict[str, Any] = {
    "mlp": lambda: (Mlp().eval(), torch.randn(16, 4)),
    "residual": lambda: (settle(Residual()), torch.randn(8, 3, 8, 8)),
    "mixed": lambda: (Mixed().eval(), torch.randint(0, 20, (4, 6))),
}


CELLS = [(net, backend, method) for net in NETS for backend in BACKENDS for method in ("static", "dynamic", "qat")]
SLOW = [cell for cell in CELLS if cell[0] != "mlp" and (cell[2] == "qat" or cell[1] == "pt2e")]


@pytest.mark.parametrize(
    ("net", "backend", "method"),
    [pytest.param(*cell, marks=[pytest.mark.slow] if cell in SLOW else []) for cell in CELLS],
)
def test_all_on_is_what_is_converted_and_all_off_is_float(net: str, backend: BackendName, method: Method) -> None:
    model, x = NETS[net]()
    prepared = calibrated(model, x, config=QuantConfig(backend=backend), method=method)
    simulated = simulate(prepared)
    with torch.no_grad():
        if method == "qat" and net == "residual":  # the pass in training has moved the batch norms of the copy
            off = simulated(x)
        else:
            off = model.eval()(x)
            # batch norms are folded in: float sums in another order
            assert decibels(off, simulated(x)) > 100
        switch(simulated, [layer.name for layer in simulation(simulated).layers])
        # explicit operators; of dynamic and recurrent layers there are only int8 ones
        whole = convert(prepared) if method == "dynamic" or net == "mixed" else reference(prepared)
        # a value that is between two integers may be rounded to the other one
        assert decibels(whole(x), simulated(x)) > 50 > decibels(off, simulated(x)) - 15


def _quantizers(graph_module: Any) -> int:
    return sum(
        "quantize_per_tensor" in str(n.target) and "dequantize" not in str(n.target) for n in graph_module.graph.nodes
    )


@pytest.mark.parametrize("backend", ["fx", "eager", pytest.param("pt2e", marks=pytest.mark.slow)])
def test_activations_are_rounded_where_conversion_rounds_them(backend: BackendName) -> None:
    """With any one layer in float, and with all but one: the sums of a residual network follow their neighbours."""
    model, x = NETS["residual"]()
    x = x[:2]
    simulated = simulate(calibrated(model, x, config=QuantConfig(backend=backend)))
    names = {layer.skip for layer in simulation(simulated).layers}
    assert len(names) == 6
    for skip in [*({name} for name in names), *(names - {name} for name in names)]:
        config = QuantConfig(backend=backend, skip=tuple(sorted(skip)))
        expected = reference(calibrated(model, x, config=config))
        on = [name for name in switched_on(simulated, names - skip) if name in simulation(simulated).plan.roundings]
        assert len(on) == _quantizers(expected), skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subset_is_what_conversion_gives_with_the_others_skipped(backend: BackendName) -> None:
    model, x = NETS["mlp"]()
    simulated = simulate(calibrated(model, x, config=QuantConfig(backend=backend)))
    for name in ("first", "second"):
        other = "second" if name == "first" else "first"
        expected = reference(calibrated(model, x, config=QuantConfig(backend=backend, skip=(other,))))
        switch(simulated, [name])
        with torch.no_grad():
            assert decibels(expected(x), simulated(x)) > 80


def test_the_prepared_model_is_not_changed() -> None:
    model, x = NETS["residual"]()
    prepared = calibrated(model, x)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    simulated = simulate(prepared)
    switch(simulated, [layer.name for layer in simulation(simulated).layers])
    with torch.no_grad():
        simulated(10 * x)
    assert before.keys() == prepared.state_dict().keys()
    assert all(torch.equal(value, prepared.state_dict()[name]) for name, value in before.items())


def test_torchscript_graphs_cannot_be_simulated() -> None:
    model, x = NETS["mlp"]()
    prepared = prepare(model, QuantConfig(backend="torchscript"), method="static", example_inputs=x)
    prepared(x)
    with pytest.raises(
        ExportError, match=r"no float form in which single layers could be quantized\. Use backend='fx'"
    ):
        simulate(prepared)


def test_rounding_is_that_of_torch() -> None:
    x = torch.randn(1000) * 3
    expected = torch.fake_quantize_per_tensor_affine(x, 0.013, 77, 0, 255)
    found = rounded(x, 0.013, 77, 0, 255)
    # in another order, so that the last bit differs; a tie may go the other way
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.002
    assert torch.equal(x, x.clone())


def test_names_are_those_that_can_be_skipped() -> None:
    model, x = NETS["mixed"]()
    for backend in BACKENDS:
        layers = simulation(simulate(calibrated(model, x, config=QuantConfig(backend=backend)))).layers
        skips = {layer.skip for layer in layers}
        assert {"attention", "attention.out_proj", "head"} <= skips
        assert {layer.kind for layer in layers} >= (
            {"linear"} if backend == "pt2e" else {"Embedding", "LSTM", "Linear"}
        )

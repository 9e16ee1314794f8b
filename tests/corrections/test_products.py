"""Layers as products of matrices at some positions: against the layers themselves, in every graph that calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import calibrated
from torch import fx, nn

from lightning_quant import QuantConfig
from lightning_quant.analysis.branching import Runner
from lightning_quant.analysis.simulation import simulate_graph, simulation, switch
from lightning_quant.corrections import layer_by_layer as walking
from lightning_quant.corrections.layer_by_layer import Pair, layer_by_layer
from lightning_quant.corrections.products import product_of

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (7, 6)),
    "linear without bias, of sequences": (lambda: nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 8)),
    "not square": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), bias=False), (3, 4, 7, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 7, 8)),
    "depthwise, dilated": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=(2, 1)), (3, 4, 7, 8)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (3, 4, 7, 8)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 7, 8)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (3, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 0)), (2, 2, 3, 4, 5)),
}
AFTER: dict[str, nn.Module] = {
    "nothing": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(), "hardswish": nn.Hardswish(), "gelu": nn.GELU(),
}  # fmt: skip


#: Torch says that it copies the input then.
EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def compared(net: nn.Module, x: torch.Tensor, backend: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer and its activation give by the product at all positions, and by the net."""
    graph = simulate_graph(calibrated(net, x, config=QuantConfig(backend=backend)))
    runner = Runner(graph)
    found: list[torch.Tensor] = []

    def visit(node: fx.Node, pairs: list[Pair]) -> None:
        product = product_of(runner, node)
        assert product is not None
        source, stored = runner.data_of(node), runner.weight_of(node)
        assert source is not None
        assert stored is not None
        given = pairs[0].floating[source]
        weight = stored.weight(False)
        positions = torch.arange(product.positions(given))
        found.append(product.gives(product.read(given, positions), weight))

    with torch.no_grad():
        layer_by_layer(runner, [(x,)], [(x,)], visit)
        y = net(x)
    (gives,) = found  # (groups, positions, outputs)
    channels_last = y.reshape(-1, y.shape[-1]) if isinstance(net[0], nn.Linear) else y.movedim(1, -1).flatten(0, -2)  # type: ignore[index]
    return gives.transpose(0, 1).flatten(1), channels_last


@EVEN
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_modules(name: str, backend: Any) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    found, expected = compared(nn.Sequential(make(), nn.ReLU()).eval(), torch.randn(shape), backend)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@EVEN
@pytest.mark.parametrize("name", ["linear", "not square", "depthwise, dilated", "same"])
def test_operators(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    found, expected = compared(nn.Sequential(make(), nn.ReLU()).eval(), torch.randn(shape), "pt2e")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_activations(after: str, backend: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), AFTER[after]).eval()
    found, expected = compared(net, 4 * torch.randn(3, 4, 7, 8), backend)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_activation_that_is_not_alone_is_none_of_the_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y + nn.functional.hardswish(y)

    x = torch.randn(2, 4, 5, 5)
    runner = Runner(simulate_graph(calibrated(Both().eval(), x)))
    (node,) = [node for node in runner.nodes if node.name in runner.layers]
    product = product_of(runner, node)
    assert product is not None
    assert product.activation is None


def test_a_transposed_convolution_is_no_product() -> None:
    x = torch.randn(2, 4, 5, 5)
    runner = Runner(simulate_graph(calibrated(nn.ConvTranspose2d(4, 6, 2).eval(), x)))
    (node,) = [node for node in runner.nodes if node.name in runner.layers]
    assert product_of(runner, node) is None


# ---- the two passes


def two_layers() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(12, 6)


def test_layers_are_given_what_both_models_give_them() -> None:
    net, x = two_layers()
    graph = simulate_graph(calibrated(net, x))
    runner = Runner(graph)
    seen: list[list[Pair]] = []

    def visit(node: fx.Node, pairs: list[Pair]) -> None:
        source: Any = runner.data_of(node)
        seen.append([Pair({source: p.floating[source]}, {source: p.quantized[source]}) for p in pairs])
        stored: Any = runner.weight_of(node)
        stored.rounded.zero_()  # what comes behind is told

    calls = [(part,) for part in x.split(4)]
    with torch.no_grad():
        layer_by_layer(runner, calls, calls, visit)
        hidden = torch.relu(net[0](x))  # type: ignore[index, operator]
    assert [len(pairs) for pairs in seen] == [3, 3]
    floats = torch.cat([value for pair in seen[1] for value in pair.floating.values()])
    torch.testing.assert_close(floats, hidden)
    # with a weight of zeros, the bias alone
    quantized = torch.cat([value for pair in seen[1] for value in pair.quantized.values()])
    bias = torch.relu(net[0].bias).expand_as(hidden)  # type: ignore[index, union-attr, arg-type]
    assert (quantized - bias).abs().max() < hidden.max() / 100
    assert not any(part.enabled for part in graph.modules() if hasattr(part, "enabled"))
    assert len(simulation(graph).layers) == 2


def test_of_more_than_can_be_held_some_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = two_layers()
    runner = Runner(simulate_graph(calibrated(net, x)))
    switch(runner.module, ())
    counts: list[int] = []
    # between the layers a row has 8 floats, twice: a batch of two rows takes 128 bytes
    for held, expected in ((128 * 6, 6), (128 * 3, 3), (1, 1)):
        monkeypatch.setattr(walking, "_HELD_BYTES", held)
        calls = [(part,) for part in x.split(2)]
        counts.clear()
        with torch.no_grad():
            layer_by_layer(runner, calls, calls, lambda _, pairs: counts.append(len(pairs)))
        assert counts == [expected, expected]

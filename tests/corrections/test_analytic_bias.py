"""Bias correction without data: means of activations follow from the batch norms that were folded into layers."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from correction_nets import BACKENDS, Separable, batch, int8_db, made, observed
from torch import nn
from torch.nn import functional as F

from lightning_quant import (
    ConfigError,
    TensorSpec,
    analytic_bias_correction,
    bias_correction,
    convert,
    correct,
    cross_layer_equalization,
    prepare,
    smoothquant,
)
from lightning_quant.backends.flow import Flow
from lightning_quant.backends.graph import info
from lightning_quant.backends.normals import scale_normal
from lightning_quant.backends.weighted import weighted_layers
from lightning_quant.corrections.moments import clipped_normal, moments
from lightning_quant.corrections.sending import changes_of, make

FEW = TensorSpec(bits=3)


# ---- the closed form


@pytest.mark.parametrize("clip", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, math.inf), (2.0, 2.5)])
def test_the_closed_form_is_the_integral(clip: tuple[float, float]) -> None:
    """Against sums over a fine grid, whose error is below 1e-8 of the square of what is summed."""
    z = np.linspace(-12, 12, 2_400_001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    density *= z[1] - z[0]
    for mean in (-5.0, -0.3, 0.0, 1.0, 7.0):
        for deviation in (0.01, 0.5, 3.0):
            values = np.clip(mean + deviation * z, *clip)
            expected = float((values * density).sum())
            spread = float(((values - expected) ** 2 * density).sum())
            found = clipped_normal(torch.tensor(mean).double(), torch.tensor(deviation**2).double(), *clip)
            assert float(found[0]) == pytest.approx(expected, abs=1e-7)
            assert float(found[1]) == pytest.approx(spread, abs=1e-7)


def test_without_spread_and_far_off_the_closed_form_is_the_clamp() -> None:
    mean = torch.tensor([-3.0, 2.0, 1e6, -1e6, 9.0], dtype=torch.float64)
    variance = torch.tensor([0.0, 0.0, 1.0, 1.0, 1e-30], dtype=torch.float64)
    found, spread = clipped_normal(mean, variance, 0.0, 6.0)
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 6.0, 0.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(spread, torch.zeros(5, dtype=torch.float64))


# ---- what is known


def randomized(net: nn.Module, seed: int = 0) -> Any:
    """In evaluation, with batch norms that have learned something; one gamma of each is negative."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.weight[0] *= -1
                    module.bias.normal_()
    return net.eval()


class Clipped(nn.Module):
    """Takes ``(N, 8)``: normal inputs pass a diagonal layer and a batch norm, so that what is behind it is normal."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.activation = nn.Linear(8, 8), nn.BatchNorm1d(8), activation
        self.second = nn.Linear(8, 6, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.diag(torch.rand(8) + 0.5))
            self.second.weight.uniform_(-1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.norm(self.first(x))))


def clipped(activation: nn.Module) -> tuple[Any, torch.Tensor]:
    """The net, with statistics of its batch norm that are those of standard normal inputs, and such inputs."""
    torch.manual_seed(0)
    net = randomized(Clipped(activation))
    net.norm.running_mean.copy_(net.first.bias.detach())
    net.norm.running_var.copy_(net.first.weight.detach().diagonal() ** 2)
    return net, batch(200_000, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 1.5), nn.Identity()])
def test_the_shift_is_that_of_a_large_sample(backend: str, activation: nn.Module) -> None:
    """Of the sample: the error of the rounded weight times the mean of what the layer reads in float.

    Its standard error is that of a weighted sum of eight means, each of at most 1.5 / sqrt(200,000) = 0.0034 times an
    error of a weight of at most 2/7: below 0.003 together.
    """
    net, x = clipped(activation)
    prepared: Any = observed(net, backend, x[:64], weight=FEW)
    _, second = weighted_layers(prepared)
    assert second.quantization is not None
    error = second.quantization.rounded(second.weight) - second.weight
    with torch.no_grad():
        measured = error @ activation(net.norm(net.first(x))).mean(0)
    corrected: Any = analytic_bias_correction(prepared)
    first, second = weighted_layers(corrected)
    assert second.bias is not None
    assert float(measured.abs().max()) > 0.1  # there is something to find
    torch.testing.assert_close(second.bias, -measured, rtol=0, atol=0.012)
    assert torch.equal(first.bias, weighted_layers(prepared)[0].bias)  # type: ignore[arg-type]
    assert weighted_layers(prepared)[1].bias is None  # what was given is as it was


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_what_data_says(backend: str) -> None:
    """The measured correction of the second layer, with nothing else rounded: first layer's weights exact."""
    net, x = clipped(nn.ReLU())
    with torch.no_grad():
        net.first.weight.copy_(torch.eye(8))
    net.norm.running_var.fill_(1.0)
    with torch.no_grad():
        net.norm.weight.fill_(1.0)
    prepared = observed(net, backend, x[:20_000], weight=FEW)
    measured: Any = bias_correction(prepared, [x[:20_000]])
    known: Any = analytic_bias_correction(prepared)
    a, b = (weighted_layers(one)[1].bias for one in (measured, known))
    # 20,000 rows: three times the error of above; activations in 8 bits add up to half a step of 1/40 at the zero
    torch.testing.assert_close(a, b, rtol=0, atol=0.03)


class Paths(nn.Module):
    """Takes ``(N, 3, 12, 12)``. Every way on which means are known, transposed and grouped convolutions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8, affine=False)
        self.c, self.nc = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.t, self.nt = nn.ConvTranspose2d(8, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.d, self.nd = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.hidden, self.nh = nn.Linear(4, 16), nn.BatchNorm1d(16)
        self.relu, self.relu6, self.clamp, self.pool = nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(), nn.AvgPool2d(2)
        self.drop, self.head = nn.Dropout(), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.na(self.a(x)))
        x = self.relu(self.nb(self.b(x)) + x)
        x = F.relu6(self.nc(self.c(x)))
        x = self.pool(self.clamp(self.nt(self.t(x))))
        x = self.relu6(self.nd(self.d(x))).mean((2, 3))
        return self.head(self.drop(F.relu(self.nh(self.hidden(x)))))


def by_hand(net: Any) -> dict[str, torch.Tensor]:
    """Of :class:`Paths`: layer -> means of the channels that it reads, from the batch norms of the float net."""

    def normal(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        size = norm.num_features
        gamma, beta = (norm.weight, norm.bias) if norm.affine else (torch.ones(size), torch.zeros(size))
        exact = norm.running_var.double() / (norm.running_var.double() + norm.eps)
        return beta.detach().double(), gamma.detach().double() ** 2 * exact

    relu, relu6, hardtanh = (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)
    first = clipped_normal(*normal(net.na), *relu)
    second = normal(net.nb)
    summed = clipped_normal(first[0] + second[0], first[1] + second[1], *relu)
    found = {"b": first, "c": summed, "t": clipped_normal(*normal(net.nc), *relu6)}
    found |= {"d": clipped_normal(*normal(net.nt), *hardtanh), "hidden": clipped_normal(*normal(net.nd), *relu6)}
    found["head"] = clipped_normal(*normal(net.nh), *relu)
    return {name: mean for name, (mean, _) in found.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_means_of_all_paths(backend: str) -> None:
    """Every layer but the first is corrected, by the error of its weight times constant inputs of these means."""
    net = randomized(Paths())
    x = batch(8, 3, 12, 12)
    prepared: Any = observed(net, backend, x, weight=FEW)
    corrected: Any = analytic_bias_correction(prepared)
    assert [(one.name, one.changes, one.of) for one in info(corrected).corrected] == [
        ("analytic_bias_correction", 6, "of 7 layers")
    ]
    before = {layer.name: layer for layer in weighted_layers(prepared)}
    means = by_hand(net)
    assert before.keys() == {"a", *means}
    for layer in weighted_layers(corrected):
        if layer.name == "a":
            assert torch.equal(layer.bias, before["a"].bias)  # type: ignore[arg-type]
            continue
        # the float module of that name computes the shift, with the weight's error in the place of its weight
        module = copy.deepcopy(net.get_submodule(layer.name)).double()
        assert layer.quantization is not None
        with torch.no_grad():
            weight = before[layer.name].weight
            module.weight.copy_(layer.quantization.rounded(weight).double() - weight.double())
            module.bias.zero_()
            mean = means[layer.name]
            # large, so that the border, where a transposed kernel overlaps with nothing, is 1/200 of it
            given = mean if layer.is_linear else mean[:, None, None].expand(-1, 200, 200)
            shift = module(given[None])[0]
            shift = shift if layer.is_linear else shift.mean((1, 2))
        bias = before[layer.name].bias
        assert bias is not None
        assert layer.bias is not None
        atol = 0.02 * float(shift.abs().max()) if layer.transposed else 1e-5
        torch.testing.assert_close(layer.bias.double(), bias.double() - shift, rtol=0, atol=atol)
        assert float(shift.abs().max()) > 0.01


def test_backends_give_the_same_biases() -> None:
    net = randomized(Paths())
    biases = []
    for backend in BACKENDS:
        corrected: Any = analytic_bias_correction(observed(net, backend, batch(8, 3, 12, 12), weight=FEW))
        biases.append({layer.name: layer.bias for layer in weighted_layers(corrected)})
    for other in biases[1:]:
        assert other.keys() == biases[0].keys()
        for name, bias in other.items():
            torch.testing.assert_close(bias, biases[0][name], rtol=1e-4, atol=1e-5)


class Unknown(nn.Module):
    """Takes ``(N, 3, 8, 8)``. A mean is known of what ``known`` and ``flat`` read, and of nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(9))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(9))
        self.known, self.flat = nn.Conv2d(3, 3, 1), nn.Linear(3 * 16, 2)

    def block(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return self.norms[number](self.convs[number](x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.block(0, x)), 2)  # the image
        x = F.silu(self.block(1, x))  # what a max pooling gives
        y = self.block(2, x)  # a SiLU
        x = F.avg_pool2d(self.block(3, y * y), 1, divisor_override=2)  # a product
        x = F.relu(F.avg_pool2d(self.block(4, x), 1))  # divided by two
        x = self.convs[6](self.convs[5](x))  # clamped behind an average; no batch norm before it
        x = F.relu(self.block(7, F.relu(x)))
        x = F.relu(self.block(8, x + 1))  # a number is added
        return self.flat(torch.flatten(self.known(F.relu(x)) * 0 + x, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_whose_means_are_not_known_stay(backend: str) -> None:
    net = randomized(Unknown())
    prepared: Any = observed(net, backend, batch(8, 3, 8, 8), weight=FEW)
    corrected: Any = analytic_bias_correction(prepared)
    pairs = zip(weighted_layers(prepared), weighted_layers(corrected), strict=True)
    changed = {a.name for a, b in pairs if not torch.equal(a.bias, b.bias)}  # type: ignore[arg-type]
    assert changed == {"known"}


class Flat(nn.Module):
    """Takes ``(N, 3, 8, 8)``: a linear layer reads sixteen positions of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(F.avg_pool2d(F.relu(self.norm(self.conv(x))), 2), 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_that_are_flattened_share_a_mean(backend: str) -> None:
    net = randomized(Flat())
    prepared: Any = observed(net, backend, batch(8, 3, 8, 8), weight=FEW)
    _, head = weighted_layers(prepared)
    assert head.quantization is not None
    variance = net.norm.weight.detach().double() ** 2 * net.norm.running_var / (net.norm.running_var + net.norm.eps)
    mean, _ = clipped_normal(net.norm.bias.detach().double(), variance, 0.0, math.inf)
    error = head.quantization.rounded(head.weight).double() - head.weight.double()
    expected = net.head.bias.detach().double() - error.reshape(2, 4, 16).sum(2) @ mean
    corrected: Any = analytic_bias_correction(prepared)
    found = weighted_layers(corrected)[1].bias
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


class InPlace(nn.Module):
    """Takes ``(N, 3, 8, 8)``: ``second`` reads what a ReLU has clamped in place after the mean of it was known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return self.first(F.relu_(x)) + self.second(x)


def test_what_was_changed_in_place_is_not_known() -> None:
    prepared: Any = observed(randomized(InPlace()), "fx", batch(8, 3, 8, 8), weight=FEW)
    known = moments(prepared)
    assert "conv" not in known
    assert [one.changes for one in info(analytic_bias_correction(prepared)).corrected] == [1]


class Views(nn.Module):
    """Takes ``(N, 3, 8, 8)``: as :class:`InPlace`, through a view of the tensor. ``flat`` reads that view."""

    def __init__(self, view: Any) -> None:
        super().__init__()
        self.view = view
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.second, self.flat = nn.Conv2d(4, 2, 1), nn.Linear(256, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.conv(x))
        flat = F.relu_(self.view(x))
        return self.second(x), self.flat(flat)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("view", "known"), [(lambda x: torch.flatten(x, 1), {"flat"}), (lambda x: x.view(x.shape[0], 256), set())]
)
def test_what_was_changed_through_a_view_is_not_known(backend: str, view: Any, known: set[str]) -> None:
    prepared: Any = observed(randomized(Views(view)), backend, batch(8, 3, 8, 8), weight=FEW)
    flow = Flow(prepared)
    sources = {layer.name: flow.data_of(flow.nodes[layer.key]) for layer in flow.layers}
    found = moments(prepared)
    assert {name for name, source in sources.items() if source is not None and source.name in found} == known


class Shared(nn.Module):
    """Takes ``(N, 3, 8, 8)``: one convolution in front of two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 3, 1), nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        return self.head(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_called_for_two_batch_norms(backend: str) -> None:
    """In fx and eager each call is a layer of its own; in pt2e both have one name, and nothing is known of either."""
    net = randomized(Shared())
    prepared: Any = observed(net, backend, batch(8, 3, 8, 8), weight=FEW)
    normals = info(prepared).normals
    if backend == "pt2e":
        assert normals == {}
        with pytest.raises(ConfigError, match="no bias was corrected"):
            analytic_bias_correction(prepared)
        return
    torch.testing.assert_close([x.mean.float() for x in normals.values()], [x.bias.detach() for x in net.norms])
    assert [one.changes for one in info(analytic_bias_correction(prepared)).corrected] == [2]


# ---- with others


class Homogeneous(nn.Module):
    """Takes ``(N, 3, 8, 8)``. Three layers that can be equalized."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.nb(self.b(F.relu(self.na(self.a(x)))))))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [cross_layer_equalization, smoothquant])
def test_what_is_scaled_before_has_scaled_means(backend: str, before: Any) -> None:
    """The means of a scaled net are those of one that was so from the beginning: scales are read off its biases."""
    net = randomized(Homogeneous())
    x = batch(64, 3, 8, 8)
    prepared: Any = observed(net, backend, x, weight=FEW)
    scaled: Any = before(prepared, [x])
    sent: Any = copy.deepcopy(prepared)
    make(sent, changes_of(scaled))  # as another process gets it
    pairs = zip(weighted_layers(prepared)[:2], weighted_layers(scaled)[:2], weighted_layers(sent)[:2], strict=True)
    for old, new, other in pairs:
        assert old.bias is not None
        assert new.bias is not None
        factor = (new.bias / old.bias).double()
        assert float((factor.log()).abs().max()) > 0.1
        assert old.normal is not None
        assert new.normal is not None
        assert other.normal is not None
        torch.testing.assert_close(new.normal.mean, old.normal.mean * factor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new.normal.deviation, old.normal.deviation * factor, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.normal.mean, new.normal.mean)
    # the unscaled one, in the unscaled graph
    assert old.normal is not None
    torch.testing.assert_close(old.normal.mean.float(), net.nb.bias.detach())


def test_a_scale_of_nothing_known_is_nothing() -> None:
    prepared: Any = observed(made(Separable), "fx", batch(8, 3, 12, 12))
    before = info(prepared)
    scale_normal(prepared, "hidden", torch.ones(32))
    assert info(prepared) is before


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_bits_shift_means_that_come_back(backend: str) -> None:
    """Of a net whose statistics are those of the data, as training leaves them."""
    net = randomized(Homogeneous())
    x, t = batch(256, 3, 8, 8), batch(256, 3, 8, 8, seed=2)
    for norm in (net.na, net.nb):
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        net.train()(x)
    net.eval()
    weight = TensorSpec(bits=4, observer="min_max")  # a balanced one has next to no shift
    config = {"weight": weight, "corrections": ("analytic_bias_correction",)}
    prepared = observed(net, backend, x, **config)
    with pytest.raises(ConfigError, match="asks for corrections"):
        convert(prepared)
    corrected = correct(prepared, [])
    assert int8_db(net, corrected, t) > int8_db(net, observed(net, backend, x, weight=weight), t) + 1


# ---- what cannot be


class Plain(nn.Module):
    """Takes ``(N, 4)``, and has no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_corrected_is_an_error(backend: str) -> None:
    text = (
        "analytic_bias_correction: no batch norm was folded into a layer, so that no mean is known, and no bias was "
        "corrected. Use bias_correction, which measures the means on data."
    )
    x = batch(8, 4)
    with pytest.raises(ConfigError, match=re.escape(text)):
        analytic_bias_correction(observed(made(Plain), backend, x), [x])
    prepared = observed(made(Plain), backend, x, corrections=("analytic_bias_correction",))
    with pytest.raises(ConfigError, match=re.escape(text)):
        correct(prepared, [x])
    last = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    text = (
        "analytic_bias_correction: no layer with weights in int8 reads what one with a folded batch norm gives, "
        "through what keeps means known, and no bias was corrected. Use bias_correction, which measures the means on "
        "data."
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        analytic_bias_correction(observed(last, backend, batch(8, 3, 4, 4)))


class Halves(nn.Module):
    """Takes ``(N, 3, 8, 8)``: two graphs, with code between that cannot be traced. One has no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Homogeneous(), nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, 8), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x * 2 if float(x.detach().sum()) > 0 else x)


def test_of_several_graphs_one_may_have_no_batch_norm() -> None:
    x = batch(8, 3, 8, 8)
    corrected = analytic_bias_correction(observed(randomized(Halves()), "fx", x))
    names = [name for name, _ in corrected.named_children()]
    graphs: list[Any] = [module for module in corrected.modules() if "lightning_quant" in getattr(module, "meta", {})]
    assert names == ["first", "second"]
    assert [[one.changes for one in info(graph).corrected] for graph in graphs] == [[2], [0]]
    assert torch.isfinite(convert(corrected)(x)).all()


def test_other_methods_are_refused() -> None:
    dynamic = prepare(nn.Linear(4, 2), method="dynamic", example_inputs=torch.randn(2, 4))
    with pytest.raises(ConfigError, match="method='dynamic': weights are corrected after calibration"):
        analytic_bias_correction(dynamic)

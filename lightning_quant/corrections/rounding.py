"""AdaRound: weights of a calibrated model rounded so that each layer gives what it gives in float, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from lightning_quant.analysis.branching import Runner
from lightning_quant.analysis.sensitivity import recorded_calls
from lightning_quant.analysis.simulation import is_simulated, simulate, simulation, switch
from lightning_quant.backends import as_call
from lightning_quant.backends.graph import engine, info, is_graph
from lightning_quant.backends.weighted import WeightedLayer, weighted_layers
from lightning_quant.corrections.grids import grid_of, keep
from lightning_quant.corrections.layer_by_layer import Pair, layer_by_layer
from lightning_quant.corrections.learned_rounding import Layer, learned_rounding
from lightning_quant.corrections.products import POSITIONS, Product, drawn, product_of
from lightning_quant.corrections.recording import note, refuse_second
from lightning_quant.devices import device_of
from lightning_quant.errors import ConfigError
from lightning_quant.progress import SILENT, Advance, Progress

#: Steps of Adam for each layer. On a depthwise network with weights of 4 bits more made nothing better.
ITERATIONS = 1000


def adaround(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    iterations: int = ITERATIONS,
    positions: int = POSITIONS,
    seed: int = 0,
    progress: Progress = SILENT,
) -> nn.Module:
    """Round each weight of a calibrated model up or down so that its layer changes least, instead of to nearest.

    From the first layer to the last, each linear layer and convolution (dense, grouped or depthwise) is given a scale
    with the least squared error, weighed by how large its inputs are, and then roundings that bring what it gives,
    behind its activation function, from inputs of the model as it is quantized so far, nearest to what it gives in
    float (AdaRound: Nagel et al. 2020, https://arxiv.org/abs/2004.10568, equation 25). On this data no output of a
    layer is further from float than with the nearest integers. Weights of other layers stay as they are.

    With weights of 4 bits it wins back most of what is lost.

    Args:
        prepared: From :func:`lightning_quant.prepare` for ``static``, by ``fx``, ``eager`` or ``pt2e``; its observers
            have seen data. Not changed.
        batches: Inputs, each a tensor, a tuple of positional or a dict of keyword arguments. A thousand rows are
            enough. Of more than can be held in 1.5 GiB between two layers, some are taken.
        iterations: Steps for each layer.
        positions: At how many positions of its output a layer is looked at.
        seed: Draws these. The global generators of random numbers are left alone.
        progress: Where a line shows the layers.

    Returns:
        A copy in eval mode whose stored weights are multiples of their scales, and keep them:
        :func:`lightning_quant.convert` rounds each to that very integer.

    Raises:
        ConfigError: ``prepared`` was prepared for another method or by ``torchscript``; another correction made up for
            errors of rounding already; there is no batch; a number is too small.
        CaptureError: ``prepared`` does not come from :func:`lightning_quant.prepare`.
        CalibrationError: An observer saw no data.

    >>> from lightning_quant import TensorSpec, QuantConfig, convert, prepare
    >>> data = torch.randn(64, 4)
    >>> config = QuantConfig(weight=TensorSpec(bits=4))
    >>> prepared = prepare(nn.Linear(4, 2), config, method="static", example_inputs=data)
    >>> _ = prepared(data)
    >>> int8 = convert(adaround(prepared, [data], iterations=100))
    """
    for name, value in (("iterations", iterations), ("positions", positions)):
        if value < 1:
            raise ConfigError(f"adaround({name}={value!r}): give 1 or more.")
    device = device_of(prepared)
    changed = copy.deepcopy(prepared).cpu().eval()
    graphs = {name: part for name, part in changed.named_modules() if is_graph(part)}
    for graph in graphs.values():
        refuse_second(graph, "adaround", may_follow=("adaround",))
    handles = {name: weighted_layers(graph) for name, graph in graphs.items()}
    simulated = simulate(changed)  # refuses what no backend made
    data = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, list(batches))
    if not data:
        raise ConfigError("adaround(batches=...): there is no batch. Give some of the data that it was calibrated on.")
    total = sum(len(layers) for layers in handles.values())
    with torch.no_grad(), progress.step("rounding of weights", total) as advance:
        for name, part in ((n, p) for n, p in simulated.named_modules() if is_simulated(p)):
            floats, quantized = (_calls(simulated, name, data, on) for on in (False, True))
            if floats:
                rounding = _Rounding(Runner(part), handles[name], iterations, positions, seed, advance)
                with engine(info(part).config.engine):
                    layer_by_layer(rounding.runner, floats, quantized, rounding.visit)
                note(graphs[name], "adaround", rounding.rounded, "layers")
    return changed.to(device)


def _calls(simulated: nn.Module, name: str, data: list[Any], quantized: bool) -> list[tuple[Any, ...]]:
    """What one graph of a model is given, with all layers in float or quantized."""
    if is_simulated(simulated):  # it is given what the model is given: nothing has to run
        flatten = info(simulated).interface.flatten
        calls = (as_call(batch) for batch in data)
        return [flatten(call.args, call.keywords) if call.keywords else call.args for call in calls]
    for part in simulated.modules():
        if is_simulated(part):
            switch(part, [layer.name for layer in simulation(part).layers] if quantized else ())
    return recorded_calls(simulated, data)[name]


class _Rounding:
    """Of the layers of one graph."""

    def __init__(
        self,
        runner: Runner,
        layers: tuple[WeightedLayer, ...],
        iterations: int,
        positions: int,
        seed: int,
        advance: Advance,
    ) -> None:
        self.runner, self.iterations, self.positions, self.advance = runner, iterations, positions, advance
        # by node: in pt2e functions on several weights of one module share its name
        self.layers = {node: layer for layer in layers for node in layer.nodes}
        self.done: set[str] = set()
        self.rounded = 0
        self.generator = torch.Generator().manual_seed(seed)

    def visit(self, node: fx.Node, pairs: list[Pair]) -> None:
        """Give the layer of a node new roundings. What is called twice has those of its first call."""
        layer = self.layers.get(node.name)
        if layer is None or node.name in self.done:
            return
        self.done.update(layer.nodes)
        quantization, product = layer.quantization, product_of(self.runner, node)
        if quantization is None or product is None or quantization.axis not in (None, 0):
            return
        self.advance(layer.name)
        weight = layer.weight
        sample = self._sample(node, product, weight, pairs)
        grid = grid_of(quantization, sample.weight, sample.given.square().mean(1, keepdim=True))
        integers = learned_rounding(sample, grid, iterations=self.iterations, generator=self.generator)
        stored: Any = self.runner.weight_of(node)
        stored.rounded.copy_(keep(layer, grid, integers))
        self.rounded += 1

    def _sample(self, node: fx.Node, product: Product, weight: torch.Tensor, pairs: list[Pair]) -> Layer:
        """The layer at positions that are drawn from all batches."""
        source: Any = self.runner.data_of(node)
        batches = [(pair.floating[source], pair.quantized[source]) for pair in pairs]
        given, wanted = [], []
        for floating, quantized in drawn(product, weight, batches, self.positions, self.generator):
            given.append(quantized)
            wanted.append(product.gives(floating, weight))
        order = torch.randperm(sum(part.shape[1] for part in given), generator=self.generator)
        return Layer(
            weight=product.rows(weight),
            given=torch.cat(given, 1)[:, order],
            wanted=torch.cat(wanted, 1)[:, order],
            bias=product.bias_row(weight),
            activation=product.activation,
        )

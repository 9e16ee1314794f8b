"""SmoothQuant: channels of activations are scaled to one range, and the weights that read them scaled back.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
https://arxiv.org/abs/2211.10438, equation 4: channel ``j`` of the input ``X`` of a linear layer is divided by ``s_j =
max|X_j| ** alpha / max|W_j| ** (1 - alpha)``, and column ``j`` of its weight multiplied by it. The division is folded
into what gives ``X``: the affine of a normalization, or the channels of a layer.

Between convolutions, the same has been done for longer (Meller et al. 2019, "Same, Same But Different",
https://arxiv.org/abs/1902.01917). The layer that gives ``X`` has one scale for each of its rows, so that dividing these
costs nothing, and a depthwise convolution has one for each channel that it reads: all of the range moves there
(``alpha = 1``). A ReLU6 in between lets no scale through. To let channels grow below it, as far as calibration data
leaves room, changes what the float model gives for other data: on EfficientNet-Lite0 it cost 3 to 9 dB.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_quant.analysis.simulation import simulate_graph, simulation, switch
from lightning_quant.analysis.sqnr import Power
from lightning_quant.backends.flow import Flow
from lightning_quant.backends.graph import engine, info
from lightning_quant.backends.norms import Norm, norms
from lightning_quant.backends.weighted import WeightedLayer
from lightning_quant.corrections.equalization import ranges_of_inputs
from lightning_quant.corrections.recording import Calls, changed, note, observe_again
from lightning_quant.errors import ConfigError

#: The migration strengths that ``alpha=None`` chooses from; the paper's are 0.5, and 0.75 where outliers are extreme.
ALPHAS = (0.25, 0.5, 0.75)
#: No channel is divided by less: a channel without values would be multiplied by infinity.
_LEAST = 1e-5
#: Between convolutions, a channel is not taken for smaller than this share of the largest one: what is silent in a few
#: batches may not be so in others, whose values would be cut off.
_SILENT = 1 / 32


@dataclass(frozen=True)
class _Place:
    """Where a scale of channels is folded into, and the layers that read these channels."""

    source: Norm | WeightedLayer
    readers: tuple[WeightedLayer, ...]
    convolves: bool = False


def smoothquant(prepared: nn.Module, batches: Iterable[Any], *, alpha: float | None = 0.5) -> nn.Module:
    """A copy with outlier channels moved from the inputs of linear layers into their weights; float stays the same.

    Linear layers behind a LayerNorm or RMSNorm with an affine, which they alone read (all of them share the scales),
    and behind another linear layer through nothing or a ReLU. Convolutions and linear layers behind a convolution that
    they alone read, through nothing, a ReLU or a pooling.

    Args:
        prepared: From :func:`lightning_quant.prepare` for ``static``, by ``fx``, ``eager`` or ``pt2e``. Not changed.
        batches: Inputs, each a tensor, a tuple of positional or a dict of keyword arguments. Activations are observed
            again on them, and on nothing else.
        alpha: How much of the range of activations moves into the weights, from 0 to 1. None: the one of
            :data:`ALPHAS`, or none at all, with the least error of the output; each costs two passes.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        ConfigError: ``alpha`` is not from 0 to 1; there is no batch; the method or the backend is another one; a
            user's own observer cannot begin again.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ConfigError(f"smoothquant(alpha={alpha!r}): give a number from 0 to 1, or None to choose by error.")
    return changed(prepared, batches, lambda graph, calls: smooth(graph, calls, alpha))


def smooth(graph_module: fx.GraphModule, calls: Calls, alpha: float | None = 0.5) -> None:
    """Change the weights of one graph."""
    count = len(_places(graph_module))
    if count and alpha is None:
        alpha = _best(graph_module, calls)
    done = count if alpha is not None else 0
    if done:
        _smooth(graph_module, calls, alpha or 0.0)
    note(graph_module, "smoothquant", done, "inputs of layers")


def _best(graph_module: fx.GraphModule, calls: Calls) -> float | None:
    """The strength with the least error of the output; None: that of none at all."""
    found: dict[float | None, float] = {None: output_error(graph_module, calls)}
    for alpha in ALPHAS:
        trial = copy.deepcopy(graph_module)
        _smooth(trial, calls, alpha)
        found[alpha] = output_error(trial, calls)
    return min(found, key=found.__getitem__)


def _smooth(graph_module: fx.GraphModule, calls: Calls, alpha: float) -> None:
    places = _places(graph_module)
    flow = Flow(graph_module)
    largest = _largest(graph_module, calls, {_read(flow, place): place.readers[0] for place in places})
    for place in places:
        scale = _scale(place, largest[_read(flow, place)], alpha)
        place.source.scale_outputs(1 / scale)
        for layer in place.readers:
            layer.scale_inputs(scale)
    observe_again(graph_module, calls)


def _scale(place: _Place, given: torch.Tensor, alpha: float) -> torch.Tensor:
    """``(channels,)``, float64: what the channels of a place are divided by."""
    if place.convolves:
        reader = place.readers[0]
        depthwise = reader.groups == reader.input_channels and reader.groups > 1 and not reader.transposed
        given = given.clamp(min=float(given.max()) * _SILENT)
        alpha = 1.0 if depthwise else alpha
    read = torch.stack([ranges_of_inputs(layer.grouped().cpu()) for layer in place.readers]).amax(0).double()
    live = (given > 0) & (read > 0)
    scale = given.clamp(min=_LEAST) ** alpha / read.clamp(min=_LEAST) ** (1 - alpha)
    return torch.where(live, scale.clamp(min=_LEAST), 1.0)


def _places(graph_module: fx.GraphModule) -> list[_Place]:
    flow = Flow(graph_module)
    found = []
    for norm in norms(graph_module):
        readers = flow.readers(flow.nodes[norm.node])
        if readers is not None and all(_is_linear(x, norm.channels) and len(x.nodes) == 1 for x in readers):
            found.append(_Place(norm, readers))
    for pair in flow.pairs():
        linear = pair.first.is_linear and pair.second.is_linear
        if pair.positions == 1 and pair.second.quantization is not None:
            found.append(_Place(pair.first, (pair.second,), convolves=not linear))
    return found


def _is_linear(layer: WeightedLayer, channels: int) -> bool:
    return layer.is_linear and layer.quantization is not None and channels == layer.input_channels


def _read(flow: Flow, place: _Place) -> str:
    """Name of the node that gives what the layers read: behind a ReLU, if there is one."""
    node = flow.data_of(flow.nodes[place.readers[0].key])
    assert node is not None
    return node.name


def _largest(graph_module: fx.GraphModule, calls: Calls, nodes: dict[str, WeightedLayer]) -> dict[str, torch.Tensor]:
    """Node -> ``(channels,)``, float64: the largest absolute value of each channel, as the layer reads it."""
    seen = _Largest(copy.deepcopy(graph_module).cpu(), nodes)
    with torch.no_grad():
        for call in calls:
            seen.run(*copy.deepcopy(call))
    return seen.largest


class _Largest(fx.Interpreter):
    """Runs a graph, and keeps the largest absolute value of each channel of what some layers read."""

    def __init__(self, graph_module: fx.GraphModule, nodes: dict[str, WeightedLayer]) -> None:
        super().__init__(graph_module)
        self.nodes = nodes
        self.largest: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As torch's."""
        value = super().run_node(n)
        layer = self.nodes.get(n.name)
        if layer is not None:
            channels = value.detach().abs().transpose(layer.channel_axis(value), -1)
            found = channels.reshape(-1, channels.shape[-1]).amax(0).double()
            self.largest[n.name] = torch.maximum(self.largest.get(n.name, found), found)
        return value


def output_error(graph_module: fx.GraphModule, calls: Calls) -> float:
    """Squared error of the output with everything rounded, over the squares of the float output."""
    simulated = simulate_graph(graph_module)
    power = Power()
    with torch.no_grad(), engine(info(graph_module).config.engine):
        for call in calls:
            switch(simulated, ())
            expected = simulated(*copy.deepcopy(call))
            switch(simulated, [layer.name for layer in simulation(simulated).layers])
            power.add(expected, simulated(*copy.deepcopy(call)))
    return power.noise / power.signal if power.signal else 0.0

"""Which layer of a prepared graph feeds which, so that channels can be scaled in one and scaled back in the other.

Observers, stubs and dropouts in between count as nothing. What is positively homogeneous, ``f(s * x) = s * f(x)`` for
``s > 0``, lets a scale of each channel through: a ReLU, a pooling, an average. A ReLU6, a SiLU or a sum with something
else does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant._torch_ao import DeQuantStub, FusedModule, QuantStub, is_observer
from lightning_quant.backends import islands
from lightning_quant.backends.pt2e_folding import WEIGHTED
from lightning_quant.backends.weighted import WeightedLayer, weighted_layers

_ATEN = torch.ops.aten
#: What a node between two layers does to channels: nothing at all; something that lets scales through; something with
#: the positions of each channel; an average of some of them; it puts them beside each other; an average of all of them.
Step = Literal["same", "homogeneous", "pool", "average", "flatten", "mean"]

_SAME: tuple[Any, ...] = (
    QuantStub, DeQuantStub, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout, F.dropout2d,
    islands.in_float, "contiguous", "clone", "detach", torch.clone, _ATEN.dropout.default, _ATEN.clone.default,
    _ATEN.contiguous.default, _ATEN.detach.default, _ATEN.alias.default,
)  # fmt: skip
_HOMOGENEOUS: tuple[Any, ...] = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, F.relu, torch.relu, torch.relu_, F.leaky_relu, F.prelu, torch.prelu, "relu",
    "relu_", _ATEN.relu.default, _ATEN.relu_.default, _ATEN.leaky_relu.default, _ATEN.leaky_relu_.default,
    _ATEN.prelu.default,
)  # fmt: skip
_POOLS: tuple[Any, ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, _ATEN.max_pool1d.default, _ATEN.max_pool2d.default,
    _ATEN.max_pool3d.default,
)  # fmt: skip
_AVERAGES: tuple[Any, ...] = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    _ATEN.avg_pool1d.default, _ATEN.avg_pool2d.default, _ATEN.avg_pool3d.default, _ATEN.adaptive_avg_pool1d.default,
    _ATEN.adaptive_avg_pool2d.default, _ATEN.adaptive_avg_pool3d.default,
)  # fmt: skip
_FLATTEN: tuple[Any, ...] = (nn.Flatten, torch.flatten, "flatten", _ATEN.flatten.using_ints)
_MEAN: tuple[Any, ...] = (torch.mean, "mean", _ATEN.mean.dim)


@dataclass(frozen=True)
class Pair:
    """A layer whose output one other layer reads, and nothing else does.

    Attributes:
        first: The layer that gives the channels.
        second: The layer that reads them.
        positions: How many neighbouring inputs of ``second`` are one channel of ``first``: more than one behind a
            flattening.
    """

    first: WeightedLayer
    second: WeightedLayer
    positions: int = 1


class Flow:
    """The paths of a prepared graph.

    Attributes:
        layers: Its layers with weights.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.layers = weighted_layers(graph_module)
        self.nodes: dict[str, fx.Node] = {node.name: node for node in graph_module.graph.nodes}
        self.layer_of = {name: layer for layer in self.layers for name in layer.nodes}

    def step(self, node: fx.Node) -> Step | None:
        """What a node does to the channels of its first argument; None: no scale of channels comes through it."""
        if node.op == "output" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        if node.op == "call_module" and is_observer(self.graph_module.get_submodule(str(node.target))):
            return "same"
        kind = islands.kind_of(self.graph_module, node)
        if kind in _HOMOGENEOUS:
            return "homogeneous"
        if kind in _SAME:
            return "same"
        if kind in _POOLS:
            return "pool"
        if kind in _AVERAGES:
            return "average"
        if kind in _FLATTEN:
            return "flatten" if self._flattens_channels(node) else None
        return "mean" if kind in _MEAN else None  # whose axes depend on what it is given

    def _flattens_channels(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module: Any = self.graph_module.get_submodule(str(node.target))
            return (module.start_dim, module.end_dim) == (1, -1)
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        end = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
        return (start, end) == (1, -1)

    def data_of(self, layer: fx.Node) -> fx.Node | None:
        """The activation that a node of a layer reads."""
        how = WEIGHTED.get(layer.target)
        found = layer.args[how.data] if how is not None else layer.args[0]
        return found if isinstance(found, fx.Node) else None

    def readers(self, node: fx.Node) -> tuple[WeightedLayer, ...] | None:
        """The layers that read what a node gives, through nothing; None: something else reads it, too."""
        found: list[WeightedLayer] = []
        for user in node.users:
            layer = self.layer_of.get(user.name)
            if layer is not None and self.data_of(user) is node and user.all_input_nodes.count(node) == 1:
                found.append(layer)
            elif layer is None and self.step(user) == "same":
                further = self.readers(user)
                if further is None:
                    return None
                found += further
            else:
                return None
        return tuple({layer.key: layer for layer in found}.values()) or None

    def pairs(self) -> tuple[Pair, ...]:
        """Layers whose channels can be scaled and scaled back, each called once, in the order of the data."""
        return tuple(pair for layer in self.layers if (pair := self._pair(layer)) is not None)

    def _pair(self, first: WeightedLayer) -> Pair | None:
        if len(first.nodes) != 1 or not self._is_homogeneous(first):
            return None
        node = self.nodes[first.nodes[0]]
        steps: list[Step] = []
        while True:
            if len(node.users) != 1:
                return None
            (user,) = node.users
            second = self.layer_of.get(user.name)
            if second is not None:
                read_once = self.data_of(user) is node and len(second.nodes) == 1 and second is not first
                return _joined(first, second, steps) if read_once else None
            step = self.step(user)
            if step is None or (step == "mean" and not averages_positions(user, first.weight.dim() - 2)):
                return None
            steps.append(step)
            node = user

    def _is_homogeneous(self, layer: WeightedLayer) -> bool:
        node = self.nodes[layer.nodes[0]]
        module = self.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        after = list(module.children())[1:] if isinstance(module, FusedModule) else []
        return all(is_observer(part) or type(part) in (nn.ReLU, nn.LeakyReLU, nn.Identity) for part in after)


def _joined(first: WeightedLayer, second: WeightedLayer, steps: list[Step]) -> Pair | None:
    """The pair, if the channels of the first layer are those of the second."""
    of_positions = second.is_linear and not first.is_linear  # from the second dimension to the last
    if of_positions != any(step in ("flatten", "mean") for step in steps):
        # behind a pooling to one position, and flattened, both are one dimension
        return None
    if first.is_linear and (not second.is_linear or any(step != "same" and step != "homogeneous" for step in steps)):
        return None
    if second.input_channels % first.output_channels:
        return None
    positions = second.input_channels // first.output_channels
    return Pair(first, second, positions) if positions == 1 or "flatten" in steps else None


def averages_positions(node: fx.Node, dimensions: int, *, keeping: bool = False) -> bool:
    """Whether a mean is over the last ``dimensions`` of ``2 + dimensions``, and leaves them out, or keeps them."""
    axes: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    axes = (axes,) if isinstance(axes, int) else axes
    found = () if keeps is not keeping or axes is None else {axis % (2 + dimensions) for axis in axes}
    return found == {*range(2, 2 + dimensions)}

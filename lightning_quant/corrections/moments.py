"""Mean and variance of what the nodes of a prepared graph give, known from the batch norms that were folded into it.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
https://arxiv.org/abs/1906.04721, section 4.2.1 and appendix C: before its activation, each channel of a layer with a
batch norm is normal; behind an activation that clamps, it is that normal distribution with what is cut off put at the
ends.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lightning_quant._torch_ao import FusedModule, is_observer
from lightning_quant.backends import islands
from lightning_quant.backends.eager_stubs import Functional
from lightning_quant.backends.flow import Flow, averages_positions
from lightning_quant.backends.hiding import clamp_of
from lightning_quant.backends.weighted import WeightedLayer

_ATEN = torch.ops.aten
_SUMS: tuple[Any, ...] = (
    operator.add, operator.iadd, torch.add, "add", "add_", _ATEN.add.Tensor, _ATEN.add_.Tensor,
)  # fmt: skip
_RELU = (0.0, math.inf)
#: So many standard deviations from the mean, density and share of a normal distribution are 0 in float64.
_FAR = 40.0


@dataclass(frozen=True)
class Moments:
    """Of each channel of an activation, over all samples and positions.

    Attributes:
        mean: float64, ``(channels,)``.
        variance: As ``mean``; None: it is not known, as behind an average of positions, which depend on each other.
        dimensions: How many dimensions of positions are behind that of the channels.
        flattened: The positions of each channel stand beside each other, in the dimension of the channels.
    """

    mean: torch.Tensor
    variance: torch.Tensor | None
    dimensions: int
    flattened: bool = False


def clipped_normal(
    mean: torch.Tensor, variance: torch.Tensor, least: float, most: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of ``min(max(x, least), most)`` for a normal ``x``, in closed form.

    With ``x = mean + deviation * z`` and the ends ``a`` and ``b`` of ``z``, the integrals over what is below, between
    and above are (``F`` is the share of a standard normal distribution below, ``f`` its density)::

        E[z']   = a F(a) + b F(-b) + f(a) - f(b)
        E[z'^2] = a^2 F(a) + b^2 F(-b) + F(b) - F(a) + a f(a) - b f(b)

    Args:
        mean: float64, any shape.
        variance: As ``mean``. Where it is 0, ``x`` is its mean.
        least: May be minus infinity.
        most: May be infinity.
    """
    deviation = variance.sqrt()
    spreads = deviation > 0
    unit = torch.where(spreads, deviation, 1.0)
    # an end that is far off has no weight, and infinity times 0 is no number
    a, b = ((least - mean) / unit).clamp(min=-_FAR), ((most - mean) / unit).clamp(max=_FAR)
    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)
    at_a, at_b = (torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) for x in (a, b))
    first = a * below + b * above + at_a - at_b
    second = a.square() * below + b.square() * above + (1 - above - below) + a * at_a - b * at_b
    found = torch.where(spreads, mean + unit * first, mean.clamp(least, most))
    spread = (second - first.square()).clamp(min=0) * variance
    return found, torch.where(spreads, spread, 0.0)


def moments(graph_module: fx.GraphModule) -> dict[str, Moments]:
    """Node -> what is known of what it gives; nothing of a node that is not there.

    Known are layers with a batch norm folded in, behind clamps (ReLU, ReLU6, Hardtanh), observers, dropouts, averages
    of positions and flattenings, and sums of two that are known. A sum takes both for independent.

    Args:
        graph_module: From a backend's ``prepare`` for ``static``, by ``fx``, ``eager`` or ``pt2e``.

    Raises:
        ConfigError: It was prepared for another method, or by ``torchscript``.
    """
    walk = _Walk(graph_module)
    for node in graph_module.graph.nodes:
        walk.visit(node)
    return {node.name: found for node, found in walk.found.items()}


class _Walk:
    """One pass over a graph, in the order in which it runs."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.flow = Flow(graph_module)
        self.modules = dict(graph_module.named_modules(remove_duplicate=False))
        names = [layer.name for layer in self.flow.layers]
        # in pt2e several layers may have the name of the one place that they come from
        self.normals = {layer.key: layer.normal for layer in self.flow.layers if names.count(layer.name) == 1}
        self.found: dict[fx.Node, Moments] = {}
        # node -> the one whose tensor it may hand on
        self.origins: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Keep what is known of a node, and forget what it changes in place: others may read that later."""
        found = self._of(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is not None and _changes(node, self._module(node)):
            self.origins[node] = origin = self.origins.get(source, source)
            for other in [x for x in self.found if self.origins.get(x, x) is origin]:
                del self.found[other]
        elif source is not None and self._may_share(node):
            self.origins[node] = self.origins.get(source, source)
        if found is not None:
            self.found[node] = found

    def _may_share(self, node: fx.Node) -> bool:
        """Whether what a node gives may be the tensor of its first argument, or a view of it."""
        if node.name in self.flow.layer_of:
            return False
        step = self.flow.step(node)
        if step is None:  # a view has many names: only of what is known to compute a tensor is it known
            return self._summed(node) is None and clamp_of(node, self.modules) is None
        return step in ("same", "flatten")

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _of(self, node: fx.Node) -> Moments | None:
        layer = self.flow.layer_of.get(node.name)
        if layer is not None:
            return self._of_layer(node, layer)
        if (sources := self._summed(node)) is not None:
            found = _sum(*(self.found.get(source) for source in sources))
            module = self._module(node)
            ends_in_relu = isinstance(module, Functional) and module.operation == "add_relu"
            return _clamped(found, _RELU) if ends_in_relu else found
        given = self.found.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if given is None:
            return None
        clamp = clamp_of(node, self.modules)
        return _clamped(given, clamp) if clamp is not None else self._moved(node, given)

    def _of_layer(self, node: fx.Node, layer: WeightedLayer) -> Moments | None:
        """Of a layer that runs once, behind what is fused with it."""
        normal = self.normals.get(layer.key)
        if normal is None or len(layer.nodes) != 1:
            return None
        dimensions = 0 if layer.is_linear else layer.weight.dim() - 2
        found: Moments | None = Moments(normal.mean, normal.deviation.square(), dimensions)
        module = self._module(node)
        for part in list(module.children())[1:] if isinstance(module, FusedModule) else []:
            if type(part) is nn.ReLU:
                found = _clamped(found, _RELU)
            elif not is_observer(part) and type(part) is not nn.Identity:
                return None
        return found

    def _summed(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two that a node gives the sum of; None: it is no sum of two activations."""
        kind = islands.kind_of(self.flow.graph_module, node) if node.op != "output" else None
        module = self._module(node)
        sums = module.operation in ("add", "add_relu") if isinstance(module, Functional) else kind in _SUMS
        if not sums or node.kwargs or len(node.args) != 2:
            return None
        a, b = node.args
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b:
            return a, b
        return None

    def _moved(self, node: fx.Node, given: Moments) -> Moments | None:
        """Behind what gives the values that it takes, or averages of them."""
        step = self.flow.step(node)
        if step == "same":
            return given
        if given.dimensions == 0:
            return None
        averaged = replace(given, variance=None)
        if step == "average":
            return None if _divides_by_more(node, self._module(node)) else averaged
        if step == "flatten":
            return replace(given, dimensions=0, flattened=True)
        if step == "mean" and averages_positions(node, given.dimensions, keeping=True):
            return averaged
        if step == "mean" and averages_positions(node, given.dimensions):
            return replace(averaged, dimensions=0)
        return None


def _clamped(given: Moments | None, limits: tuple[float, float]) -> Moments | None:
    if given is None or given.variance is None:
        return None
    mean, variance = clipped_normal(given.mean, given.variance, *limits)
    return replace(given, mean=mean, variance=variance)


def _sum(a: Moments | None, b: Moments | None) -> Moments | None:
    if a is None or b is None:
        return None
    if (a.mean.shape, a.dimensions, a.flattened) != (b.mean.shape, b.dimensions, b.flattened):
        return None
    variance = None if a.variance is None or b.variance is None else a.variance + b.variance
    return replace(a, mean=a.mean + b.mean, variance=variance)


def _divides_by_more(node: fx.Node, module: Any) -> bool:
    """Whether an average pooling divides by a number of its own."""
    given = getattr(module, "divisor_override", None)
    return (given or node.kwargs.get("divisor_override") or (node.args[6] if len(node.args) > 6 else None)) is not None


def _changes(node: fx.Node, module: Any) -> bool:
    """Whether a node may change its first argument in place."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operators = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    told = any(given is True for given in (*node.args[1:], node.kwargs.get("inplace")))  # in the place of ``inplace``
    return in_place or told or node.target in operators

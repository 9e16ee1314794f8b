"""The layers with weights of a prepared graph, the same for all backends: see a weight or a bias, and store another.

What is stored is what conversion quantizes: batch norms are folded already when a model is prepared for ``static``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lightning_quant._torch_ao import FusedModule, quiet
from lightning_quant.backends.graph import Normal, info, place_of
from lightning_quant.backends.normals import scale_normal
from lightning_quant.backends.pt2e_folding import CONVS as CONVOLUTIONS
from lightning_quant.backends.pt2e_folding import LINEAR, TRANSPOSED, constants_of, groups_of, stride_of, weighted
from lightning_quant.backends.stored_weights import InGraph, InModule, Storage, eager_qconfig, fx_qconfig, weight_node
from lightning_quant.balanced import is_balanced
from lightning_quant.errors import ConfigError
from lightning_quant.observers import FixedRange, is_fixed
from lightning_quant.qconfig import CONV_TRANSPOSES, CONVS

_LAYERS: Any = (nn.Linear, *CONVS, *CONV_TRANSPOSES)


@dataclass(frozen=True)
class WeightQuantization:
    """How a weight is rounded: ``w ~ (q - zero_point) * scale`` with ``quant_min <= q <= quant_max``.

    Attributes:
        scale: float32, ``(channels,)``, or ``(1,)`` where all channels have one.
        zero_point: int64, shaped like ``scale``.
        quant_min: The least integer.
        quant_max: The largest.
        axis: The dimension of the weight that ``scale`` is along; None: it has one scale.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    quant_min: int
    quant_max: int
    axis: int | None

    def along(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``scale`` or ``zero_point`` in a shape that fits ``weight``."""
        if self.axis is None:
            return values.reshape([1] * weight.dim())
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return values.reshape(shape)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` as the int8 model has it, in float: rounded to the nearest integer and clamped."""
        # times the inverse, as torch's kernels do it: ties are theirs
        scale, zero_point = (self.along(x.to(weight.dtype), weight) for x in (self.scale, self.zero_point))
        integers = torch.clamp(torch.round(weight * (1.0 / scale)) + zero_point, self.quant_min, self.quant_max)
        return (integers - zero_point) * scale


@dataclass(frozen=True)
class WeightedLayer:
    """One linear or (transposed) convolution layer of a prepared graph.

    Attributes:
        name: As in ``lightning_quant.analysis.simulation.SimulatedLayer``. In ``pt2e`` several functions on weights of
            one module may share it.
        kind: Its class, or its operator.
        nodes: Names of the nodes that compute it; of a layer that is called more than once, several.
        output_axis: The dimension of the weight with the channels of the output (of each group, if transposed).
        input_axis: The dimension with the channels of the input (of each group, unless transposed).
        groups: Of a convolution.
        transposed: It is a transposed convolution.
        activated: A ReLU is fused with it: what its nodes give is not negative.
        stride: Of a convolution, by dimension; of any other layer, nothing.
        storage: Where the backend has its tensors.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    output_axis: int
    input_axis: int
    groups: int
    transposed: bool
    activated: bool
    stride: tuple[int, ...]
    storage: Storage = field(repr=False)

    @property
    def key(self) -> str:
        """Unlike :attr:`name`, that of this layer alone in its graph: the first of its nodes."""
        return self.nodes[0]

    @property
    def weight(self) -> torch.Tensor:
        """In float, with the batch norm folded in that convert folds. Not to be changed in place."""
        return self.storage.weight().detach()

    def set_weight(self, weight: torch.Tensor) -> None:
        """Store another weight. Its ranges are taken from it, unless they were fixed.

        Args:
            weight: The shape of the one that is there.

        Raises:
            ConfigError: The shape is another one, or a user's own observer cannot begin again.
        """
        if weight.shape != self.storage.weight().shape:
            raise ConfigError(
                f"{self.name}: its weight is {tuple(self.storage.weight().shape)}, and {tuple(weight.shape)} was given."
            )
        self.storage.set_weight(weight.detach().to(self.storage.weight()).contiguous())

    @property
    def bias(self) -> torch.Tensor | None:
        """``(channels of the output,)``, or None."""
        found = self.storage.bias()
        return None if found is None else found.detach()

    @property
    def can_have_bias(self) -> bool:
        """Whether :meth:`set_bias` can be called: a product of matrices has none."""
        return self.storage.can_have_bias

    def set_bias(self, bias: torch.Tensor) -> None:
        """Store a bias, also where there was none.

        Args:
            bias: ``(channels of the output,)``.

        Raises:
            ConfigError: It cannot have one, or the shape is another one.
        """
        if not self.can_have_bias:
            raise ConfigError(f"{self.name}: a {self.kind} has no bias. Leave it out.")
        if bias.shape != (self.output_channels,):
            raise ConfigError(f"{self.name}: its bias is {(self.output_channels,)}, and {tuple(bias.shape)} was given.")
        self.storage.set_bias(bias.detach().to(self.storage.weight()).contiguous())

    @property
    def output_channels(self) -> int:
        """Of all groups together."""
        return int(self.weight.shape[self.output_axis]) * (self.groups if self.transposed else 1)

    @property
    def input_channels(self) -> int:
        """Of all groups together."""
        return int(self.weight.shape[self.input_axis]) * (1 if self.transposed else self.groups)

    @property
    def is_linear(self) -> bool:
        """Whether channels are the last dimension of what it reads and gives, and not that behind the batch."""
        return "conv" not in self.kind.lower()

    def channel_axis(self, activation: torch.Tensor) -> int:
        """The dimension of the channels of what it reads or gives. A batch may be missing in front of it."""
        return activation.dim() - 1 if self.is_linear else activation.dim() - self.weight.dim() + 1

    @property
    def quantization(self) -> WeightQuantization | None:
        """How convert would round the weight as it is now; None: it stays float."""
        observer = self.storage.observer()
        if observer is None:
            return None
        with quiet():
            scale, zero_point = observer.calculate_qparams()
        per_channel = observer.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
        return WeightQuantization(
            scale=scale.detach().reshape(-1).float(),
            zero_point=zero_point.detach().reshape(-1).long(),
            quant_min=int(observer.quant_min),
            quant_max=int(observer.quant_max),
            axis=int(observer.ch_axis) if per_channel else None,
        )

    @property
    def balance(self) -> torch.Tensor | None:
        """``(channels,)``: by how much its scale is larger than the ends of the weight ask for; None: it is not.

        It is where :mod:`lightning_quant.balanced` chose it.
        """
        observer = self.storage.observer()
        return observer.share.detach() if is_balanced(observer) else None

    @property
    def fixed_scale(self) -> torch.Tensor | None:
        """The scale that :meth:`fix_ranges` was given; None: it was not called."""
        observer = self.storage.observer()
        return observer.scale.detach() if is_fixed(observer) else None

    def fix_ranges(self, scale: torch.Tensor | None = None) -> None:
        """Let convert round whatever weight is stored from now on with these scales.

        Args:
            scale: As that of :attr:`quantization`, above 0. None: the one that it has now.

        Raises:
            ConfigError: The layer stays float, or the scale does not fit.
        """
        now = self.quantization
        if now is None:
            raise ConfigError(f"{self.name}: it stays float, and has no range to fix.")
        scale = now.scale if scale is None else scale.detach().to(now.scale)
        if scale.shape != now.scale.shape or not bool((scale > 0).all()):
            raise ConfigError(
                f"{self.name}: give one scale above 0 for each of {tuple(now.scale.shape)}, not {tuple(scale.shape)}."
            )
        self.storage.fix(FixedRange.like(self.storage.observer(), scale, now.zero_point))

    def grouped(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The weight as ``(groups, outputs of a group, inputs of a group, taps)``, whichever layer it is.

        Args:
            weight: Of the shape of :attr:`weight`. None: that one.
        """
        weight = self.weight if weight is None else weight
        if self.transposed:  # (in, out / groups, ...)
            return weight.reshape(self.groups, -1, weight.shape[1], weight[0, 0].numel()).transpose(1, 2)
        if self.output_axis == 1:  # of a product of matrices
            return weight.t()[None, :, :, None]
        inputs = weight.shape[1]
        return weight.reshape(self.groups, -1, inputs, weight[0, 0].numel())

    def ungrouped(self, grouped: torch.Tensor) -> torch.Tensor:
        """The reverse of :meth:`grouped`, in the shape of :attr:`weight`."""
        if self.transposed:
            return grouped.transpose(1, 2).reshape(self.weight.shape)
        return grouped[0, :, :, 0].t() if self.output_axis == 1 else grouped.reshape(self.weight.shape)

    @property
    def normal(self) -> Normal | None:
        """How its output is distributed before an activation; None: no batch norm was folded into it alone."""
        return info(self.storage.graph_module).normals.get(self.name)

    def scale_normal(self, factor: torch.Tensor) -> None:
        """Let :attr:`normal` be that of ``factor`` times its output; for who multiplies weight and bias himself."""
        scale_normal(self.storage.graph_module, self.name, factor)

    def scale_outputs(self, factor: torch.Tensor) -> None:
        """Multiply what the layer gives before an activation, bias included: ``factor`` is ``(output channels,)``."""
        self.scale_normal(factor)
        grouped = self.grouped()
        self.set_weight(self.ungrouped(grouped * factor.to(grouped).reshape(self.groups, -1, 1, 1)))
        if self.bias is not None:
            self.set_bias(self.bias * factor.to(self.bias))

    def scale_inputs(self, factor: torch.Tensor) -> None:
        """Multiply the weights that read each channel: ``factor`` is ``(input channels,)``."""
        grouped = self.grouped()
        self.set_weight(self.ungrouped(grouped * factor.to(grouped).reshape(self.groups, 1, -1, 1)))


def weighted_layers(graph_module: nn.Module) -> tuple[WeightedLayer, ...]:
    """The layers of one prepared graph whose weights are stored, in the order in which they run.

    Those that stay float are among them, and those inside of modules that the graph keeps are not.

    Args:
        graph_module: From a backend's ``prepare`` for ``static``, by ``fx``, ``eager`` or ``pt2e``.

    Raises:
        CaptureError: No backend made it.
        ConfigError: It was prepared for another method, or by ``torchscript``.
    """
    known = info(graph_module)
    if known.method != "static":
        raise ConfigError(
            f"method={known.method!r}: weights are corrected after calibration, in a model that was prepared for "
            "'static'. Use method='static'."
        )
    if known.config.backend == "torchscript":
        raise ConfigError(
            "backend='torchscript': weights are corrected in graphs of modules or operators, and it has neither. Use "
            "'fx', 'eager' or 'pt2e'."
        )
    assert isinstance(graph_module, fx.GraphModule)
    found = _operators(graph_module) if known.config.backend == "pt2e" else _modules(graph_module)
    return tuple(found)


# ---- modules, of fx and eager


def _modules(graph_module: fx.GraphModule) -> list[WeightedLayer]:
    known = info(graph_module)
    eager = known.config.backend == "eager"
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and str(node.target) not in (*known.kept, *known.swapped):
            calls.setdefault(str(node.target), []).append(node)
    found = []
    for name, nodes in calls.items():
        module: Any = graph_module.get_submodule(name)
        layer: Any = module[0] if isinstance(module, FusedModule) else module
        if not isinstance(layer, _LAYERS) or not isinstance(layer.weight, torch.Tensor):
            continue
        how = eager_qconfig(graph_module, name) if eager else fx_qconfig(graph_module, module, nodes)
        transposed = isinstance(layer, CONV_TRANSPOSES)
        found.append(
            WeightedLayer(
                name=name,
                kind=type(layer).__name__,
                nodes=tuple(node.name for node in nodes),
                output_axis=1 if transposed else 0,
                input_axis=0 if transposed else 1,
                groups=getattr(layer, "groups", 1),
                transposed=transposed,
                activated=isinstance(module, FusedModule) and any(isinstance(part, nn.ReLU) for part in module),
                stride=tuple(getattr(layer, "stride", ())),
                storage=InModule(graph_module, name, *how),
            )
        )
    return found


# ---- operators, of pt2e


def _operators(graph_module: fx.GraphModule) -> list[WeightedLayer]:
    constants = constants_of(graph_module)
    by_weight: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if weighted(node, constants) is None or weight_node(node).op != "get_attr":
            continue
        by_weight.setdefault(str(weight_node(node).target), []).append(node)
    return [_operator(graph_module, tuple(nodes)) for nodes in by_weight.values()]


def _operator(graph_module: fx.GraphModule, nodes: tuple[fx.Node, ...]) -> WeightedLayer:
    first = nodes[0]
    place, holder = place_of(first), str(weight_node(first).target).rpartition(".")[0]
    # a function of a module on the weight of another one inside of it, as attention has it
    place = holder if holder.startswith(place) else place
    transposed = first.target in TRANSPOSED
    swapped = first.target not in (LINEAR, *CONVOLUTIONS)  # transposed, or a product of matrices
    return WeightedLayer(
        name=place or first.name,
        kind=str(first.target).rpartition("aten.")[2].partition(".")[0],
        nodes=tuple(node.name for node in nodes),
        output_axis=1 if swapped else 0,
        input_axis=0 if swapped else 1,
        groups=groups_of(first),
        transposed=transposed,
        activated=False,
        stride=stride_of(first),
        storage=InGraph(graph_module, nodes),
    )

"""Weights that oscillate between two integers in quantization-aware training, and their freezing.

The straight-through estimator pushes a weight whose best value lies between two integers over the threshold between
them, and back, again and again: with few bits, that is what the last steps of a training do. A weight that does so more
often than a threshold is fixed at the integer at which it has been most of the time (Nagel et al. 2022, algorithm 1,
https://arxiv.org/abs/2203.11086).

Integers are counted from the zero point here, ``round(weight / scale)`` within the range, so that a weight at ``k``
has the value ``k * scale``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from lightning_quant import fake_quantize, learned_scale
from lightning_quant.backends.graph import observers, sees_weights
from lightning_quant.errors import ConfigError
from lightning_quant.learned_scale import is_learned


@dataclass(frozen=True, kw_only=True)
class OscillationFreezing:
    """When a weight that oscillates is frozen. One count is one step of its optimizer.

    Attributes:
        threshold: A weight is frozen when it oscillates more often than this: a share of the steps, 0 to 1.
        final_threshold: At the end of the training; in between, the threshold goes there by a half cosine, from the
            first quantized epoch on. None: it stays as it is.
        momentum: Share of the newest step in the moving averages of how often a weight oscillates, and of its integer.
            Below ``threshold`` and ``final_threshold``: at a share of it, one oscillation alone would freeze a weight.

    Raises:
        ConfigError: A value is out of its range, or a single oscillation would freeze a weight.

    >>> OscillationFreezing(threshold=0.04, final_threshold=0.01, momentum=0.005).momentum
    0.005
    """

    threshold: float = 0.03
    final_threshold: float | None = 0.015
    momentum: float = 0.01

    def __post_init__(self) -> None:
        for name in ("threshold", "final_threshold", "momentum"):
            value = getattr(self, name)
            if name == "final_threshold" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ConfigError(f"OscillationFreezing({name}={value!r}): give a share of the steps, between 0 and 1.")
        for name in ("threshold", "final_threshold"):
            value = getattr(self, name)
            if value is not None and value < self.momentum:
                raise ConfigError(
                    f"OscillationFreezing({name}={value}, momentum={self.momentum}): one oscillation makes the average "
                    f"as large as momentum, and would freeze a weight for good. Give a {name} that is not below it."
                )


def threshold_at(settings: OscillationFreezing, progress: float) -> float:
    """The threshold where ``progress`` of the quantized training is done, 0 to 1.

    ``end + (start - end) * (1 + cos(pi * progress)) / 2``.

    >>> [round(threshold_at(OscillationFreezing(threshold=0.04, final_threshold=0.02), at), 3) for at in (0, 0.5, 1)]
    [0.04, 0.03, 0.02]
    """
    start = settings.threshold
    end = start if settings.final_threshold is None else settings.final_threshold
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


# ---- of one weight


@dataclass(frozen=True)
class Oscillation:
    """What is known of each element of a weight. Tensors of its shape, changed in place.

    Attributes:
        integers: int16: where it was after the last step; of what is frozen, where it stays.
        direction: int8: -1 or 1, where its last change went; 0: it has not changed yet.
        frequency: float32: moving average of whether it oscillates, 0 to 1.
        mean: float32: moving average of its integer.
        frozen: bool.
    """

    integers: torch.Tensor
    direction: torch.Tensor
    frequency: torch.Tensor
    mean: torch.Tensor
    frozen: torch.Tensor


def begin(integers: torch.Tensor) -> Oscillation:
    """Nothing has moved yet. ``integers``: whole numbers of any dtype."""
    return Oscillation(
        integers=integers.to(torch.int16),
        direction=torch.zeros_like(integers, dtype=torch.int8),
        frequency=torch.zeros_like(integers, dtype=torch.float32),
        mean=integers.to(torch.float32).clone(),
        frozen=torch.zeros_like(integers, dtype=torch.bool),
    )


def count(state: Oscillation, integers: torch.Tensor, momentum: float) -> None:
    """Look at a weight after a step.

    It oscillates in a step that changes its integer in the other direction than the change before:
    ``frequency = momentum * oscillates + (1 - momentum) * frequency``, and the same of the integer.

    Args:
        state: Changed in place. What is frozen stays as it is.
        integers: Whole numbers of any dtype, of the shape of the weight.
        momentum: Share of this step.
    """
    integers = torch.where(state.frozen, state.integers, integers.to(torch.int16))
    change = torch.sign(integers - state.integers).to(torch.int8)
    oscillates = change * state.direction == -1
    state.frequency.lerp_(oscillates.to(torch.float32), momentum)
    state.mean.lerp_(integers.to(torch.float32), momentum)
    state.direction.copy_(torch.where(change != 0, change, state.direction))
    state.integers.copy_(integers)


def freeze(state: Oscillation, threshold: float, may: torch.Tensor | None = None) -> torch.Tensor:
    """Freeze what oscillates more often than ``threshold``, at the nearest integer to its mean.

    Args:
        state: Changed in place.
        threshold: A share of the steps.
        may: bool, of the shape of the weight: which elements may be frozen. None: all.

    Returns:
        bool: what was frozen now.
    """
    new = (state.frequency > threshold) & ~state.frozen
    if may is not None:
        new &= may
    state.integers.copy_(torch.where(new, state.mean.round().to(torch.int16), state.integers))
    state.frozen.logical_or_(new)
    return new


# ---- of a graph


@dataclass(frozen=True)
class _Weight:
    """A Parameter, and the fake quantize that reads it as it is."""

    target: str
    name: str
    fake_quantize: Any
    parameter: nn.Parameter


def weights_of(target: str, graph: nn.Module) -> tuple[list[_Weight], list[str]]:
    """The Parameters that fake quantizes of a prepared graph read, and the names of fake quantizes without one.

    The latter are classes of the user's own, and those that read something else: the product with a batch norm, for
    example, where a weight has one scale.
    """
    found, others = [], []
    for name, module in observers(graph).items():
        if not sees_weights(graph, name):
            continue
        read = _read_by(graph, name, module) if fake_quantize.is_ours(module) else None
        if isinstance(read, nn.Parameter):
            found.append(_Weight(target, name, module, read))
        else:
            others.append(f"{target}.{name}" if target else name)
    return found, others


def _read_by(graph: nn.Module, name: str, module: Any) -> Any:
    parent, _, last = name.rpartition(".")
    if last == "weight_fake_quant":
        layer: Any = graph.get_submodule(parent)
        # see qat_modules.quantized_weight
        folded = hasattr(layer, "bn") and module.qscheme != torch.per_channel_symmetric
        return None if folded else layer._parameters.get("weight")
    nodes = graph.graph.nodes if isinstance(graph, fx.GraphModule) else ()
    for node in nodes:
        if node.op == "call_module" and str(node.target) == name:
            source = node.args[0]
            if not isinstance(source, fx.Node) or source.op != "get_attr":
                return None
            parent, _, last = str(source.target).rpartition(".")
            return getattr(graph.get_submodule(parent), last, None)
    return None


@dataclass(frozen=True)
class Grid:
    """Where the values of a weight may be: ``k * scale`` for whole ``k`` from ``least`` to ``most``.

    Attributes:
        scale: In a shape that multiplies the weight, as are the others.
        least: The lowest ``k``.
        most: The highest.
        low: What a frozen value may not be below, so that the range stays what it is; None: it may be anywhere.
        high: What it may not be above.
    """

    scale: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """``round(weight / scale)`` within the range, float32."""
        return torch.round(weight / self.scale).clamp(self.least, self.most)

    def values(self, integers: torch.Tensor) -> torch.Tensor:
        """``k * scale``, float32. A range that the largest weights say is not made wider by rounding."""
        values = integers * self.scale
        return values if self.low is None else values.clamp(self.low, self.high)

    def inside(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Which elements may be frozen; None: all. A range hangs on the largest, which have to be free to move it."""
        return None if self.low is None or self.high is None else (weight > self.low) & (weight < self.high)


def grid_of(module: Any, weight: torch.Tensor, frozen: torch.Tensor | None) -> Grid:
    """The grid that a fake quantize will round ``weight`` to in its next pass.

    Args:
        module: The fake quantize, of one of ours.
        weight: The Parameter's values.
        frozen: bool, of its shape: elements that have no say in a range that follows the weights, because they follow
            it. None: there are none.
    """
    observer = module.activation_post_process
    shape = [1] * weight.dim()
    if module.is_per_channel:
        shape[module.ch_axis % weight.dim()] = weight.shape[module.ch_axis]
    low = high = None
    if _stands_alone(module):
        scale, zero_point = learned_scale.qparams(module)
    else:
        free = weight if frozen is None else weight.masked_fill(frozen, 0.0)
        low, high = fake_quantize.range_of(module, free)
        settings = {name: getattr(observer, name) for name in ("quant_min", "quant_max", "dtype", "eps")}
        as_seen = SimpleNamespace(
            min_val=low, max_val=high, has_customized_qrange=observer.has_customized_qrange, **settings
        )
        scale, zero_point = fake_quantize.qparams_of_range(
            SimpleNamespace(activation_post_process=as_seen, is_symmetric=module.is_symmetric)
        )
        if module.is_symmetric:
            high = torch.maximum(-low, high)
            low = -high
        low, high = low.clamp(max=0).reshape(shape), high.clamp(min=0).reshape(shape)
    zero_point = zero_point.to(torch.float32).reshape(shape)
    ends = observer.quant_min - zero_point, observer.quant_max - zero_point
    return Grid(scale.detach().reshape(shape), *ends, low, high)


def _stands_alone(module: Any) -> bool:
    """Whether the scale is trained, and follows no range."""
    return is_learned(module) and bool(module.scale.requires_grad)


# ---- in training


class Oscillations:
    """Looks at the weights after each step of an optimizer that trains them, and puts back what is frozen.

    Args:
        settings: Of the user.
        graphs: Target name -> prepared graph, linked to the module that trains.
        optimizers: Those of the training.

    Attributes:
        enabled: Fake quantize runs; else nothing is looked at.
        threshold: Of the step that comes.

    Raises:
        ConfigError: An optimizer is none of ``torch.optim``, or no weight can be watched.
    """

    def __init__(
        self, settings: OscillationFreezing, graphs: Mapping[str, nn.Module], optimizers: Iterable[Any]
    ) -> None:
        self.settings = settings
        self.enabled = False
        self.threshold = settings.threshold
        optimizers = list(optimizers)
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise ConfigError(
                    f"freeze_oscillations=... with {type(optimizer).__name__}: what is frozen is put back after each "
                    "step of the module's optimizer, and this one does not derive from torch.optim.Optimizer. Use one "
                    "that does, or leave freeze_oscillations out."
                )
        self._weights, self.unwatched = _all_weights(graphs)
        trained = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
        self._weights = [weight for weight in self._weights if id(weight.parameter) in trained]
        if not self._weights:
            raise ConfigError(_NOTHING.format(f" ({self.unwatched[0]})" if self.unwatched else ""))
        self._states: dict[int, Oscillation] = {}
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.enabled:
            return
        stepped = {id(parameter) for parameter in _parameters(optimizer)}
        with torch.no_grad():
            for index, weight in enumerate(self._weights):
                if id(weight.parameter) in stepped:
                    self._look_at(index, weight)

    def _look_at(self, index: int, weight: _Weight) -> None:
        module, values = weight.fake_quantize, weight.parameter.data
        if _stands_alone(module) and not fake_quantize.is_on(module, "learned"):
            return  # there is no grid yet
        state = self._states.get(index)
        grid = grid_of(module, values, None if state is None else state.frozen)
        integers = grid.integers(values)
        if state is None:
            self._states[index] = begin(integers)
            return
        count(state, integers, self.settings.momentum)
        freeze(state, self.threshold, grid.inside(values))
        values.copy_(torch.where(state.frozen, grid.values(state.integers.to(torch.float32)), values))

    def share(self) -> float:
        """The share of the weights that are frozen, of those that are watched."""
        total = sum(weight.parameter.numel() for weight in self._weights)
        return sum(int(state.frozen.sum()) for state in self._states.values()) / total

    def state(self) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """Target name -> name of the fake quantize -> what is known of its weight. Tensors on the CPU."""
        found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
        for index, state in self._states.items():
            weight = self._weights[index]
            kept = {name: value.detach().cpu().clone() for name, value in vars(state).items()}
            found.setdefault(weight.target, {})[weight.name] = kept
        return found

    def load(self, state: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]]) -> None:
        """The reverse of :meth:`state`. A weight of which there is nothing begins anew."""
        for index, weight in enumerate(self._weights):
            kept = state.get(weight.target, {}).get(weight.name)
            if kept is not None:
                self._states[index] = Oscillation(
                    **{name: value.to(weight.parameter.device, copy=True) for name, value in kept.items()}
                )

    def end(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _all_weights(graphs: Mapping[str, nn.Module]) -> tuple[list[_Weight], list[str]]:
    """Of a weight that several fake quantizes read, the first."""
    weights: dict[int, _Weight] = {}
    unwatched: list[str] = []
    for target, graph in graphs.items():
        found, others = weights_of(target, graph)
        unwatched += others
        for weight in found:
            weights.setdefault(id(weight.parameter), weight)
    return list(weights.values()), unwatched


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


_NOTHING = (
    "freeze_oscillations=...: there is no weight to look at. A weight can be frozen where its fake quantize (auto or "
    "learned) reads a Parameter that an optimizer trains; with one scale for a weight that has a batch norm after it, "
    "what is rounded is a product{}. Use qscheme='per_channel_symmetric', or leave freeze_oscillations out."
)

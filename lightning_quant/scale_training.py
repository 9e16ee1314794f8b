"""Learned scales in the user's optimizers, and their optimizer state beside that of the float model.

A scale is trained in the parameter group of the weight that is next to it. It is put into a group that is there, not
into one of its own: learning rate schedulers keep a value for each group that there was when they were made. An
optimizer's ``state_dict`` stays that of the float model: hooks of the optimizer take the scales out of their groups
while it is made or loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from lightning_quant.backends.graph import observers
from lightning_quant.errors import ConfigError
from lightning_quant.learned_offset import trained
from lightning_quant.learned_scale import is_learned

log = logging.getLogger(__name__)

#: Target name -> name of a fake quantize -> what the optimizer keeps of its scale.
OptimizerState = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class _Place:
    """Where a scale is trained: the index of a parameter group."""

    optimizer: Optimizer
    group: int


@dataclass(frozen=True)
class _Scale:
    """A scale, or an offset. ``name``: of the fake quantize; of an offset, with that word behind it."""

    target: str
    name: str
    kind: str
    parameter: nn.Parameter
    place: _Place


class ScaleTraining:
    """Learned scales that optimizers train. Made by :func:`train_scales`; :meth:`end` takes them out again."""

    def __init__(self, scales: Iterable[_Scale]) -> None:
        self._scales = tuple(scales)
        self._states: dict[int, dict[torch.Tensor, Any]] = {}
        self._handles: list[Any] = []
        for optimizer in self._optimizers():
            self._put_in(optimizer)
            self._handles += [
                optimizer.register_state_dict_pre_hook(self._take_out),
                optimizer.register_state_dict_post_hook(self._put_in),
                optimizer.register_load_state_dict_pre_hook(self._take_out),
                optimizer.register_load_state_dict_post_hook(self._put_in),
            ]

    def _optimizers(self) -> list[Optimizer]:
        return list({id(scale.place.optimizer): scale.place.optimizer for scale in self._scales}.values())

    def _of(self, optimizer: Optimizer) -> list[_Scale]:
        return [scale for scale in self._scales if scale.place.optimizer is optimizer]

    def _put_in(self, optimizer: Optimizer, *_: Any) -> None:
        for scale in self._of(optimizer):
            group = optimizer.param_groups[scale.place.group]
            group["params"].append(scale.parameter)
            if "param_names" in group:
                # another list: that of a state_dict is the same object
                name = f"{scale.target}.{scale.name}" + ("" if scale.kind == "offset" else f".{scale.kind}")
                group["param_names"] = [*group["param_names"], name]
        optimizer.state.update(self._states.pop(id(optimizer), {}))

    def _take_out(self, optimizer: Optimizer, *_: Any) -> None:
        own = [scale.parameter for scale in self._of(optimizer)]
        _remove(optimizer, own)
        self._states[id(optimizer)] = {p: optimizer.state.pop(p) for p in own if p in optimizer.state}

    def state(self) -> OptimizerState:
        """What the optimizers keep of each scale, with tensors on the CPU: momentum, for example."""
        found: OptimizerState = {}
        for scale in self._scales:
            kept = scale.place.optimizer.state.get(scale.parameter)
            if kept:
                found.setdefault(scale.target, {})[scale.name] = {
                    key: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                    for key, value in kept.items()
                }
        return found

    def load_state(self, state: OptimizerState) -> None:
        """The reverse of :meth:`state`. A scale of which there is nothing begins anew."""
        for scale in self._scales:
            kept = state.get(scale.target, {}).get(scale.name)
            if kept is not None:
                group = scale.place.optimizer.param_groups[scale.place.group]
                scale.place.optimizer.state[scale.parameter] = {
                    key: _placed(key, value, scale.parameter, group) for key, value in kept.items()
                }

    def end(self) -> None:
        """Leave the optimizers as they would be without the scales."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers():
            self._take_out(optimizer)
        self._handles, self._states, self._scales = [], {}, ()


def _placed(key: str, value: Any, parameter: nn.Parameter, group: dict[str, Any]) -> Any:
    """As ``torch.optim.Optimizer.load_state_dict`` places what it loads: counters of steps stay on the CPU."""
    if not isinstance(value, torch.Tensor):
        return value
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value.clone()
    return value.to(parameter.device, copy=True)


def _remove(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Take parameters out of all groups, whose lists stay the same objects: LBFGS keeps one."""
    out = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        kept = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in out]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][index] for index in kept]
        group["params"][:] = [group["params"][index] for index in kept]


def train_scales(graphs: dict[str, nn.Module], optimizers: Iterable[Any]) -> ScaleTraining:
    """Let optimizers train the learned scales of prepared graphs.

    Each is trained with the weights of the layer that it is in, or whose output it rounds, or, where there is no such
    layer, with most of the target's weights; those that ``self.parameters()`` has put elsewhere are moved there. A
    scale whose layer is trained by no optimizer requires no gradient: it follows the range, as with ``auto``.

    Args:
        graphs: Target name -> graph, linked to the module that trains.
        optimizers: They have no state of a scale.

    Raises:
        ConfigError: An optimizer that would train scales is none of ``torch.optim``.
    """
    found = [
        (target, name, module, graph)
        for target, graph in graphs.items()
        for name, module in observers(graph).items()
        if is_learned(module)
    ]
    if not found:
        return ScaleTraining(())
    parameters = [parameter for _, _, module, _ in found for parameter in trained(module).values()]
    optimizers = list(optimizers)
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"TensorSpec(fake_quantize='learned') with {type(optimizer).__name__}: scales are trained by the "
                "module's optimizer, and this one does not derive from torch.optim.Optimizer. Use one that does, or "
                "fake_quantize='auto'."
            )
        _remove(optimizer, parameters)
    places = {
        id(parameter): _Place(optimizer, index)
        for optimizer in reversed(optimizers)
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    scales, still = [], []
    for target, name, module, graph in found:
        near = next(_near(graph, name), None)
        place = _most(graph, places) if near is None else next((places[id(p)] for p in near if id(p) in places), None)
        for kind, parameter in trained(module).items():
            parameter.requires_grad_(place is not None)
            if place is not None:
                scales.append(_Scale(target, name if kind == "scale" else f"{name}.{kind}", kind, parameter, place))
        if place is None:
            still.append(f"{target}.{name}" if target else name)
    if still:
        log.warning(
            "%d learned scales are not trained, but follow the range, because no optimizer trains the layer that they "
            "belong to (the first: %s).", len(still), still[0],
        )  # fmt: skip
    return ScaleTraining(scales)


def _most(graph: nn.Module, places: dict[int, _Place]) -> _Place | None:
    """Where most of the numbers of a graph are trained."""
    sizes: dict[_Place, int] = {}
    for parameter in graph.parameters():
        if id(parameter) in places:
            place = places[id(parameter)]
            sizes[place] = sizes.get(place, 0) + parameter.numel()
    return max(sizes, key=lambda place: sizes[place]) if sizes else None


def _near(graph: nn.Module, name: str) -> Iterator[list[nn.Parameter]]:
    """Parameters of the layer that a fake quantize is inside of, then of those that reach it, nearest first."""
    parent = name.rpartition(".")[0]
    if parent and (around := _weights(graph.get_submodule(parent))):
        yield around
    pending = [node for node in _nodes(graph) if node.op == "call_module" and str(node.target) == name]
    seen = set(pending)
    while pending:
        node = pending.pop(0)
        if own := _read_by(graph, node):
            yield own
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)


def _nodes(graph: nn.Module) -> Iterable[fx.Node]:
    return graph.graph.nodes if isinstance(graph, fx.GraphModule) else ()


def _read_by(graph: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    """Parameters of the module that ``node`` calls, or that it is."""
    if node.op == "call_module":
        return _weights(graph.get_submodule(str(node.target)))
    if node.op == "get_attr":
        parent, _, last = str(node.target).rpartition(".")
        value = getattr(graph.get_submodule(parent), last, None)
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are no scales."""
    scales = {id(own) for part in module.modules() if is_learned(part) for own in trained(part).values()}
    return [parameter for parameter in module.parameters() if id(parameter) not in scales]

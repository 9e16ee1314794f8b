"""Where the weight of a layer of a prepared graph is stored, and what takes its ranges.

In ``fx`` and ``eager`` a layer is a module, whose weight torch.ao observes afresh when it converts, with an observer
that its qconfig makes (``torch/ao/quantization/fx/convert.py``, ``convert_weighted_module``; ``from_float`` in
``torch/ao/nn/quantized/modules``). In ``pt2e`` it is an operator that reads a stored tensor, which has an observer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn

from lightning_quant._torch_ao import FusedModule, QConfig, quiet
from lightning_quant.backends.constants import value_of
from lightning_quant.backends.eager_swapping import QCONFIGS
from lightning_quant.backends.graph import put
from lightning_quant.backends.hiding import hidden_between, redirect
from lightning_quant.backends.pt2e_folding import WEIGHTED
from lightning_quant.errors import ConfigError
from lightning_quant.observers import FixedRange, is_fixed


class Storage(Protocol):
    """Where a backend has what belongs to one layer."""

    @property
    def can_have_bias(self) -> bool:
        """Whether it has a place for one."""

    def weight(self) -> torch.Tensor:
        """As it is now."""

    def set_weight(self, weight: torch.Tensor) -> None:
        """Store another one of the same shape."""

    def bias(self) -> torch.Tensor | None:
        """As it is now."""

    def set_bias(self, bias: torch.Tensor) -> None:
        """Store one, where there may have been none."""

    def observer(self) -> Any:
        """A copy of the observer of the weight, which has seen the weight as it is; None: the weight stays float."""

    def fix(self, observer: Any) -> None:
        """Let the ranges of the weight be those of this observer, whatever it is shown."""


# ---- modules, of fx and eager


@dataclass(frozen=True)
class _Fixed:
    """Makes observers whose range stands. Copies, because torch.ao moves them between devices."""

    observer: FixedRange

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self.observer)


@dataclass(frozen=True)
class InModule:
    """A module with its weight, and where its qconfig is."""

    graph_module: fx.GraphModule
    name: str
    qconfig: Callable[[], Any]
    set_qconfig: Callable[[Any], None]
    can_have_bias: bool = True

    @property
    def module(self) -> Any:
        """The layer itself, without what is fused with it."""
        found: Any = self.graph_module.get_submodule(self.name)
        return found[0] if isinstance(found, FusedModule) else found

    def weight(self) -> torch.Tensor:
        """As it is now."""
        found: torch.Tensor = self.module.weight
        return found

    def set_weight(self, weight: torch.Tensor) -> None:
        """Store another one."""
        # another object: other layers may share the one that is there
        self.module.weight = nn.Parameter(weight, requires_grad=False)

    def bias(self) -> torch.Tensor | None:
        """As it is now."""
        found: torch.Tensor | None = self.module.bias
        return found

    def set_bias(self, bias: torch.Tensor) -> None:
        """Store one."""
        self.module.bias = nn.Parameter(bias, requires_grad=False)

    def observer(self) -> Any:
        """One that has seen the weight as it is; None: it stays float."""
        qconfig = self.qconfig()
        if qconfig is None:
            return None
        with quiet(), torch.no_grad():
            # torch.ao makes it where the first module was that this one is a copy of
            observer = qconfig.weight().to(self.weight().device)
            observer(self.weight())
        return observer

    def fix(self, observer: Any) -> None:
        """Let its ranges be the weight's."""
        self.set_qconfig(QConfig(activation=self.qconfig().activation, weight=_Fixed(observer)))


def eager_qconfig(graph_module: fx.GraphModule, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """What gives the qconfig of a module, and what stores another one."""

    def store(qconfig: Any) -> None:
        # not in place: copies of a graph share the values of its meta
        graph_module.meta[QCONFIGS] = graph_module.meta[QCONFIGS] | {name: qconfig}

    return lambda: graph_module.meta[QCONFIGS].get(name), store


def fx_qconfig(
    graph_module: fx.GraphModule, module: Any, nodes: list[fx.Node]
) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """As :func:`eager_qconfig`, for a module of a graph of torch.ao, by the nodes that call it."""
    attributes: Any = graph_module.meta["_observed_graph_module_attrs"]

    def qconfig() -> Any:
        names = [node.name for node in nodes]
        if any(
            attributes.node_name_to_qconfig.get(n) is None or n not in attributes.observed_node_names for n in names
        ):
            return None
        return getattr(module, "qconfig", None)

    def store(qconfig: Any) -> None:
        module.qconfig = qconfig

    return qconfig, store


# ---- operators, of pt2e


@dataclass(frozen=True)
class InGraph:
    """Operators of an exported graph that read one stored weight."""

    graph_module: fx.GraphModule
    layers: tuple[fx.Node, ...]

    @property
    def _how(self) -> Any:
        return WEIGHTED[self.layers[0].target]

    @property
    def can_have_bias(self) -> bool:
        """Whether the operator has an argument for one."""
        return self._how.bias is not None

    def weight(self) -> torch.Tensor:
        """As it is now."""
        found: torch.Tensor = value_of(self.graph_module, weight_node(self.layers[0]))
        return found

    def set_weight(self, weight: torch.Tensor) -> None:
        """Store another one."""
        for name in self._observers():
            observer: Any = self.graph_module.get_submodule(name)
            if is_fixed(observer):
                continue
            if not hasattr(observer, "reset_min_max_vals"):
                raise ConfigError(
                    f"{type(observer).__name__} has seen a weight that is about to change, and has no "
                    "reset_min_max_vals by which it would begin again. Define it, or leave out the correction."
                )
            observer.reset_min_max_vals()
            observer(weight)
        node = weight_node(self.layers[0])
        target = stored(self.graph_module, str(node.target), self.layers[0].name, "weight", weight)
        if node.users.keys() <= {*self.layers}:
            node.target = target
        else:  # a layer that looks up rows, as it is tied to the last one of many language models
            with self.graph_module.graph.inserting_before(node):
                own = self.graph_module.graph.get_attr(target)
            own.meta.update(node.meta)
            redirect(node, own, self.layers)
        self.graph_module.recompile()

    def bias(self) -> torch.Tensor | None:
        """As it is now."""
        node = self._bias_node(self.layers[0])
        return None if node is None else value_of(self.graph_module, node)

    def _bias_node(self, layer: fx.Node) -> fx.Node | None:
        position = self._how.bias
        given: Any = layer.args[position] if position is not None and len(layer.args) > position else None
        found = given if isinstance(given, fx.Node) else layer.kwargs.get("bias")
        return found if isinstance(found, fx.Node) else None

    def set_bias(self, bias: torch.Tensor) -> None:
        """Store one."""
        first = self.layers[0]
        target = stored(self.graph_module, str(weight_node(first).target), first.name, "bias", bias)
        for layer in self.layers:
            before = self._bias_node(layer)
            if before is not None and before.op == "get_attr" and before.users.keys() <= {*self.layers}:
                before.target = target
                continue
            with self.graph_module.graph.inserting_before(layer):
                node = self.graph_module.graph.get_attr(target)
            # what was there stays: hidden nodes may have stood in front of it
            if "bias" in layer.kwargs:
                layer.kwargs = {**layer.kwargs, "bias": node}
            else:
                position = self._how.bias
                layer.args = (*layer.args[:position], node, *layer.args[position + 1 :])
        self.graph_module.recompile()

    def observer(self) -> Any:
        """One that has seen the weight as it is; None: it stays float."""
        names = self._observers()
        return copy.deepcopy(self.graph_module.get_submodule(names[0])) if names else None

    def fix(self, observer: Any) -> None:
        """Let its ranges be the weight's."""
        for name in self._observers():
            put(self.graph_module, name, _fixed_class().like(observer, observer.scale, observer.zero_point))

    def _observers(self) -> list[str]:
        """Names of the observers of the weight, whose nodes are hidden. There are several if it is read twice."""
        found = (hidden_between(weight_node(layer), layer) for layer in self.layers)
        return list(dict.fromkeys(name for name in found if name is not None))


def weight_node(layer: fx.Node) -> fx.Node:
    """The node that an operator of :data:`~lightning_quant.backends.pt2e_folding.WEIGHTED` reads its weight from."""
    found: Any = layer.args[WEIGHTED[layer.target].weight]
    assert isinstance(found, fx.Node)
    return found


def _fixed_class() -> Any:
    from lightning_quant.backends.pt2e_classes import fixed_class  # who asks has torchao

    return fixed_class()


def stored(graph_module: fx.GraphModule, beside: str, layer: str, what: str, value: torch.Tensor) -> str:
    """Keep a tensor in the module that has the attribute ``beside``, whose name tells the place. Gives its own name."""
    owner = beside.rpartition(".")[0]
    name = f"corrected_{layer}_{what}"
    graph_module.get_submodule(owner).register_buffer(name, value.clone())
    return f"{owner}.{name}" if owner else name

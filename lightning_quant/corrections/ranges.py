"""The range of each activation whose rounding does least to what the layers that read it give.

A histogram alone minimises the error of the values themselves, as every value were worth the same. Which error matters
is said by the weights that read them: of several ranges, each layer is tried with its input rounded to it, as Banner et
al. 2019 (https://arxiv.org/abs/1810.05723) and Wu et al. 2020 (https://arxiv.org/abs/2004.09602, section 4) compare
percentiles, entropy and squared error for a whole network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lightning_quant import observers
from lightning_quant._torch_ao import is_observer, quiet
from lightning_quant.analysis.sqnr import Power
from lightning_quant.analysis.switches import rounded
from lightning_quant.backends import islands
from lightning_quant.backends.flow import Flow
from lightning_quant.backends.graph import check_seen
from lightning_quant.backends.graph import observers as observers_of
from lightning_quant.corrections.recording import Calls, changed, note
from lightning_quant.errors import ConfigError

#: What is tried of each histogram: how the range is searched, and the percentile. The last ones are minimum and
#: maximum, and shares of them: counts are of samples, which may lack the few values that are far away.
CANDIDATES: tuple[tuple[str, float], ...] = (
    ("histogram", 99.99), ("percentile", 99.9), ("percentile", 99.99), ("percentile", 99.999), ("entropy", 99.99),
    ("percentile", 100.0), ("share", 95.0), ("share", 90.0), ("share", 80.0),
)  # fmt: skip


def choose_ranges(prepared: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """A copy in which each activation that layers read has the range with the least error of what these give.

    The ranges come from what was counted in calibration; ``batches`` are what they are compared on, at the cost of a
    float pass for each candidate. Of activations that no layer with weights reads, such as the output of the model,
    it is the error of the values themselves.

    Args:
        prepared: From :func:`lightning_quant.prepare` for ``static``, by ``fx``, ``eager`` or ``pt2e``, with
            observers that count (``histogram``, ``percentile``, ``entropy``) and have seen data. Not changed.
        batches: Inputs, each a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        CalibrationError: An observer saw no data.
        ConfigError: No observer counts; there is no batch; the method or the backend is another one.
    """
    return changed(prepared, batches, _choose)


@dataclass
class _Tried:
    """One observer.

    Attributes:
        observer: In the graph that is changed.
        qparams: Candidate -> scale and zero point.
        errors: Candidate -> the errors of what layers give, each over the squares of what it gives in float.
    """

    observer: Any
    qparams: dict[tuple[str, float], tuple[float, int]]
    errors: dict[str, dict[tuple[str, float], Power]] = field(default_factory=dict)


def _choose(graph_module: fx.GraphModule, calls: Calls) -> None:
    check_seen(graph_module)
    trial = copy.deepcopy(graph_module).cpu()
    flow = Flow(trial)
    paths = {id(module): name for name, module in trial.named_modules()}  # of a shared one, its first name
    found = {
        name: _Tried(observer, _candidates(observer))
        for name, observer in observers_of(graph_module).items()
        if observers.is_histogram(observer)
    }
    if not found:
        raise ConfigError(
            "choose_ranges chooses among the ranges of histograms, and no observer of an activation counts. Prepare "
            "with QuantConfig(activation=TensorSpec(observer='histogram')), which is the default."
        )

    def tried(node: fx.Node | None) -> _Tried | None:
        path = _observer_of(trial, node)
        return None if path is None else found.get(paths[id(trial.get_submodule(path))])

    of_layer = {
        name: one
        for layer in flow.layers
        for name in (layer.nodes if layer.quantization is not None else ())
        if (one := tried(flow.data_of(flow.nodes[name]))) is not None
    }
    read = {id(one) for one in of_layer.values()}
    of_values = {
        node.name: one
        for node in trial.graph.nodes
        if _observes(trial, node) and (one := tried(node)) is not None and id(one) not in read
    }
    with torch.no_grad(), quiet():
        runner = _Trying(trial, flow, of_layer, of_values)
        for call in calls:
            runner.run(*copy.deepcopy(call))
    moved = 0
    for one in found.values():
        best = min(one.qparams, key=lambda candidate: _error(one, candidate))
        now = (one.observer.search, float(one.observer.percentile))
        if best != now and one.qparams[best] != _qparams(one.observer):
            one.observer.search, one.observer.percentile = best
            moved += 1
    note(graph_module, "choose_ranges", moved, "ranges of activations")


def _error(tried: _Tried, candidate: tuple[str, float]) -> float:
    powers = [errors[candidate] for errors in tried.errors.values()]
    return sum(power.noise / power.signal for power in powers if power.signal)


def _candidates(observer: Any) -> dict[tuple[str, float], tuple[float, int]]:
    """Candidate -> scale and zero point, the present one first: of equal ones it stays."""
    found = {}
    for candidate in ((observer.search, float(observer.percentile)), *CANDIDATES):
        other = copy.deepcopy(observer).cpu()
        other.search, other.percentile = candidate
        found[candidate] = _qparams(other)
    return found


def _qparams(observer: Any) -> tuple[float, int]:
    with quiet():
        scale, zero_point = observer.calculate_qparams()
    return float(scale), int(zero_point)


def _observes(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    """Name of the observer that sees what a node gives, if the node brings one along."""
    if node.op != "call_module":
        return None
    if is_observer(graph_module.get_submodule(str(node.target))):
        return str(node.target)
    names = {name for name, _ in graph_module.get_submodule(str(node.target)).named_modules()}
    inner = ("activation_post_process", "functional.activation_post_process")
    return next((f"{node.target}.{name}" for name in inner if name in names), None)


def _observer_of(graph_module: fx.GraphModule, node: fx.Node | None) -> str | None:
    """Name of the observer whose range a node's value is rounded to; None: it has none of its own."""
    while isinstance(node, fx.Node):
        path = _observes(graph_module, node)
        if path is not None or not islands.moves(graph_module, node) or not node.args:
            return path
        before: Any = node.args[0]
        node = before if isinstance(before, fx.Node) else None
    return None


class _Trying(fx.Interpreter):
    """Runs a graph in float; at each layer, its input is rounded to each candidate as well.

    Args:
        graph_module: Prepared.
        flow: Of it.
        of_layer: Node of a layer -> the observer of what it reads.
        of_values: Node -> the observer of what it gives, which no layer reads.
    """

    def __init__(
        self, graph_module: fx.GraphModule, flow: Flow, of_layer: dict[str, _Tried], of_values: dict[str, _Tried]
    ) -> None:
        super().__init__(graph_module)
        self.flow, self.of_layer, self.of_values = flow, of_layer, of_values

    def run_node(self, n: fx.Node) -> Any:
        """As torch's."""
        value = super().run_node(n)
        if n.name in self.of_values:
            self._try(n, self.of_values[n.name], value, value, lambda rounded: rounded)
        data = self.flow.data_of(n) if n.name in self.of_layer else None
        if data is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            place = n.args.index(data)

            def run(given: torch.Tensor) -> Any:
                other: Any = (*args[:place], given, *args[place + 1 :])
                return getattr(self, n.op)(n.target, other, kwargs)

            self._try(n, self.of_layer[n.name], args[place], value, run)
        return value

    def _try(self, n: fx.Node, tried: _Tried, given: Any, expected: Any, run: Callable[[torch.Tensor], Any]) -> None:
        observer = tried.observer
        errors = tried.errors.setdefault(n.name, {candidate: Power() for candidate in tried.qparams})
        known: dict[tuple[float, int], Any] = {}
        for candidate, qparams in tried.qparams.items():
            if qparams not in known:
                known[qparams] = run(rounded(given, *qparams, observer.quant_min, observer.quant_max))
            errors[candidate].add(expected, known[qparams])

"""What would be done with each layer, found by doing it on one batch; as YAML that is a QuantConfig, to be edited."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_quant._roots import ROOTS, detached_modules
from lightning_quant._torch_ao import quiet
from lightning_quant.analysis.coverage import NO_KERNEL, Coverage, LayerRow, coverage
from lightning_quant.backends import as_call, capture_targets
from lightning_quant.backends.graph import info
from lightning_quant.capture import LEFT_BY_SKIP, Capture, record_calls, weight_layers
from lightning_quant.config import LayerConfig, Method, QuantConfig, TensorSpec, check_method, plain
from lightning_quant.errors import ConfigError
from lightning_quant.evaluate import copy_of, evaluate
from lightning_quant.figures import as_users_know_it, float_layers, fused_groups
from lightning_quant.from_checkpoint import validation_data_of
from lightning_quant.inputs import Sample, isolated_rng, sample_without_trainer
from lightning_quant.layers import LEFT_BY_LAYERS, no_kernel
from lightning_quant.parts import Graphs, Quantized, convert_module
from lightning_quant.pipeline import prepare_graphs
from lightning_quant.qconfig import EMBEDDINGS, QUANTIZABLE, config_of_layer, in_words


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One layer with weights.

    Attributes:
        name: Of the module.
        type: Its class.
        int8: Whether it would run in int8.
        macs: Its multiply-accumulates for the batch.
        runs: Whether the batch runs it.
        group: The modules that run as one kernel with it, itself among them, in the order of the data.
        activation: How what it gives is quantized; None: in float, or with ranges taken at run time.
        weight: How its weight is quantized; None: it stays in float, or is an embedding, with a scale for each row.
        reason: Why it stays in float, or which part of it does.
        entry: The entry of ``QuantConfig.layers`` that speaks of it.
    """

    name: str
    type: str
    int8: bool
    macs: int
    runs: bool
    group: tuple[str, ...] = ()
    activation: TensorSpec | None = None
    weight: TensorSpec | None = None
    reason: str = ""
    entry: LayerConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a method would do with a model.

    Attributes:
        model: The class of the model.
        method: dynamic, static or qat.
        config: As it was given.
        resolved: The same with the engine and the bits of this machine.
        layers: Every layer with weights, in the order of the model.
        functions: Products with stored weights that are functions, and no layers of their own.
        source: What the batch was.
    """

    model: str
    method: Method
    config: QuantConfig
    resolved: QuantConfig
    layers: tuple[PlannedLayer, ...]
    functions: tuple[LayerRow, ...]
    source: str

    @property
    def coverage(self) -> float:
        """The share of the multiply-accumulates of layers with weights that would run in int8, 0 to 1."""
        int8 = sum(macs for macs, is_int8 in self._macs() if is_int8)
        return int8 / self._total() if self._total() else 0.0

    def _macs(self) -> list[tuple[int, bool]]:
        """(multiply-accumulates, in int8) of each layer and function."""
        return [(x.macs, x.int8) for x in self.layers] + [(x.macs, x.int8) for x in self.functions]

    def _total(self) -> int:
        return sum(macs for macs, _ in self._macs())

    @property
    def edited(self) -> QuantConfig:
        """The config with an entry for each layer, by its name: what :meth:`to_yaml` writes."""
        entries = [entry for layer in self.layers if (entry := _entry(layer))]
        return replace(self.config, layers=(*self._others(), *entries))

    def _others(self) -> list[LayerConfig]:
        """Entries that speak of more than one layer, or of one that has no entry of the plan."""
        own = {layer.name for layer in self.layers if _entry(layer)}
        return [entry for entry in self.config.layers if entry.name not in own]

    def to_yaml(self) -> str:
        """A QuantConfig, with a remark above each layer. ``dtype: int8`` may be changed to ``dtype: float``, and back.

        Read it with :func:`lightning_quant.recipes.load`, or give its file as ``config`` on a command line.
        """
        settings = {name: value for name, value in plain(self.config).items() if name != "layers"}
        lines = [f"# {text}" for text in self._head()]
        lines += yaml.safe_dump(settings, sort_keys=False).splitlines()
        items = [_item(entry) for entry in self._others()]
        for layer in self.layers:
            entry = _entry(layer)
            items.append([f"# {text}" for text in self._remarks(layer)] + ([] if entry is None else _item(entry)))
        written = [line for item in items for line in item]
        has_entry = any(not line.startswith("#") for line in written)
        lines += ["layers:" if has_entry else "layers: []", *written]
        for row in self.functions:
            state = "int8" if row.int8 else f"float: {row.reason}"
            lines.append(f"# in the forward of {row.name}, by a function: {row.op}, {self._share(row.macs)}, {state}")
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path) -> None:
        """Write :meth:`to_yaml` into a file.

        Args:
            path: Of the file; its folder is made.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yaml(), encoding="utf8")

    def _head(self) -> list[str]:
        int8 = sum(layer.int8 for layer in self.layers)
        bits = "7" if self.resolved.reduce_range else "8"
        return [
            f"Plan for {self.model}: method {self.method}, backend {self.resolved.backend}, engine "
            f"{self.resolved.engine}, weights of {bits} bits on this machine.",
            f"{int8} of {len(self.layers)} layers in int8, {self.coverage:.1%} of {_shown_macs(self._total())} "
            f"multiply-accumulates ({self.source}).",
            "This file is a QuantConfig. Edit it, e.g. one dtype from int8 to float, and give it as config:",
            "  --quantize.config=FILE of QuantCLI, lightning-quant ptq --config=FILE, recipes.load(FILE) in Python.",
        ]

    def _share(self, macs: int) -> str:
        total = self._total()
        return f"{_shown_macs(macs)} multiply-accumulates ({macs / total if total else 0:.1%})"

    def _remarks(self, layer: PlannedLayer) -> list[str]:
        group = f", one kernel: {' + '.join(layer.group)}" if layer.group else ""
        remarks = [f"{layer.name}: {layer.type}, {self._share(layer.macs)}{group}"]
        if not layer.int8:
            return [*remarks, f"  in float: {layer.reason}"]
        weight = "8 bits, a scale and a zero point for each row" if layer.weight is None else _shown(layer.weight)
        given = "ranges at run time" if layer.activation is None else _shown(layer.activation)
        remarks.append(f"  weight: {weight}" + ("" if layer.weight is None else f"; output: {given}"))
        return remarks + ([f"  {layer.reason}"] if layer.reason else [])


def _shown_macs(macs: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if macs >= size:
            return f"{macs / size:.2f} {unit}"
    return str(macs)


def _shown(spec: TensorSpec) -> str:
    percentile = f" {spec.percentile:g}" if spec.observer == "percentile" else ""
    learned = "" if spec.fake_quantize == "auto" else f", fake quantize {spec.fake_quantize}"
    return f"{spec.dtype} {spec.qscheme}, {spec.observer}{percentile}{learned}"


def _entry(layer: PlannedLayer) -> LayerConfig | None:
    """What the file says of a layer: a choice. None: there is none, or another entry says it in words of its own."""
    entry = layer.entry
    chosen = layer.int8 or layer.reason in (LEFT_BY_LAYERS, LEFT_BY_SKIP)
    if not chosen or not layer.runs or (entry is not None and (entry.keep or entry.quantized)):
        return None
    name = escape(layer.name)
    if not layer.int8:
        return LayerConfig(name=name, dtype="float")
    return replace(entry or LayerConfig(name=name, dtype="int8"), name=name, type=None, dtype="int8")


def _item(entry: LayerConfig) -> list[str]:
    """One entry of the list, with what differs from the defaults."""
    usual = {"activation": TensorSpec(), "weight": TensorSpec()}
    values: dict[str, Any] = {}
    for name in ("name", "type", "dtype", "activation", "weight", "keep", "observed", "quantized"):
        value = getattr(entry, name)
        if isinstance(value, TensorSpec):
            own = vars(value)
            values[name] = {key: own[key] for key in own if own[key] != getattr(usual[name], key)}
        elif value:
            values[name] = value
    return yaml.safe_dump([values], sort_keys=False).splitlines()


def plan(
    module: Any,
    config: QuantConfig | None = None,
    method: Method = "static",
    *,
    example_inputs: Any = None,
    datamodule: Any = None,
) -> Plan:
    """What ``method`` would do with ``module``. Nothing is changed, nothing is written.

    It is done on a copy, with one batch: captured, prepared, shown the batch, converted and run, so that the plan says
    what this machine does, and not what a table promises.

    Args:
        module: A LightningModule, or any ``nn.Module`` with ``example_inputs``.
        config: Default: ``QuantConfig()``.
        method: dynamic, static or qat.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments of ``forward``. None:
            the first validation batch of ``datamodule``, else of the module, else ``example_input_array``.
        datamodule: A LightningDataModule.

    Raises:
        ConfigError: The backend cannot do the method, or an entry of the config matches nothing.
        CaptureError: There is no input, or nothing that can be quantized.

    >>> found = plan(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), example_inputs=torch.randn(2, 4))
    >>> [(layer.name, layer.int8, layer.macs, layer.group) for layer in found.layers]
    [('0', True, 64, ('0', '1'))]
    """
    config = config or QuantConfig()
    check_method(config, method)
    is_lightning = isinstance(module, tuple(root.LightningModule for root in ROOTS))
    with isolated_rng(), torch.device("cpu"):
        if example_inputs is not None:
            call = as_call(example_inputs)
            recordings = record_calls(module, lambda twin: twin(*call.args, **call.keywords))
            sample = Sample(recordings, "the example inputs", None)
        elif is_lightning:
            sample = sample_without_trainer(module, validation_data_of(module, datamodule), None)
        else:
            raise ConfigError(
                f"plan({type(module).__name__}): give example_inputs: only a LightningModule brings data."
            )
        captured = capture_targets(module, sample.recordings, config, method, prefer_children=is_lightning)
        return plan_of(module, captured, sample, config, method)


@detached_modules()
def plan_of(module: Any, captured: Capture, sample: Sample, config: QuantConfig, method: Method) -> Plan:
    """As :func:`plan`, for a module that is captured already.

    Args:
        module: Not changed.
        captured: From :func:`lightning_quant.pipeline.capture`.
        sample: The batch that it was captured with.
        config: As the user gave it.
        method: dynamic, static or qat.
    """
    twin = copy_of(module)
    graphs = prepare_graphs(twin, captured, config, method)
    _show(graphs, captured)
    quantized = convert_module(twin, graphs)
    known = info(next(iter(graphs.values())))
    run = _runner(sample, captured)
    covered = as_users_know_it(_covered(quantized.module, run), quantized, captured)
    in_float = _covered(quantized.float_module, run)
    names = [name for name in weight_layers(quantized.float_module) if name]
    floats = float_layers(quantized, captured, covered)
    beside = [
        row for row in in_float.rows if row.weighted and row.macs and not any(_within(row.name, n) for n in names)
    ]
    reasons = [floats.get(row.name or "forward", "") for row in beside]
    resolved = replace(config, engine=known.config.engine, reduce_range=known.config.reduce_range)
    ran = {name: [row for row in in_float.rows if row.weighted and _within(row.name, name)] for name in names}
    return Plan(
        model=type(module).__name__,
        method=method,
        config=config,
        resolved=resolved,
        layers=tuple(_layer(name, quantized, captured, floats, ran[name], covered, resolved, method) for name in names),
        functions=tuple(
            replace(row, name=row.name or "forward", int8=not why, reason=why)
            for row, why in zip(beside, reasons, strict=True)
        ),
        source="one batch of the validation data" if sample.data is not None else sample.source,
    )


def _show(graphs: Graphs, captured: Capture) -> None:
    """Let the observers of each graph see one call, so that there are ranges."""
    for target in captured.targets:
        graph = graphs[target.name].eval()
        data = info(graph).interface.flatten(target.call.args, target.call.keywords)
        with torch.no_grad(), quiet():
            graph(*copy.deepcopy(data))


def _runner(sample: Sample, captured: Capture) -> Callable[[Any], object]:
    """The batch, for a module; where no step and no forward can be run, the targets alone."""
    data, recorded = sample.data, sample.recordings.get("")
    if data is not None:
        return lambda module: evaluate(module, data)
    if recorded is not None:
        call = recorded.call
        return lambda module: module(*copy.deepcopy(call.args), **copy.deepcopy(call.keywords))

    def run(module: Any) -> None:
        for target in captured.targets:
            part = module.get_submodule(target.name)
            part(*copy.deepcopy(target.call.args), **copy.deepcopy(target.call.keywords))

    return run


def _covered(module: Any, run: Callable[[Any], object]) -> Coverage:
    twin = copy.deepcopy(module)
    return coverage(twin, (), run=lambda: run(twin))


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _layer(
    name: str,
    quantized: Quantized,
    captured: Capture,
    floats: dict[str, str],
    ran: list[LayerRow],
    covered: Coverage,
    resolved: QuantConfig,
    method: Method,
) -> PlannedLayer:
    kind = type(quantized.float_module.get_submodule(name))
    own = {part: why for part, why in floats.items() if _within(part, name)}
    partly = any(row.int8 and _within(row.name, name) for row in covered.rows)
    entry = captured.layers.get(name)
    found = PlannedLayer(
        name=name,
        type=kind.__name__,
        int8=bool(ran) and (not own or (partly and name not in own)),
        macs=sum(row.macs for row in ran),
        runs=bool(ran),
        group=next((group for group in fused_groups(quantized) if name in group), ()),
        reason="; ".join(f"{part} stays in float: {why}" for part, why in own.items()),
        entry=entry,
    )
    if not ran:
        return replace(found, reason=own.get(name, "the batch does not run it"))
    if not issubclass(kind, QUANTIZABLE[method]) and own.get(name, NO_KERNEL) == NO_KERNEL:
        return replace(found, int8=False, reason=no_kernel(kind, method))
    if not found.int8:
        return replace(found, reason=own.get(name) or next(iter(own.values())))
    if issubclass(kind, EMBEDDINGS):
        return found
    layers = () if entry is None else (entry,)
    activation, weight = in_words(config_of_layer(replace(resolved, layers=layers), name), method, kind)
    return replace(found, activation=activation, weight=weight)

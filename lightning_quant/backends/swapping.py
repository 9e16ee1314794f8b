"""A user's own modules in the places of layers: one while ranges are observed, another one in the int8 model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn

from lightning_quant.backends.rewriting import Opaque
from lightning_quant.backends.tracing import LAYER, Traced
from lightning_quant.config import LayerConfig, QuantConfig
from lightning_quant.custom import load_class
from lightning_quant.errors import ConfigError

KEPT_WHOLE = "kept whole by QuantConfig(layers=...)"


def whole(config: QuantConfig) -> dict[str, str]:
    """Submodules of a target that a trace does not go into, as it names them -> why."""
    reasons = {}
    for layer in config.layers:
        name = "" if layer.name in (None, LAYER) else str(layer.name)
        if layer.keep:
            reasons[name] = KEPT_WHOLE
        elif layer.quantized:
            reasons[name] = f"it is a {layer.quantized} in the int8 model"
    return reasons


def with_observed(traced: Traced, config: QuantConfig, *, training: bool) -> Traced:
    """Let the module that observes stand for each layer that is exchanged.

    Args:
        traced: Its graph is changed in place.
        config: Of the target, with the names of its submodules.
        training: The module that observes has to train the Parameters of the layer.

    Raises:
        ConfigError: A class lacks the method that makes it from the layer, or has Parameters of its own in training.
    """
    graph_module = traced.graph_module
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    swapped: dict[str, str] = {}
    for layer in config.layers:
        if not layer.quantized or layer.name not in called:
            continue
        module = graph_module.get_submodule(layer.name)
        observed = _observed(layer, module)
        if training:
            own = {id(p) for p in module.parameters() if p.requires_grad}
            missing = own - {id(p) for p in observed.parameters()}
            if missing:
                raise ConfigError(
                    f"{layer.observed}.from_float({layer.name}) has {len(missing)} Parameters less than the layer: "
                    "training would not reach them. Let from_float use the Parameter objects of what it is given."
                )
        # no pattern of torch.ao matches it, whatever the class derives from
        graph_module.add_submodule(layer.name, Opaque(observed))
        swapped[layer.name] = layer.quantized
    origins = {f"{name}.module": name for name in swapped}
    kept = {name: reason for name, reason in traced.kept.items() if name not in swapped}
    return replace(traced, kept=kept, origins=traced.origins | origins, swapped=swapped)


def _observed(layer: LayerConfig, module: nn.Module) -> nn.Module:
    if layer.observed is None:
        return module
    kind = load_class(layer.observed, "LayerConfig(observed=...)")
    observed = _made(kind, ("from_float",), module, f"LayerConfig(observed={layer.observed!r})")
    return observed.train(module.training)


def put_quantized(graph_module: fx.GraphModule, swapped: dict[str, str]) -> None:
    """Exchange the modules that observed for those of the int8 model. ``graph_module`` is changed in place.

    Raises:
        ConfigError: A class has neither ``from_observed`` nor ``from_float``.
    """
    for name, path in swapped.items():
        opaque: Any = graph_module.get_submodule(name)
        kind = load_class(path, "LayerConfig(quantized=...)")
        made = _made(kind, ("from_observed", "from_float"), opaque.module, f"LayerConfig(quantized={path!r})")
        opaque.module = made.eval()


def _made(kind: Any, methods: tuple[str, ...], module: nn.Module, setting: str) -> nn.Module:
    method = next((getattr(kind, name) for name in methods if hasattr(kind, name)), None)
    if method is None:
        raise ConfigError(f"{setting}: it has no class method {' or '.join(methods)} that makes it from a module.")
    made = method(module)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{setting}: its {methods[0]} gave a {type(made).__name__}, not a module.")
    return made

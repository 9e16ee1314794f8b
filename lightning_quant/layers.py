"""Which entry of ``QuantConfig.layers`` speaks of which layer: the nearest one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_quant.capture import LEFT_BY_SKIP, matching
from lightning_quant.config import LayerConfig, Method, QuantConfig, near
from lightning_quant.custom import load_class
from lightning_quant.errors import ConfigError
from lightning_quant.qconfig import EMBEDDINGS, QUANTIZABLE, WEIGHTED


def nearest(entries: tuple[LayerConfig, ...], model: nn.Module) -> dict[str, LayerConfig]:
    """The entry that counts for each submodule, with the submodule's name as ``name`` and no ``type``.

    An entry with ``keep`` or ``quantized`` speaks of the submodules that it matches, any other one also of what is
    inside them.

    Args:
        entries: ``QuantConfig.layers``.
        model: Its submodules are looked at.

    Raises:
        ConfigError: An entry matches nothing.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    matched = {
        name: [number for number, entry in enumerate(entries) if _matches(entry, name, module)]
        for name, module in modules.items()
    }
    for number, entry in enumerate(entries):
        if not any(number in numbers for numbers in matched.values()):
            hint = near(entry.name, modules) if entry.name else near_type(entry, modules)
            raise ConfigError(f"LayerConfig(name={entry.name!r}, type={entry.type!r}) matches no submodule. {hint}")
    found: dict[str, LayerConfig] = {}
    for name in modules:
        counts = _nearest(entries, matched, name)
        if counts is None:
            continue
        entry = entries[counts]
        if counts in matched[name] or not (entry.keep or entry.quantized):
            found[name] = replace(entry, name=name, type=None)
    return found


def _nearest(entries: tuple[LayerConfig, ...], matched: Mapping[str, list[int]], name: str) -> int | None:
    """The number of the entry that counts for the module ``name``."""
    numbers = next((matched[place] for place in [name, *_parents(name)] if matched.get(place)), None)
    return None if not numbers else _first(entries, numbers)


LEFT_BY_LAYERS = "left float by 'layers'"


def left_float(config: QuantConfig, model: nn.Module) -> dict[str, str]:
    """The submodules that ``skip`` and ``layers`` leave in float -> which of the two.

    ``skip`` gives way to an entry of ``layers`` that says ``dtype="int8"`` and is nearer. A module that has such a one
    inside is not among them: its other parts are.

    Args:
        config: Its patterns and entries are looked for in ``model``.
        model: Its submodules are looked at.

    Raises:
        ConfigError: A pattern or an entry matches nothing.
    """
    by_layers = {name for name, entry in nearest(config.layers, model).items() if entry.dtype == "float"}
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    matching(config.skip, modules, "skip")
    skips = tuple(LayerConfig(name=pattern, dtype="float") for pattern in config.skip)
    rivals = (*skips, *(entry for entry in config.layers if entry.dtype == "int8"))
    matched = {
        name: [number for number, entry in enumerate(rivals) if _matches(entry, name, module)]
        for name, module in modules.items()
    }
    by_skip = {
        name for name in modules if (number := _nearest(rivals, matched, name)) is not None and number < len(skips)
    }
    left = {**dict.fromkeys(by_layers, LEFT_BY_LAYERS), **dict.fromkeys(by_skip, LEFT_BY_SKIP)}
    around_int8 = {parent for name in modules if name not in left for parent in _parents(name)}
    return {name: reason for name, reason in left.items() if name not in around_int8}


def no_kernel(kind: type[nn.Module], method: Method) -> str:
    """Why a layer of a type that is not ``QUANTIZABLE`` stays in float."""
    return f"method {method!r} has no int8 kernel for a {kind.__name__}"


def check_int8(config: QuantConfig, float_layers: Mapping[str, str], model: nn.Module, method: Method) -> None:
    """Refuse entries that say ``dtype="int8"`` of a layer, by its name, which cannot be.

    Args:
        config: As the user gave it.
        float_layers: Layer that stays float -> why.
        model: Where the layers are.
        method: dynamic, static or qat.

    Raises:
        ConfigError: There is one.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in config.layers:
        name = entry.name or ""
        if entry.dtype != "int8" or name not in modules:
            continue
        kind, reason = type(modules[name]), float_layers.get(name)
        if reason is None and isinstance(modules[name], WEIGHTED) and not issubclass(kind, QUANTIZABLE[method]):
            reason = no_kernel(kind, method)
        if reason is not None:
            raise ConfigError(
                f"LayerConfig(name={name!r}, dtype='int8'): it stays in float: {reason}. Leave out this entry, or "
                "give dtype='float'."
            )


def check_bits(config: QuantConfig, model: nn.Module) -> None:
    """Refuse entries that give embeddings other than 8 bits.

    Args:
        config: As the user gave it.
        model: Where the layers are.

    Raises:
        ConfigError: There is one.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in config.layers:
        if entry.weight is None or entry.weight.bits == 8:
            continue
        kind = load_class(entry.type, "LayerConfig(type=...)") if entry.type else type(modules.get(entry.name or ""))
        if issubclass(kind, EMBEDDINGS):
            raise ConfigError(
                f"LayerConfig(name={entry.name!r}, type={entry.type!r}, weight.bits={entry.weight.bits}): the rows of "
                "embeddings have 8 bits, for which alone there are kernels. Leave this entry out."
            )


def _parents(name: str) -> list[str]:
    """The modules around ``name``, the nearest one first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _matches(entry: LayerConfig, name: str, module: nn.Module) -> bool:
    if entry.name is not None and not fnmatchcase(name, entry.name):
        return False
    return entry.type is None or isinstance(module, load_class(entry.type, "LayerConfig(type=...)"))


def _first(entries: tuple[LayerConfig, ...], numbers: list[int]) -> int:
    """Of entries that match one module, the one that says most of it."""

    def rank(number: int) -> tuple[bool, bool, int, int]:
        name = entries[number].name or ""
        letters = sum(c not in "*?[]" for c in name)
        return bool(name), letters == len(name), letters, number

    return max(numbers, key=rank)


def near_type(entry: LayerConfig, modules: Mapping[str, nn.Module]) -> str:
    """The types that there are, for an entry that matches none."""
    known = {f"{type(module).__module__}.{type(module).__qualname__}" for module in modules.values()}
    return near(str(entry.type), known)


def relative(layers: Mapping[str, LayerConfig], target: str, own: str) -> tuple[LayerConfig, ...]:
    """The entries for a target and what is inside it, as the target itself would write them.

    Args:
        layers: From :func:`nearest`.
        target: Its name; ``""`` for the whole model.
        own: The name that stands for the target itself.
    """
    prefix = f"{target}." if target else ""
    inside = [replace(e, name=name.removeprefix(prefix)) for name, e in layers.items() if name.startswith(prefix)]
    itself = [replace(layers[target], name=own)] if target in layers else []
    return (*itself, *inside)

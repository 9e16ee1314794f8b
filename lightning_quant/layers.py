"""Which entry of ``QuantConfig.layers`` speaks of which layer: the nearest one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_quant.config import LayerConfig, near
from lightning_quant.custom import load_class
from lightning_quant.errors import ConfigError


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
        around = [name, *_parents(name)]
        numbers = next((matched[place] for place in around if matched.get(place)), None)
        if not numbers:
            continue
        number = _first(entries, numbers)
        entry = entries[number]
        if number in matched[name] or not (entry.keep or entry.quantized):
            found[name] = replace(entry, name=name, type=None)
    return found


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

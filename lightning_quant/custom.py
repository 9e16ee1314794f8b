"""A user's own classes, named by their import path so that they can be written in YAML."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_quant.errors import ConfigError


def path_of(value: object, setting: str) -> str:
    """``"package.module.Class"`` of a class, or that text itself.

    Args:
        value: A class, or its import path.
        setting: What it was given for, for messages: ``TensorSpec(observer=...)``.

    Raises:
        ConfigError: It is neither, or a class that cannot be imported by its name.

    >>> path_of(dict, "an example")
    'builtins.dict'
    """
    if isinstance(value, str):
        return str(value)  # of a command line it may be a class of text
    if not isinstance(value, type):
        raise ConfigError(f"{setting}: {value!r} is no class. Give a class, or its import path as a text.")
    path = f"{value.__module__}.{value.__qualname__}"
    if "<locals>" in path or value.__module__ == "__main__":
        raise ConfigError(
            f"{setting}: {value.__qualname__} cannot be imported by its name, so that checkpoints and files could not "
            "say what they were made with. Define it in a module, outside of any function."
        )
    return path


def load_class(path: str, setting: str) -> type[Any]:
    """The class at an import path.

    Raises:
        ConfigError: There is none.
    """
    module_name, _, name = path.rpartition(".")
    try:
        found: Any = importlib.import_module(module_name) if module_name else None
        found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting}: {path!r} cannot be imported: {error}. Give 'package.module.Class', with the package "
            "installed or on the Python path."
        ) from error
    if not isinstance(found, type):
        raise ConfigError(f"{setting}: {path!r} is a {type(found).__name__}, not a class.")
    return found

"""Where files come from: what they were made with, and sums by which they are known again."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

#: Packages whose version decides what a file computes, or how fast it is.
_PACKAGES = (
    "lightning-quant", "pytorch-lightning", "lightning", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino",
)  # fmt: skip
_CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksums(paths: Iterable[Path]) -> dict[str, str]:
    """Name of each file -> its SHA-256."""
    return {path.name: sha256(path) for path in paths}


def versions() -> dict[str, str]:
    """Package -> its version, of those that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as plain values: tuples as lists.

    >>> from lightning_quant import QuantConfig
    >>> changed(QuantConfig(backend="eager", skip=("head",)))
    {'backend': 'eager', 'skip': ['head']}
    """
    found = {}
    for part in fields(settings):
        value = getattr(settings, part.name)
        default = _default(part)
        if value == default:
            continue
        same_kind = is_dataclass(value) and type(value) is type(default)
        found[part.name] = changed(value) if same_kind else _plain(value)
    return found


def _default(part: Field[Any]) -> Any:
    return part.default_factory() if part.default_factory is not MISSING else part.default


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(part) for name, part in asdict(value).items() if part is not None}
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def made_by(class_path: str, **arguments: Any) -> dict[str, Any]:
    """A callback as LightningCLI writes it: its class, and the arguments that differ from their defaults.

    Args:
        class_path: Where the class can be imported from.
        arguments: Name -> value, or -> ``(value, default)`` where the default is no dataclass's own.
    """
    init_args: dict[str, Any] = {}
    for name, (value, default) in arguments.items():
        if is_dataclass(value) and not isinstance(value, type):
            if found := changed(value):
                init_args[name] = found
        elif value != default:
            init_args[name] = _plain(value)
    return {"class_path": class_path, **({"init_args": init_args} if init_args else {})}


def as_yaml(callback: dict[str, Any]) -> str:
    """What :func:`made_by` gave as a file for LightningCLI's ``--config``."""
    text: str = yaml.safe_dump({"trainer": {"callbacks": [callback]}}, sort_keys=False, width=100)
    return text

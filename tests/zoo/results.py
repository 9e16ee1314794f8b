"""What the tests of the zoo measured, kept for its table: JSON files in the folder that ZOO_RESULTS names."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from architectures import Architecture

FOLDER = "ZOO_RESULTS"

Figures = TypeVar("Figures")


def keep(figures: Any) -> None:
    """Write a dataclass with the field ``entry``, an architecture, if there is a folder for it."""
    if folder := os.environ.get(FOLDER):
        values = {f.name: getattr(figures, f.name) for f in dataclasses.fields(figures) if f.name != "entry"}
        path = _path(folder, type(figures), figures.entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, default=str), encoding="utf8")


def kept(kind: type[Figures], entry: Architecture) -> Figures | None:
    """What was written of ``entry``; None: nothing."""
    folder = os.environ.get(FOLDER)
    if not folder or not _path(folder, kind, entry).exists():
        return None
    return kind(entry=entry, **json.loads(_path(folder, kind, entry).read_text(encoding="utf8")))


def _path(folder: str, kind: type, entry: Architecture) -> Path:
    return Path(folder) / f"{kind.__name__.lower()}_{entry.name}.json"

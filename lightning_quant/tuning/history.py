"""What a search can leave in float, and every value that it has found, in a file: a killed search goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant.analysis.sensitivity import LayerSensitivity
from lightning_quant.team import ALONE, Team

log = logging.getLogger(__name__)

#: In the folder of the files.
STATE = "search.json"
#: Layers without multiply-accumulates (embeddings) count as if they had this share of them.
_LEAST_SHARE = 1e-3
#: A reference that differs by more is that of other data.
_SAME = 1e-3


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What can be left in float alone.

    Attributes:
        name: What ``QuantConfig(skip=...)`` names.
        layers: Names of the layers that this leaves in float.
        macs: Their multiply-accumulates.
        noise: Of the output over its signal, where only these layers are quantized: the sum of theirs.
    """

    name: str
    layers: tuple[str, ...]
    macs: int
    noise: float


def candidates(layers: Iterable[LayerSensitivity]) -> tuple[Candidate, ...]:
    """The submodules that can be left in float, those first that add the most noise for each multiply-accumulate."""
    rows = tuple(layers)
    least = max(1.0, _LEAST_SHARE * sum(row.macs for row in rows))
    found = []
    for name in dict.fromkeys(row.skip for row in rows if row.skip):
        inside = [row for row in rows if row.skip == name or row.skip.startswith(f"{name}.")]
        noise = sum(10 ** (-row.sqnr_only_db / 10) if row.sqnr_only_db > -math.inf else 1e30 for row in inside)
        macs = sum(row.macs for row in inside)
        found.append(Candidate(name=name, layers=tuple(row.name for row in inside), macs=macs, noise=noise))
    return tuple(sorted(found, key=lambda c: -c.noise / max(c.macs, least)))


@dataclass
class History:
    """Every value that was found, in a file.

    Attributes:
        path: Of the file.
        fingerprint: Of what the values are of: a file with another one is not read.
        reference: The metric in float.
        team: The processes that search together; rank 0 reads and writes.
        entries: ``(kind, names)`` -> value.
        ordered: The candidates, in their order.
        seconds: That earlier runs have spent.
    """

    path: Path
    fingerprint: str
    reference: float
    team: Team = ALONE
    entries: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)
    ordered: tuple[Candidate, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        known = self.team.by_first(self._read)
        if known is None:
            return
        self.entries = {(e["kind"], tuple(e["left_float"])): float(e["value"]) for e in known["evaluations"]}
        self.ordered = tuple(Candidate(**{**c, "layers": tuple(c["layers"])}) for c in known["candidates"])
        self.seconds = float(known["seconds"])

    def _read(self) -> Any:
        try:
            known = json.loads(self.path.read_text(encoding="utf8"))
        except (OSError, json.JSONDecodeError):
            return None
        same = isinstance(known, dict) and known.get("fingerprint") == self.fingerprint
        if not same or abs(known["reference"] - self.reference) > _SAME * max(abs(self.reference), _SAME):
            log.info("%s is of another search, and is begun anew.", self.path)
            return None
        return known

    def spent_s(self) -> float:
        """Of all runs."""
        return self.seconds + time.monotonic() - self._began

    def keep(self, key: tuple[str, tuple[str, ...]], value: float) -> None:
        """Add a value."""
        self.entries[key] = value
        self.write()

    def write(self) -> None:
        """Write the file, on rank 0."""
        if self.team.is_first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(json.dumps(self._plain(), indent=1) + "\n", encoding="utf8")
            partial.replace(self.path)

    def _plain(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "reference": self.reference,
            "seconds": self.spent_s(),
            "candidates": [vars(c) for c in self.ordered],
            "evaluations": [
                {"kind": kind, "left_float": list(names), "value": value if math.isfinite(value) else str(value)}
                for (kind, names), value in self.entries.items()
            ],
        }


def fingerprint(module: nn.Module, *settings: object) -> str:
    """Of the weights and buffers of a module, and of settings by their ``repr``."""
    found = hashlib.sha256()
    for value in settings:
        found.update(repr(value).encode())
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        if hasattr(tensor, "detach"):
            found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            values = tensor.detach().cpu().contiguous().flatten()
            found.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return found.hexdigest()

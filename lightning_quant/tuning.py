"""Which layers stay in float so that a metric drops by no more than a bound: the search, whoever evaluates.

Layers are put in float in the order of the noise that they add for each multiply-accumulate, as many as are needed by
bisection; then those are put back into int8 that were not needed. Every value that was found is written to a file, so
that a search that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_quant.analysis.sensitivity import LayerSensitivity
from lightning_quant.config import QuantConfig
from lightning_quant.errors import ConfigError
from lightning_quant.team import ALONE, Team

log = logging.getLogger(__name__)

#: In the folder of the files.
STATE = "search.json"
#: How a set of layers was evaluated: fake quantized, or as the int8 model that is delivered.
Kind = Literal["simulated", "int8"]
_WORDS: dict[str, tuple[str, ...]] = {
    "min": ("loss", "err", "error", "mse", "mae", "rmse", "mape", "perplexity", "ppl", "wer", "cer", "nll", "fid", "lpips"),
    "max": ("acc", "accuracy", "f1", "auc", "auroc", "map", "ap", "iou", "miou", "dice", "precision", "recall", "psnr",
            "ssim", "r2", "bleu", "kappa", "corr", "top1", "top5"),
}  # fmt: skip
#: Layers without multiply-accumulates (embeddings) count as if they had this share of them.
_LEAST_SHARE = 1e-3
#: A reference that differs by more is that of other data.
_SAME = 1e-3


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What has to hold of a metric, and what may be spent on it.

    Attributes:
        monitor: Name of a metric that the module logs in validation.
        max_drop: How much worse than in float it may be: at least 0.
        mode: ``max`` if more is better, ``min`` if less is; None: by the words in its name.
        relative: ``max_drop`` is a share of the float value.
        max_evaluations: How many sets of layers are evaluated at the most, at least 2.
        max_seconds: When no further set is evaluated. None: never.

    Raises:
        ConfigError: A value cannot be, or the name does not say which way is better.

    >>> Goal(monitor="val_loss", max_drop=0.1).mode
    'min'
    """

    monitor: str
    max_drop: float
    mode: Literal["min", "max"] | None = None
    relative: bool = False
    max_evaluations: int = 20
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ConfigError(
                f"max_drop={self.max_drop!r} needs monitor=..., the name of a metric that the module logs in validation."
            )
        if isinstance(self.max_drop, bool) or not isinstance(self.max_drop, (int, float)) or not self.max_drop >= 0:
            raise ConfigError(f"max_drop={self.max_drop!r}: give how much worse {self.monitor!r} may be, 0 or more.")
        if self.mode is None:
            object.__setattr__(self, "mode", _mode_of(self.monitor))
        if self.mode not in ("min", "max"):
            raise ConfigError(f"mode={self.mode!r}: give 'max' if more is better, 'min' if less is.")
        if isinstance(self.max_evaluations, bool) or not isinstance(self.max_evaluations, int) or self.max_evaluations < 2:
            raise ConfigError(f"max_evaluations={self.max_evaluations!r}: give 2 or more.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"max_seconds={self.max_seconds!r}: give a number above 0, or None.")

    def drop(self, reference: float, value: float) -> float:
        """How much worse ``value`` is than ``reference``; infinite if it is NaN."""
        lost = reference - value if self.mode == "max" else value - reference
        if math.isnan(lost):
            return math.inf
        return lost / max(abs(reference), 1e-12) if self.relative else lost

    def is_met(self, reference: float, value: float) -> bool:
        """Whether the drop is within the bound, but for the last bits of the difference."""
        return self.drop(reference, value) <= self.max_drop + 1e-9

    @property
    def shown(self) -> str:
        """The bound in words."""
        bound = f"{self.max_drop:.4g}" if not self.relative else f"{100 * self.max_drop:.4g} %"
        return f"{self.monitor} {'drops' if self.mode == 'max' else 'rises'} by at most {bound}"


def _mode_of(monitor: str) -> Literal["min", "max"]:
    words = set("".join(c if c.isalnum() else " " for c in monitor.lower()).split())
    found: list[Literal["min", "max"]] = []
    for mode in ("min", "max"):
        if words & set(_WORDS[mode]):
            found.append(mode)  # type: ignore[arg-type]
    if len(found) != 1:
        raise ConfigError(
            f"monitor={monitor!r}: its name does not say whether more or less is better. Give mode='max' or mode='min'."
        )
    return found[0]


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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search ended with.

    Attributes:
        goal: What was asked for.
        left_float: What ``skip`` has to name, the fewest multiply-accumulates that were found.
        reference: The metric in float.
        value: That of the int8 model with these layers in float; None: the budget was spent before it was evaluated.
        evaluations: How many sets of layers were evaluated, of earlier runs of this search as well.
        is_exhausted: The budget ended the search.
    """

    goal: Goal
    left_float: tuple[str, ...]
    reference: float
    value: float | None
    evaluations: int
    is_exhausted: bool

    def config(self, given: QuantConfig) -> QuantConfig:
        """The one that gives the result without the search."""
        return with_skips(given, self.left_float)


def with_skips(config: QuantConfig, names: Iterable[str]) -> QuantConfig:
    """``config`` with more submodules left in float."""
    return replace(config, skip=(*config.skip, *(name for name in sorted(names) if name not in config.skip)))


class _Spent(Exception):
    """The budget is."""


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
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
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
        return self.seconds + time.monotonic() - self.began

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


def search(
    goal: Goal,
    history: History,
    evaluate: Callable[[frozenset[str], Kind], float],
    *,
    all_layers: Iterable[str],
) -> Outcome:
    """Find the fewest multiply-accumulates in float with which the goal is met.

    Sets of layers are simulated; the one that is found is evaluated as an int8 model, and where that is worse than the
    simulation had it, more layers are put in float.

    Args:
        goal: What has to hold.
        history: With the candidates in their order. What is found is added.
        evaluate: Given what is left in float, and how to evaluate it, the metric. Called once for each.
        all_layers: Names of the layers that are quantized: one of them at least stays so.
    """
    return _Search(goal, history, evaluate, frozenset(all_layers)).run()


class _Search:
    def __init__(
        self, goal: Goal, history: History, evaluate: Callable[[frozenset[str], Kind], float], layers: frozenset[str]
    ) -> None:
        self.goal, self.history, self._evaluate, self.layers = goal, history, evaluate, layers
        self.order = list(history.ordered)
        self.chosen: list[Candidate] = []
        self.asked: dict[tuple[str, tuple[str, ...]], float] = {}
        # the last one would leave nothing to quantize
        while self.order and layers <= {layer for c in self.order for layer in c.layers}:
            self.order.pop()

    def run(self) -> Outcome:
        exhausted = False
        try:
            if self._is_met((), "int8"):
                return self._outcome(exhausted=False)
            self._simulated()
        except _Spent:
            exhausted = True
        try:
            if not self._is_met(self.chosen, "int8"):
                # the simulation was too hopeful, or there is none that it likes
                self._fewest(len(self.chosen) + 1, "int8")
        except _Spent:
            exhausted = True
        return self._outcome(exhausted)

    def _simulated(self) -> None:
        count = self._fewest(1, "simulated")
        self.chosen = self.order[:count]
        if count is not None:
            self._prune()

    def _fewest(self, start: int, kind: Kind) -> int | None:
        """How many candidates have to be in float, at least ``start``: doubled until it is met, then bisected.

        None: more than there are.
        """
        low, step = start - 1, 0
        high = min(start, len(self.order))
        while not self._is_met(self.order[:high], kind):
            if high >= len(self.order):
                return None
            low, step = high, max(1, 2 * step)
            high = min(len(self.order), start + step)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_met(self.order[:middle], kind) else (middle, high)
        return high

    def _prune(self) -> None:
        """Put back into int8 what is not needed in float, that first which has the most multiply-accumulates."""
        # the last one is needed: without it the bound was not met
        waiting = [sorted(self.chosen[:-1], key=lambda c: -c.macs)]
        while waiting:
            group = waiting.pop(0)
            rest = [c for c in self.chosen if c not in group]
            if not group or self._is_met(rest, "simulated"):
                self.chosen = rest
            elif len(group) > 1:
                waiting[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]

    def _ok(self, value: float) -> bool:
        return self.goal.is_met(self.history.reference, value)

    def _is_met(self, chosen: Iterable[Candidate], kind: Kind) -> bool:
        key = (kind, _key(chosen))
        if key not in self.asked:
            if key not in self.history.entries:
                self._check_budget(kind)
                value = self._evaluate(frozenset(key[1]), kind)
                self.history.keep(key, value)
            self.asked[key] = self.history.entries[key]
        return self._ok(self.asked[key])

    def _check_budget(self, kind: Kind) -> None:
        # one is left for the int8 model
        allowed = self.goal.max_evaluations - (kind == "simulated")
        late = False
        if self.goal.max_seconds is not None:
            limit = self.goal.max_seconds
            late = self.history.team.by_first(lambda: self.history.spent_s() > limit)
        if len(self.history.entries) >= allowed or late:
            raise _Spent

    def _outcome(self, exhausted: bool) -> Outcome:
        """The set with the fewest multiply-accumulates that meets the goal, else that with the best value."""
        real = {names: value for (kind, names), value in self.asked.items() if kind == "int8"}
        met = [names for names, value in real.items() if self._ok(value)]
        macs = {c.name: c.macs for c in self.order}
        if met:
            best = min(met, key=lambda names: sum(macs[name] for name in names))
        else:
            # simulated ones are a guess at what would be better
            simulated = {names: value for (kind, names), value in self.asked.items() if kind == "simulated"}
            values = {**simulated, **real}
            best = min(values, key=lambda n: (self.goal.drop(self.history.reference, values[n]), len(n)), default=())
        return Outcome(
            goal=self.goal,
            left_float=best,
            reference=self.history.reference,
            value=real.get(best),
            evaluations=len(self.asked),
            is_exhausted=exhausted,
        )


def _key(chosen: Iterable[Candidate]) -> tuple[str, ...]:
    return tuple(sorted(c.name for c in chosen))


def described(outcome: Outcome, metrics_int8: Mapping[str, float]) -> tuple[dict[str, Any], str]:
    """The result for a report, and in words.

    Args:
        outcome: Of the search.
        metrics_int8: Of the int8 model that is delivered, which decide whether the bound is met.
    """
    goal = outcome.goal
    value = metrics_int8[goal.monitor]
    met = goal.is_met(outcome.reference, value)
    record = {
        "monitor": goal.monitor,
        "mode": goal.mode,
        "max_drop": goal.max_drop,
        "relative": goal.relative,
        "reference": outcome.reference,
        "value": value,
        "drop": goal.drop(outcome.reference, value),
        "is_met": met,
        "evaluations": outcome.evaluations,
        "is_exhausted": outcome.is_exhausted,
        "left_float": list(outcome.left_float),
    }
    names = ", ".join(map(repr, outcome.left_float))
    left = f"Left in float: {', '.join(outcome.left_float)}." if names else "Nothing was left in float for it."
    again = f" Without a search: QuantConfig(skip=({names},))." if names else ""
    tried = f"{outcome.evaluations} sets of layers were evaluated."
    if met:
        return record, f"{goal.shown}: it does, from {outcome.reference:.4f} to {value:.4f}. {left} {tried}{again}"
    why = "the budget was spent" if outcome.is_exhausted else "no set of layers that was tried meets it"
    text = (
        f"THE BOUND IS NOT MET: {goal.shown} was asked for, and {goal.monitor} goes from {outcome.reference:.4f} to "
        f"{value:.4f}; {why}. The files are those of the best that was found. {left} {tried}{again} Allow more "
        "(max_drop, max_evaluations), give more calibration data, or train with QuantizationAwareTraining."
    )
    return record, text

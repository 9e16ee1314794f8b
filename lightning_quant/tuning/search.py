"""Which layers stay in float so that a metric drops by no more than a bound: the search, whoever evaluates.

Layers are put in float in the order of the noise that they add for each multiply-accumulate, as many as are needed by
bisection; then those are put back into int8 that were not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_quant.config import QuantConfig
from lightning_quant.tuning.goal import Goal
from lightning_quant.tuning.history import Candidate, History

#: How a set of layers was evaluated: fake quantized, or as the int8 model that is delivered.
Kind = Literal["simulated", "int8"]


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
        self.order = [c for c in history.ordered if not layers <= set(c.layers)]
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
            # what was only simulated is a guess, for where there was no time to know
            simulated = {names: value for (kind, names), value in self.asked.items() if kind == "simulated"}
            values = {**simulated, **real} if exhausted else real
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

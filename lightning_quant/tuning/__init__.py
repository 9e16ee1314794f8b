"""Leaving layers in float until a metric is within a bound: what is asked, what was found, and the search."""

from lightning_quant.tuning.goal import Goal
from lightning_quant.tuning.history import STATE, Candidate, History, candidates, fingerprint
from lightning_quant.tuning.search import Kind, Outcome, described, search, with_skips

__all__ = [
    "STATE",
    "Candidate",
    "Goal",
    "History",
    "Kind",
    "Outcome",
    "candidates",
    "described",
    "fingerprint",
    "search",
    "with_skips",
]

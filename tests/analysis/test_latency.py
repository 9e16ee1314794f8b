"""What is measured, and how often; never how long it takes."""

from __future__ import annotations

import pytest
import torch

from lightning_quant.analysis import latency
from lightning_quant.analysis.latency import latency_ms


def test_every_call_gets_the_same_number_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    turns: list[str] = []

    def call(name: str, seconds: float) -> None:
        turns.append(name)
        clock[0] += seconds

    durations = {"slow": 0.2, "fast": 0.1}
    calls = {name: (lambda name=name, seconds=seconds: call(name, seconds)) for name, seconds in durations.items()}
    measured = latency_ms(calls, rounds=3, budget_s=0.3)
    assert measured == pytest.approx({"slow": 200.0, "fast": 100.0})
    assert turns == ["slow", "slow", "fast", "fast", *["slow", "fast"] * 3]


def test_the_median_is_not_moved_by_one_slow_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations = [0.0], iter([9.0, 0.01, 0.01, 5.0, 0.01])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += next(durations)

    assert latency_ms({"call": call}, rounds=3, budget_s=0.0) == pytest.approx({"call": 10.0})


def test_short_calls_are_repeated_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, count = [0.0], [0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        count[0] += 1

    assert latency_ms({"call": call}, rounds=2) == {"call": 0.0}
    assert count[0] == 2 + 2 * 50


def test_no_calls() -> None:
    assert latency_ms({}) == {}


def test_calls_run_without_gradients() -> None:
    modes: list[bool] = []
    latency_ms({"call": lambda: modes.append(torch.is_inference_mode_enabled())}, rounds=1, budget_s=0.0)
    assert all(modes)
    assert not torch.is_inference_mode_enabled()

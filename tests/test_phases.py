"""When what happens in training, and the state that a checkpoint keeps of it."""

from __future__ import annotations

import copy
import functools
import io
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PROPERTY, Mlp, Residual
from torch import nn

from lightning_quant import ConfigError, QuantConfig, convert, prepare
from lightning_quant.attachment import attach, attached_to
from lightning_quant.backends.graph import is_initialised, observers
from lightning_quant.phases import (
    FLOAT,
    Phase,
    Phases,
    Schedule,
    freeze_batch_norm,
    load_observer_state,
    observer_state,
    set_observing,
)

X = torch.linspace(-2, 2, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


# ---- schedule


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        *(({"start_epoch": bad}, f"start_epoch={bad!r}: give an epoch, 0 or later.") for bad in (-1, True, 1.0, None)),
        *(
            ({name: bad}, f"{name}={bad!r}: give an epoch, or None for never.")
            for name in ("freeze_observers_epoch", "freeze_batch_norm_epoch")
            for bad in (True, 2.0, "3")
        ),
        (
            {"start_epoch": 2, "freeze_observers_epoch": 2},
            "freeze_observers_epoch=2 with start_epoch=2: quantization has to have begun; give 3 or later, or None for "
            "never.",
        ),
        (
            {"start_epoch": 2, "freeze_batch_norm_epoch": 1},
            "freeze_batch_norm_epoch=1 with start_epoch=2: quantization has to have begun; give 2 or later, or None "
            "for never.",
        ),
        (
            {"freeze_observers_epoch": -1},
            "freeze_observers_epoch=-1 with start_epoch=0: quantization has to have begun; give 1 or later, or None "
            "for never.",
        ),
    ],
)
def test_a_schedule_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        Schedule(**settings)


def test_a_schedule_is_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        Schedule().start_epoch = 1
    with pytest.raises(TypeError, match="positional"):
        Schedule(1)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    start = draw(st.integers(0, 5))
    return Schedule(
        start_epoch=start,
        freeze_observers_epoch=draw(st.none() | st.integers(start + 1, 12)),
        freeze_batch_norm_epoch=draw(st.none() | st.integers(start, 12)),
    )


@PROPERTY
@given(schedules(), st.integers(0, 15))
def test_the_phase_of_an_epoch(schedule: Schedule, epoch: int) -> None:
    phase = schedule.phase(epoch)
    if epoch < schedule.start_epoch:
        assert phase is FLOAT
        return
    observers, batch_norm = schedule.freeze_observers_epoch, schedule.freeze_batch_norm_epoch
    assert phase == Phase(
        quantize=True,
        observe=observers is None or epoch < observers,
        update_batch_norm=batch_norm is None or epoch < batch_norm,
    )


@PROPERTY
@given(schedules())
def test_every_schedule_observes_before_it_freezes_and_never_goes_back(schedule: Schedule) -> None:
    phases = [schedule.phase(epoch) for epoch in range(15)]
    assert schedule.phase(schedule.start_epoch).observe
    for name, order in (
        ("quantize", [False, True]),
        ("observe", [False, True, False]),
        ("update_batch_norm", [True, False]),
    ):
        values = [getattr(phase, name) for phase in phases]
        changes = [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
        text = "".join(map(str, changes))
        assert text in "".join(map(str, order)), name


# ---- what a phase sets


def prepared(config: QuantConfig | None = None, model: nn.Module | None = None) -> Any:
    return prepare(model or Residual(), config, method="qat", example_inputs=X)


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_set_observing(activations: bool, weights: bool) -> None:
    graph = prepared()
    graph(X)
    set_observing(graph, activations=activations, weights=weights)
    before = observer_state(graph)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.mul_(2)
    graph(2 * X)
    moved = {key for key, value in observer_state(graph).items() if not torch.equal(value, before[key])}
    assert any("weight_fake_quant" in key for key in moved) is weights
    assert any("weight_fake_quant" not in key for key in moved) is activations


def test_frozen_batch_norm_stays_until_the_next_train() -> None:
    graph = prepared()
    freeze_batch_norm(graph.train())
    before = {key: value.clone() for key, value in graph.state_dict().items() if "running" in key}
    assert len(before) == 10
    graph(X)
    assert all(torch.equal(graph.state_dict()[key], value) for key, value in before.items())
    graph.train()
    graph(X)
    assert not any(torch.equal(graph.state_dict()[key], value) for key, value in before.items())


def test_a_batch_norm_without_statistics_cannot_be_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    graph = prepared(model=model).train()
    freeze_batch_norm(graph)
    assert all(m.training for m in graph.modules() if isinstance(m, nn.BatchNorm2d))


# ---- the phases of a module


@functools.cache
def prepared_model() -> nn.Module:
    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    attach(model, {"body": prepare(model.body, method="qat", example_inputs=ROWS)})
    return model


def machine() -> tuple[nn.Module, Phases]:
    """A small module with attached graphs, in training mode, whose ranges are known."""
    model = copy.deepcopy(prepared_model())
    phases = Phases(model.train())
    phases.enter(Phase(quantize=True, observe=True, update_batch_norm=True))
    model.body(ROWS)
    return model, phases


ROWS = torch.linspace(-2, 2, 24).reshape(6, 4)


def found(model: nn.Module) -> Phase:
    """The phase of a module, by what a batch does to it. The batch is larger each time, so that ranges move."""
    (graph,) = attached_to(model).named().values()
    model.scale = 1.5 * getattr(model, "scale", 1.0)
    data = model.scale * ROWS
    before = observer_state(graph), model.body[1].running_mean.clone()
    output = model.body(data)
    own = nn.Sequential.forward(copy.deepcopy(model.body), data)
    state = observer_state(graph)
    moved = {name for name in state if not torch.equal(state[name], before[0][name])}
    return Phase(
        quantize=not torch.equal(output, own),
        observe=any(name.endswith("max_val") and "weight_fake_quant" not in name for name in moved),
        update_batch_norm=not torch.equal(model.body[1].running_mean, before[1]),
    )


def of_any(draw: st.DrawFn) -> Phase:
    if draw(st.booleans()):
        return FLOAT
    return Phase(quantize=True, observe=draw(st.booleans()), update_batch_norm=draw(st.booleans()))


any_phase = st.composite(of_any)()
#: What can happen between two batches. Somebody's ``train()`` thaws batch norms.
events = st.sampled_from(["train()", "validation", "batch"]) | any_phase


@PROPERTY
@given(st.lists(events, max_size=8), any_phase)
def test_a_module_is_in_the_phase_that_it_was_put_into(before: list[Any], phase: Phase) -> None:
    """Whatever was before: a phase is set in full. And it is left without a trace."""
    model, phases = machine()
    for event in before:
        if isinstance(event, Phase):
            phases.enter(event)
        elif event == "validation":
            phases.pause(quantize=phases.phase.quantize)
            model.eval()
            model.body(ROWS)
            model.train()
            phases.enter(phases.phase)
        elif event == "train()":
            model.train()
        phases.hold()
        if event == "batch":
            assert found(model) == phases.phase
    phases.enter(phase)
    assert phases.phase == phase
    assert found(model) == phase
    phases.end()
    assert phases.phase == FLOAT
    assert found(model) == FLOAT
    assert all(module.training for module in model.body.modules())


def test_nothing_moves_in_a_pause() -> None:
    model, phases = machine()
    phases.pause(quantize=True)
    assert found(model.eval()) == Phase(quantize=True, observe=False, update_batch_norm=False)
    phases.pause(quantize=False)
    assert found(model) == Phase(quantize=False, observe=False, update_batch_norm=False)


def test_a_phase_is_held_without_growing() -> None:
    _, phases = machine()
    phases.enter(Phase(quantize=True, observe=True, update_batch_norm=False))
    for _ in range(5):
        phases.model.train()
        phases.hold()
    assert len(phases._frozen) == 1


EPOCHS, STEPS = 5, 2


def trained_phases(schedule: Schedule, phases: Phases, first: tuple[int, int], last: tuple[int, int]) -> list[Any]:
    """What batches from ``first`` to before ``last``, as ``(epoch, batch)``, are trained in, as hooks are called.

    ``on_train_epoch_start`` is not called for an epoch in whose middle a run begins.
    """
    seen = []
    phases.enter(schedule.phase(first[0]))  # on_train_start
    for epoch in range(first[0], EPOCHS):
        if epoch > first[0] or first[1] == 0:
            phases.enter(schedule.phase(epoch))
        for batch in range(first[1] if epoch == first[0] else 0, STEPS):
            if (epoch, batch) == last:
                return seen
            phases.hold()
            seen.append(((epoch, batch), phases.phase, found(phases.model)))
        phases.pause(quantize=phases.phase.quantize)
        phases.enter(phases.phase)
    return seen


@settings(PROPERTY, max_examples=25)
@given(
    schedules(),
    st.tuples(st.integers(0, EPOCHS - 1), st.integers(0, STEPS - 1)),
    st.tuples(st.integers(0, EPOCHS - 1), st.integers(0, STEPS - 1)),
)
def test_any_kill_point_resumes_to_the_same_place(
    schedule: Schedule, killed: tuple[int, int], saved: tuple[int, int]
) -> None:
    """Killed before one batch, resumed in another process before the same or an earlier one."""
    saved = min(saved, killed)
    whole = trained_phases(schedule, machine()[1], (0, 0), (EPOCHS, 0))
    assert all(phase == really == schedule.phase(epoch) for (epoch, _), phase, really in whole)
    died = trained_phases(schedule, machine()[1], (0, 0), killed)
    resumed = trained_phases(schedule, machine()[1], saved, (EPOCHS, 0))
    kept = [entry for entry in died if entry[0] < saved]
    assert kept + resumed == whole


# ---- the state of observers


def trained() -> Any:
    torch.manual_seed(3)
    graph = prepared()
    for _ in range(3):
        graph(torch.randn_like(X))
    set_observing(graph, activations=False, weights=False)
    return graph


def test_observer_state_survives_a_file() -> None:
    graph = trained()
    file = io.BytesIO()
    torch.save(observer_state(graph), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(value.device.type == "cpu" and not value.requires_grad for value in state.values())

    torch.manual_seed(3)
    fresh = prepared()
    fresh.load_state_dict({k: v for k, v in graph.state_dict().items() if "post_process" not in k}, strict=False)
    load_observer_state(fresh, state)
    again = observer_state(fresh)
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in state.items())
    assert torch.equal(fresh.eval()(X), graph.eval()(X))
    assert torch.equal(convert(fresh)(X), convert(graph)(X))


def test_observer_state_is_a_copy() -> None:
    graph = trained()
    state = observer_state(graph)
    for value in state.values():
        value.zero_()
    assert is_initialised(graph)
    assert float(graph.activation_post_process_0.scale) > 0


@pytest.mark.parametrize(
    "other",
    [
        lambda: prepare(Mlp(), method="qat", example_inputs=torch.randn(2, 4)),
        lambda: prepared(QuantConfig(skip=("fc",))),
        lambda: prepare(nn.Linear(4, 2), method="qat", example_inputs=torch.randn(2, 4)),
    ],
    ids=["another model", "another skip", "a smaller model"],
)
def test_the_state_of_another_graph_is_refused(other: Any) -> None:
    state, graph = observer_state(trained()), other()
    before = observer_state(graph)
    with pytest.raises(ConfigError) as raised:
        load_observer_state(graph, state)
    assert re.match(
        rf"^the checkpoint has observers for another graph: {len(state)} values, of which \d+ fit, for "
        rf"{len(observers(graph))} observers\. Use the QuantConfig and the model that it was trained with\.$",
        str(raised.value),
    )
    assert all(torch.equal(value, before[key]) for key, value in observer_state(graph).items())


@pytest.mark.parametrize("state", [{}, {"activation_post_process_0.scale": torch.ones(1)}])
def test_an_incomplete_state_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match="observers for another graph"):
        load_observer_state(prepared(), state)

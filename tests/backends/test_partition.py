"""Models of which parts cannot be traced: those are called as they are, and everything else is in int8."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import decibels
from torch import nn
from torch.nn import functional as F

from lightning_quant import ExportConfig, convert, coverage, export, load, prepare
from lightning_quant._torch_ao import quantized_modules
from lightning_quant.backends.graph import info, is_graph
from lightning_quant.config import Method
from lightning_quant.phases import set_observing

METHODS = pytest.mark.parametrize("method", ["static", "qat"])
WIDTH = 8
TRACE_ERROR = (
    r"^\S*test_partition\.py:\d+: TraceError: symbolically traced variables cannot be used as inputs to control flow$"
)


class Block(nn.Module):
    """Can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.relu(self.a(x)))


class Choosing(nn.Module):
    """Two branches, by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] > 0:
            return self.up(x)
        return -self.down(x)


class Net(nn.Module):
    """Takes ``(N, 8)``. ``middle`` stands between blocks that can be traced."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = Block(), middle, Block()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.middle(self.first(x))))


OUTSIDE = {"first.a", "first.b", "last.a", "last.b", "head"}


def rows(first: float = 1.0) -> torch.Tensor:
    """Data of one range, the first value of which has the sign of ``first`` also behind a block."""
    x = torch.randn(64, WIDTH)
    x[0, 0] = 3 * first
    return x


def graphs(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_graph(module)}


def named_as_before(name: str) -> str:
    """Without the names of what stands in for a module, of a target that is one layer, and of what was compiled."""
    return ".".join(part for part in name.split(".") if part not in ("graph", "layer", "_orig_mod"))


def int8_layers(int8: nn.Module, x: torch.Tensor) -> set[str]:
    """What ran in int8, by the name that it has in the float model. All that ran did."""
    found = coverage(int8, x)
    assert found.share == 1.0, [row for row in found.rows if not row.int8]
    return {named_as_before(row.name) for row in found.rows}


def prepared_on(model: nn.Module, *batches: torch.Tensor, method: Method) -> Any:
    prepared = prepare(model.eval(), method=method, example_inputs=batches[0])
    prepared.eval()
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return prepared


def assert_near(model: nn.Module, int8: nn.Module, x: torch.Tensor, enough: float = 25) -> None:
    with torch.no_grad():
        assert decibels(model(x), int8(x)) > enough


# ---- a branch on the data


def choosing_net() -> Net:
    """Nothing in front of the branch turns the sign that it asks for."""
    model = Net(Choosing())
    with torch.no_grad():
        model.first.b.weight.mul_(0.1)
        model.first.b.bias.mul_(0.1)
    return model


@METHODS
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["up", "down"])
def test_a_branch_keeps_one_block_and_nothing_else(sign: float, method: Method) -> None:
    model, x = choosing_net(), rows(sign)
    prepared = prepared_on(model, x, method=method)
    assert is_graph(prepared)
    kept = info(prepared).kept
    assert list(kept) == ["middle"]
    assert re.match(TRACE_ERROR, kept["middle"])
    int8 = convert(prepared)
    assert info(int8).kept == kept
    taken = "up" if sign > 0 else "down"
    assert int8_layers(int8, x) == {*OUTSIDE, f"middle.{taken}"}
    assert type(int8.middle) is Choosing
    assert_near(model, int8, x)


@METHODS
def test_both_branches_go_on_after_convert(method: Method) -> None:
    """The example took one: what is in the other is float where it was never seen."""
    model = choosing_net()
    up, down = rows(1.0), rows(-1.0)
    int8 = convert(prepared_on(model, up, down, method=method))
    assert {name.removesuffix(".graph") for name in graphs(int8)} == {"", "middle.up"}
    assert type(int8.middle.down) is nn.Linear
    for x in (up, down, up):
        assert_near(model, int8, x)
    assert coverage(int8, up).share == 1.0
    assert coverage(int8, down).share < 1.0


@METHODS
def test_a_branch_does_not_change_the_model(method: Method) -> None:
    model, x = choosing_net(), rows()
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    prepared_on(model, x, method=method)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@METHODS
def test_a_branch_inside_of_a_sequence_of_blocks(method: Method) -> None:
    """Only the one that refuses is kept, at every place where there is one."""
    model = nn.Sequential(Block(), Choosing(), Block(), nn.Sequential(Choosing(), Block()), nn.Linear(WIDTH, 3))
    x = rows()
    prepared = prepared_on(model, x, method=method)
    assert set(info(prepared).kept) == {"1", "3.0"}
    int8 = convert(prepared)
    assert coverage(int8, x).share == 1.0
    assert_near(model, int8, x)


# ---- state from call to call


class Remembering(nn.Module):
    """Adds what it gave last time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.h: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.fc(x))
        if self.h is not None:
            y = y + self.h
        self.h = 0.5 * y.detach()
        return y


class Counting(nn.Module):
    """Changes a number and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.calls, self.seen = 0, [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        return torch.tanh(self.fc(x)) * (1.0 if self.calls % 2 else -1.0)


class Averaging(nn.Module):
    """Assigns a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.fc(x))
        self.mean = 0.5 * self.mean + 0.5 * y.detach().mean(0)
        return y - self.mean


STATES: dict[type[nn.Module], dict[str, Any]] = {
    Remembering: {"h": None},
    Counting: {"calls": 0, "seen": [0]},
    Averaging: {"mean": torch.zeros(WIDTH)},
}


def state_of(module: nn.Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in STATES[type(module)]}


def unused(state: dict[str, Any], kind: type[nn.Module]) -> bool:
    return all(
        torch.equal(state[k], v) if isinstance(v, torch.Tensor) else state[k] == v for k, v in STATES[kind].items()
    )


@METHODS
@pytest.mark.parametrize("kind", STATES)
def test_state_goes_on_from_call_to_call(kind: type[nn.Module], method: Method) -> None:
    model = Net(kind()).eval()
    x, y, z = rows(), rows(), rows()
    prepared: Any = prepare(model, method=method, example_inputs=x)
    # neither the search for what can be traced nor the trace counts as a call
    assert unused(state_of(model.middle), kind)
    assert unused(state_of(prepared.middle), kind)
    reason = info(prepared).kept["middle"]
    names = ", ".join(f"self.{name}" for name in sorted(STATES[kind]))
    assert reason == f"its forward changes {names}: it carries state from call to call"
    fresh = copy.deepcopy(state_of(prepared.middle))
    prepared.eval()
    with torch.no_grad():
        for batch in (x, y, z):
            prepared(batch)
    int8: Any = convert(prepared)
    for name, value in fresh.items():
        setattr(int8.middle, name, value)
    with torch.no_grad():
        for number, batch in enumerate((x, y, z)):
            assert decibels(model(batch), int8(batch)) > 25, number
    assert not unused(state_of(int8.middle), kind)
    assert not torch.equal(int8(x), int8(x))


# ---- a trace that would compute something else


class Two(nn.Module):
    """Gives two tensors, and cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.a(x), self.b(x)) if x.isfinite().all() else (x, x)


class Asking(nn.Module):
    """Asks for the type of what ``Two`` gives: a trace sees neither a tuple nor a tensor there."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.fc = Two(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.two(x)
        return self.fc(y[0] - y[1] if isinstance(y, tuple) else y[0] + y[1])


@METHODS
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "alone"])
def test_a_question_for_the_type_of_what_a_kept_module_gives(inside: bool, method: Method) -> None:
    model, x = Net(Asking()) if inside else Asking(), rows()
    int8 = convert(prepared_on(model, x, method=method))
    found = int8_layers(int8, x)
    asking = {"two.a", "two.b", "fc"}
    assert found == ({*OUTSIDE, *(f"middle.{name}" for name in asking)} if inside else asking)
    assert_near(model, int8, x)


class Masked(nn.Module):
    """Would be traced with the wrong branch, without an error."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> torch.Tensor:
        return self.fc(x) if isinstance(x, torch.Tensor) else self.fc(10 * x)


@METHODS
def test_a_question_for_the_type_of_the_input(method: Method) -> None:
    model, x = Net(Masked()), rows()
    int8 = convert(prepared_on(model, x, method=method))
    assert coverage(int8, x).share == 1.0
    assert_near(model, int8, x)


# ---- what a kept module gives is returned


@dataclass
class States:
    values: torch.Tensor
    cache: torch.Tensor | None


class WithoutCache(nn.Module):
    """Asks for a width, and gives a part that is None in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> States:
        return States(self.fc(x) if x.shape[-1] == WIDTH else x, None)


class PassesOn(nn.Module):
    """What it is given, a part of which is None: only a run can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = WithoutCache(), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> Any:
        states = self.inner(x)
        return {"scores": self.head(states.values), "cache": states.cache}


class PassesAllOn(PassesOn):
    """A container that no trace has seen from inside."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(self.head(x).repeat(1, 2))


@METHODS
@pytest.mark.parametrize("kind", [PassesOn, PassesAllOn])
def test_what_a_kept_module_gives_is_returned(kind: type[nn.Module], method: Method, tmp_path: Path) -> None:
    model, x = kind(), rows()
    prepared = prepared_on(model, x, method=method)
    int8 = convert(prepared)
    expected, found = model(x), int8(x)
    assert type(found) is type(expected)
    parts, given = (value if isinstance(value, dict) else vars(value) for value in (expected, found))
    assert given.keys() == parts.keys()
    assert given["cache"] is None
    name = "scores" if kind is PassesOn else "values"
    assert decibels(parts[name], given[name]) > 25
    # files hold tensors: they leave out what is None
    for path in export(prepared, None, ExportConfig(directory=tmp_path), example_inputs=x).values():
        loaded = load(path)(x[:3])
        assert loaded.keys() == {name}
        assert decibels(given[name][:3], loaded[name]) > 25


# ---- kept inside of kept


class Deep(nn.Module):
    """Two levels that refuse, and things that can be traced on each."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net(Choosing())
        self.back = nn.Linear(4, WIDTH)
        self.beside = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.back(self.inner(self.beside(x)))
        return y if y.isfinite().all() else x


@METHODS
def test_a_graph_inside_of_what_a_graph_keeps(method: Method) -> None:
    model, x = Net(Deep()), rows()
    prepared = prepared_on(model, x, method=method)
    int8 = convert(prepared)
    assert set(info(int8).kept) == {"middle"}
    assert is_graph(int8.middle.inner.graph)
    assert set(info(int8.middle.inner.graph).kept) == {"middle"}
    inside = {f"middle.inner.{name}" for name in OUTSIDE}
    found = int8_layers(int8, x)
    branch = {name for name in found if name.startswith("middle.inner.middle.")}
    assert len(branch) == 1
    assert branch <= {"middle.inner.middle.up", "middle.inner.middle.down"}
    assert found == {*OUTSIDE, *inside, *branch, "middle.back", "middle.beside.a", "middle.beside.b"}
    assert_near(model, int8, x)


# ---- training


@pytest.mark.parametrize(
    ("make", "unseen"),
    [
        (lambda: choosing_net(), {"middle.down.weight", "middle.down.bias"}),
        (lambda: Net(Remembering()), set()),
        (lambda: Net(Asking()), set()),
        (lambda: Net(nn.Sequential(Block(), Averaging())), set()),
    ],
    ids=["branch", "state", "type", "sequence"],
)
def test_training_reaches_every_parameter(make: Any, unseen: set[str]) -> None:
    """But those of the branch that was not taken, as without us."""
    model, x, target = make(), rows(), torch.randn(64, 4)
    prepared: Any = prepare(model, method="qat", example_inputs=x)
    assert prepared.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(prepared(x), target)
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is None} == unseen
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    prepared.eval()
    int8 = convert(prepared)
    assert coverage(int8, x).share == 1.0
    # the fake-quantized model predicts the int8 one; both go on from the state in which the training left them
    assert decibels(prepared(x), int8(x)) > 25


@METHODS
def test_kept_modules_follow_the_mode(method: Method) -> None:
    class Dropping(Choosing):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    model, x = Net(Dropping()), rows()
    prepared: Any = prepare(model, method=method, example_inputs=x)
    prepared(x)
    set_observing(prepared, activations=False, weights=False)
    assert torch.equal(prepared.eval()(x), prepared(x))
    if method == "qat":
        assert not torch.equal(prepared.train()(x), prepared(x))
    int8 = convert(prepared)
    assert torch.equal(int8(x), int8(x))


# ---- scripted and compiled parts


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x)) if bool(x[0, 0] > -1e9) else x


#: torch's, where it copies or compiles modules whose inputs or parameters have a history.
HISTORY = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@HISTORY
@METHODS
def test_a_scripted_module_stays_and_all_else_is_int8(method: Method) -> None:
    model, x = Net(torch.jit.script(Scripted())), rows()
    int8: Any = convert(prepared_on(model, x, method=method))
    assert isinstance(int8.middle, torch.jit.ScriptModule)
    assert_near(model, int8, x)
    kernels = [name for name, m in int8.named_modules() if isinstance(m, quantized_modules.Linear)]
    assert {named_as_before(name) for name in kernels} == OUTSIDE


@HISTORY
@METHODS
def test_a_scripted_module_is_kept(method: Method) -> None:
    model, x = Net(torch.jit.script(Scripted())), rows()
    prepared = prepare(model, method=method, example_inputs=x)
    assert is_graph(prepared)
    assert list(info(prepared).kept) == ["middle"]


@HISTORY
def test_coverage_of_a_model_with_a_scripted_module() -> None:
    model, x = Net(torch.jit.script(Scripted())), rows()
    found = coverage(convert(prepared_on(model, x, method="static")), x)
    assert 0 < found.share < 1


@HISTORY
def test_a_scripted_module_is_trained() -> None:
    model, x = Net(torch.jit.script(Scripted())), rows()
    prepared: Any = prepare(model, method="qat", example_inputs=x)
    prepared(x).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@torch.jit.script
def scripted_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * 2


class WithScriptedFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scripted_relu(self.fc(x))


@METHODS
def test_a_module_that_calls_a_scripted_function_is_kept(method: Method) -> None:
    model, x = Net(WithScriptedFunction()), rows()
    prepared = prepared_on(model, x, method=method)
    assert list(info(prepared).kept) == ["middle"]
    int8 = convert(prepared)
    assert int8_layers(int8, x) == {*OUTSIDE, "middle.fc"}
    assert_near(model, int8, x)


def in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


@METHODS
@pytest.mark.parametrize(
    ("compile", "inside"),
    [
        (lambda: torch.compile(Block(), backend="eager"), {"middle.a", "middle.b"}),
        (lambda: in_place(Block()), {"middle.a", "middle.b"}),
        (lambda: torch.compile(nn.Sequential(Block(), nn.Linear(8, 8)), backend="eager"), None),
    ],
    ids=["compiled", "in place", "sequence"],
)
def test_a_compiled_part_is_quantized(compile: Any, inside: set[str] | None, method: Method) -> None:
    model, x = Net(compile()), rows()
    prepared = prepared_on(model, x, method=method)
    int8 = convert(prepared)
    found = int8_layers(int8, x)
    assert found == {*OUTSIDE, *(inside or {"middle.0.a", "middle.0.b", "middle.1"})}
    assert_near(model, int8, x)
    if method == "qat":
        prepared.train()(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_model_that_was_compiled_as_a_whole() -> None:
    model, x = torch.compile(Net(Block()).eval(), backend="eager"), rows()
    prepared: Any = prepare(model, method="static", example_inputs=x)
    prepared(x)
    int8 = convert(prepared)
    assert coverage(int8, x).share == 1.0


# ---- what a model asks of its parts


def test_a_forward_that_reads_an_attribute_of_a_part() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Block(), nn.Linear(WIDTH, 3)
            self.body.width = WIDTH

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return self.head(y.reshape(-1, self.body.width)) if y.isfinite().all() else y

    model, x = Reading(), rows()
    assert decibels(model(x), convert(prepared_on(model, x, method="static"))(x)) > 25

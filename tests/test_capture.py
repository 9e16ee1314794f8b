"""Which submodules are found, which are left alone, and what a person is told."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Branching, Mlp, Residual, TwoInputs
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_quant import CaptureError, ConfigError
from lightning_quant.arguments import Call
from lightning_quant.backends import fx
from lightning_quant.capture import Capture, Target, find_targets, record_calls
from lightning_quant.config import Method, QuantConfig

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def capture(model: nn.Module, *args: Any, method: Method = "static", run: Any = None, **options: Any) -> Capture:
    recordings = record_calls(model, run or (lambda twin: twin(*args)))
    return find_targets(
        model, recordings, lambda name, m, call: fx.check(m, call, method, QuantConfig()), method=method, **options
    )


def names(found: Capture) -> list[str]:
    return [target.name for target in found.targets]


def model_of(forward: Callable[..., Any], **children: Any) -> nn.Module:
    """A module with these children (and Parameters) and this forward."""
    kind = type("Model", (nn.Module,), {"forward": forward, "__module__": __name__})
    model: nn.Module = kind()
    for name, child in children.items():
        setattr(model, name, child)
    return model


# ---- record_calls


def test_recording_runs_a_copy_and_leaves_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), Mlp())
    model.train()
    model[1].eval()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model.memory = []
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    ran: list[nn.Module] = []

    def run(twin: nn.Module) -> None:
        ran.append(twin)
        assert not any(m.training for m in twin.modules())
        assert not torch.is_grad_enabled()
        twin(X)

    rng = torch.get_rng_state()
    seen = record_calls(model, run)
    assert torch.equal(torch.get_rng_state(), rng)
    assert ran[0] is not model
    assert [m.training for m in model.modules()] == modes
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert len(model[0]._forward_hooks) == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert list(seen) == ["", "0", "1", "2", "2.first", "2.act", "2.second"]
    assert seen["2.first"].within == (frozenset({"", "2"}),)


def test_recording_keeps_the_first_call_as_it_was() -> None:
    def forward(self: Any, a: torch.Tensor, *, scale: float) -> torch.Tensor:
        y = self.fc(a * scale)
        a.zero_()  # the recorded tensor is a copy
        return y

    model = model_of(forward, fc=nn.Linear(4, 2))

    def run(twin: nn.Module) -> None:
        for scale in (2.0, 3.0):
            twin(torch.ones(1, 4), scale=scale)

    seen = record_calls(model, run)
    assert seen[""].call.keywords == {"scale": 2.0}
    assert torch.equal(seen[""].call.args[0], torch.ones(1, 4))
    assert torch.equal(seen["fc"].call.args[0], torch.full((1, 4), 2.0))
    assert len(seen["fc"].within) == 2


def test_forward_that_is_called_by_name_is_recorded() -> None:
    model = model_of(lambda self, x: self.fc.forward(x), fc=nn.Linear(4, 2))
    assert list(record_calls(model, lambda twin: twin.forward(X))) == ["", "fc"]


def test_an_error_of_the_model_is_passed_on_and_leaves_nothing() -> None:
    model = Mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        record_calls(model, lambda twin: twin(torch.ones(1, 9)))
    assert "forward" not in model.__dict__


# ---- the largest submodules


@pytest.mark.parametrize("method", ["static", "qat"])
def test_a_model_that_can_be_traced_is_one_target(method: Method) -> None:
    found = capture(Residual(), torch.randn(1, 3, 8, 8), method=method)
    assert names(found) == [""]
    assert found.targets[0].label == "forward"
    assert found.float_layers == {}


def test_a_branch_on_data_leaves_its_children() -> None:
    assert names(capture(Branching(), X, run=lambda twin: (twin(X.abs()), twin(-X.abs())))) == ["up", "down"]


def test_a_child_that_never_ran_is_named_with_its_reason() -> None:
    found = capture(Branching(), X.abs())
    assert names(found) == ["up"]
    assert set(found.float_layers) == {"down.first", "down.second"}
    assert all(reason.endswith("never called by the validation step") for reason in found.float_layers.values())


def test_a_layer_that_is_called_from_outside_is_not_hidden_in_its_parent() -> None:
    model = model_of(lambda self, x: self.body(x) + self.body.first(x)[:, :3], body=Mlp())
    # the model as a whole reaches every call
    assert names(capture(model, X)) == [""]
    # and where it cannot be traced, the parent of the shared layer would miss a call
    model = model_of(lambda self, x: self.body(x) if x.sum() > 9 else self.body.first(x), body=Mlp())

    def run(twin: nn.Module) -> None:
        twin(X)
        twin(X + 9)

    assert names(capture(model, run=run)) == ["body.first", "body.second"]


def test_a_module_list_is_looked_into() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if x.sum() < 99 else x
        return x

    model = model_of(forward, layers=nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())]))
    assert names(capture(model, X)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_the_model_itself_may_be_a_layer_or_a_container(container: Any) -> None:
    assert names(capture(nn.Linear(4, 2), X)) == [""]
    model = container([Mlp()]) if container is nn.ModuleList else container(Mlp())
    assert names(capture(model, run=lambda twin: twin[0](X))) == ["0"]


def test_weights_of_functions_count() -> None:
    model = model_of(lambda self, x: F.linear(x, self.weight), weight=nn.Parameter(torch.randn(2, 4)))
    assert names(capture(model, X)) == [""]


def test_a_setting_in_the_call_is_kept_in_it() -> None:
    found = capture(TwoInputs(), run=lambda twin: twin(X, b=X, double=True))
    assert found.targets[0].call.keywords["double"] is True


class Batch:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def test_data_inside_of_an_object_is_not_taken_for_a_setting() -> None:
    """A graph would have the example's tensors as constants."""
    model = model_of(lambda self, batch: self.body(batch.x), body=Mlp())
    assert names(capture(model, Batch(X))) == ["body"]


@pytest.mark.parametrize("method", ["static", "qat"])
def test_an_output_may_hold_what_is_no_tensor(method: Method) -> None:
    model = model_of(lambda self, x: {"y": self.body(x), "steps": 3, "names": ["a", None]}, body=Mlp())
    assert names(capture(model, X, method=method)) == [""]


# ---- what is left alone


def test_metrics_and_losses_are_left_alone() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        self.accuracy.update(y, y.argmax(1))
        return self.loss(y, y.argmax(1)) + self.learned(y).sum()

    class Learned(nn.modules.loss._Loss):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return self.fc(y)

    model = model_of(forward, body=Mlp(), accuracy=MulticlassAccuracy(3), loss=nn.CrossEntropyLoss(), learned=Learned())
    found = capture(model, X)
    assert names(found) == ["body"]
    assert found.float_layers == {}


@pytest.mark.parametrize(
    ("method", "expected"),
    [("static", ["conv", "fc", "rnn"]), ("qat", ["conv", "fc", "rnn"]), ("dynamic", ["fc", "rnn"])],
)
def test_what_can_be_quantized_depends_on_the_method(method: Method, expected: list[str]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 99:
            return x
        y = self.conv(x[:, None])[:, 0]
        return self.rnn(self.fc(y)[None])[0]

    model = model_of(forward, conv=nn.Conv1d(1, 1, 3, padding=1), fc=nn.Linear(4, 2), rnn=nn.LSTM(2, 2))
    assert names(capture(model, X, method=method)) == expected


@pytest.mark.parametrize(
    ("own_layer", "prefer_children", "expected"),
    [(False, False, [""]), (False, True, ["body"]), (True, True, [""]), (True, False, [""])],
)
def test_prefer_children(own_layer: bool, prefer_children: bool, expected: list[str]) -> None:
    model = model_of(lambda self, x: self.head(self.body(x)), body=Mlp(), head=nn.Identity())
    if own_layer:
        model.head = nn.Linear(3, 2)
    assert names(capture(model, X, prefer_children=prefer_children)) == expected


# ---- skip and targets


@pytest.mark.parametrize(
    ("skip", "inside"),
    [(("second",), ("second",)), (("*nd",), ("second",)), (("s*", "act"), ("act", "second"))],
)
def test_skip_by_name_or_pattern(skip: tuple[str, ...], inside: tuple[str, ...]) -> None:
    found = capture(Mlp(), X, skip=skip)
    assert names(found) == [""]
    assert found.relative_skips(found.targets[0]) == inside
    assert found.float_layers == {"second": "left float by 'skip'"}


def test_skip_of_a_parent_is_skip_of_all_in_it() -> None:
    model = nn.Sequential(Mlp(), nn.Linear(3, 3))
    found = capture(model, X, skip=("0",))
    assert found.skipped == {"0", "0.first", "0.act", "0.second"}
    assert set(found.float_layers) == {"0.first", "0.second"}


def test_skips_are_written_as_the_target_would() -> None:
    model = model_of(lambda self, x: self.a(x) if x.sum() < 99 else x, a=nn.Sequential(Mlp(), nn.Linear(3, 2)))
    found = capture(model, X, skip=("a.0.second",))
    assert found.relative_skips(Target("a", Call())) == ("0.second",)
    assert found.relative_skips(Target("b", Call())) == ()
    assert found.relative_skips(Target("", Call())) == ("a.0.second",)


@pytest.mark.parametrize(
    ("targets", "expected"), [(("0",), ["0"]), (("1",), ["1"]), (("*",), ["0", "1"]), (("0.second",), ["0.second"])]
)
def test_targets_restrict_the_search(targets: tuple[str, ...], expected: list[str]) -> None:
    found = capture(nn.Sequential(Mlp(), nn.Linear(3, 2)), X, targets=targets)
    assert names(found) == expected
    layers = {"0.first", "0.second", "1"}
    inside = {layer for layer in layers for name in expected if layer == name or layer.startswith(f"{name}.")}
    assert found.float_layers == dict.fromkeys(layers - inside, "not in a target")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"skip": ("secnd",)}, "QuantConfig(skip=...): 'secnd' matches no submodule. Did you mean 'second'?"),
        ({"skip": ("head.*",)}, "QuantConfig(skip=...): 'head.*' matches no submodule. "),
        ({"targets": ("frst",)}, "QuantConfig(targets=...): 'frst' matches no submodule. Did you mean 'first'?"),
        ({"skip": ("second", "nothing")}, "QuantConfig(skip=...): 'nothing' matches no submodule. "),
    ],
)
def test_a_pattern_that_matches_nothing(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
        capture(Mlp(), X, **options)


# ---- nothing to quantize


def test_nothing_quantizable() -> None:
    text = "Sequential has nothing that can be quantized: no convolution or linear layer that its forward reaches."
    with pytest.raises(CaptureError, match=f"^{re.escape(text)}$"):
        capture(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.ReLU()), run=lambda twin: twin[0](X))


def test_nothing_quantizable_says_what_stood_in_the_way() -> None:
    with pytest.raises(CaptureError, match=r"first: left float by 'skip'\n  second: left float by 'skip'$"):
        capture(Mlp(), X, skip=("first", "second"))
    model = model_of(lambda self, x: x, fc=nn.Linear(4, 2))
    with pytest.raises(CaptureError, match=r"\n  fc: its forward is never called by the validation step$"):
        capture(model, X, prefer_children=True, targets=("fc",))

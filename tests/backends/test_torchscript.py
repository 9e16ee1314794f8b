"""TorchScript graph mode: what is traced or scripted becomes int8, and everything else says why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Branching, Mlp, Residual, TwoInputs, calibrated, decibels, settle
from modules import Classifier, Digits, Recurrent, trainer
from roots import pl
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import (
    CalibrationError,
    CaptureError,
    ExportConfig,
    ExportError,
    PostTrainingQuantization,
    QuantConfig,
    convert,
    coverage,
    export,
    load,
    prepare,
)
from lightning_quant.arguments import Call
from lightning_quant.backends import torchscript
from lightning_quant.backends.graph import info, is_graph
from lightning_quant.backends.jit_entries import QConfigs
from lightning_quant.config import Method

TRACE = QuantConfig(backend="torchscript")
SCRIPT = QuantConfig(backend="torchscript", jit="script")
JIT = pytest.mark.parametrize("config", [TRACE, SCRIPT], ids=["trace", "script"])
METHODS = pytest.mark.parametrize("method", ["static", "dynamic"])

#: Six layers, each of which adds its own rounding and that of its input. Each has 8 bits over a range of about eight
#: standard deviations: 6.02 * 8 + 4.77 - 20 * log10(8 / 2) = 41 dB, and 12 equal independent errors cost
#: 10 * log10(12) = 11 dB: 30 dB. Ranges are wider for heavy tails, which is what the last 5 dB are for.
STATIC_DB = 25.0


class Functional(nn.Module):
    """Functional and transposed layers, cat, add, dropout, a reused ReLU. ``(N, 3, 16, 16)`` to ``(N, 5)``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(8, 3, 3, 3))
        self.bias = nn.Parameter(0.1 * torch.randn(8))
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU()
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.up_weight = nn.Parameter(0.2 * torch.randn(8, 4, 2, 2))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        left = self.relu(self.left(x))
        right = self.relu(self.right(x))
        x = F.max_pool2d(torch.cat([left, right], 1), 2)
        x = F.relu(self.up(x)) + left
        x = F.dropout(x, 0.5, self.training)
        x = F.conv_transpose2d(x, self.up_weight, stride=2)
        return self.head(x.mean((2, 3)))


class Tagger(nn.Module):
    """Words ``(N, T)`` to tags ``(N, T, 5)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(words))
        return self.head(states)


class Encoder(nn.Module):
    """``(N, T, 12)`` to ``(N, 5)``."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embed = nn.Linear(12, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class UpAndDown(nn.Module):
    """Doubles the sides and gives scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.up(F.relu(self.conv(x)))).mean((2, 3)))


def int8_of(model: nn.Module, x: torch.Tensor, config: QuantConfig = TRACE, method: Method = "static") -> Any:
    return convert(calibrated(model, x, method=method, config=config))


def kernels_of(converted: Any) -> list[str]:
    """The operators of a converted program, in order."""
    graph = converted.script.graph
    torch._C._jit_pass_inline(graph)
    return [node.kind() for node in graph.nodes() if node.kind().startswith(("aten::", "quantized::"))]


# ---- networks


@JIT
@METHODS
@pytest.mark.parametrize(
    ("build", "shape"),
    [(Functional, (16, 3, 16, 16)), (lambda: settle(Residual()), (32, 3, 8, 8)), (Mlp, (32, 4))],
    ids=["functional", "residual", "mlp"],
)
def test_networks_of_convolutions_and_linear_layers(
    build: Any, shape: tuple[int, ...], method: Method, config: QuantConfig
) -> None:
    model, x = build().eval(), torch.randn(shape)
    converted = int8_of(model, x, config, method)
    assert is_graph(converted)
    assert decibels(model(x), converted(x)) >= STATIC_DB
    assert converted(x[:1]).shape == model(x[:1]).shape


@JIT
def test_all_of_a_residual_network_is_int8(config: QuantConfig) -> None:
    model, x = settle(Residual()), torch.randn(32, 3, 8, 8)
    converted = int8_of(model, x, config)
    assert coverage(converted, x).share == 1.0
    kernels = kernels_of(converted)
    assert kernels.count("quantized::add_relu") == 2
    # of the input, and behind the average of a traced graph; a scripted one is torch's alone
    assert kernels.count("aten::quantize_per_tensor") == (2 if config.jit == "trace" else 1)


@JIT
@METHODS
def test_recurrent_layers_stay_float_with_a_reason(method: Method, config: QuantConfig) -> None:
    model, x = Tagger().eval(), torch.randint(0, 20, (8, 12))
    converted = int8_of(model, x, config, method)
    says = {
        "static": "TorchScript graph mode has no int8 kernel for recurrent layers; use backend='fx' or 'eager'",
        "dynamic": "TorchScript graph mode quantizes Linear only dynamically; use backend='fx' or 'eager'",
    }
    assert info(converted).float_layers == {"lstm": says[method]}
    assert decibels(model(x), converted(x)) >= STATIC_DB
    # 32 states by 5 tags are int8; each direction multiplies 16 inputs and 16 states by 4 gates of 16
    assert coverage(converted, x).share == pytest.approx(32 * 5 / (32 * 5 + 2 * 4 * 16 * 32))


@METHODS
def test_a_traced_transformer_is_int8_but_for_its_sums_and_norms(method: Method) -> None:
    model, x = Encoder().eval(), torch.randn(8, 10, 12)
    converted = int8_of(model, x, TRACE, method)
    assert is_graph(converted)
    assert coverage(converted, x).share == 1.0
    assert "quantized::layer_norm" not in kernels_of(converted)
    assert decibels(model(x), converted(x)) >= STATIC_DB


@METHODS
def test_scripted_attention_is_refused(method: Method) -> None:
    model, x = nn.Sequential(nn.Linear(12, 8), Attention()).eval(), torch.randn(4, 6, 12)
    with pytest.raises(
        CaptureError,
        match=r"1\.attention is a scripted MultiheadAttention, on which torch's TorchScript graph mode ends the "
        r"process\. Use jit='trace', or backend='fx'",
    ):
        torchscript.check(model, Call((x,)), method, SCRIPT)
    converted = int8_of(model, x, SCRIPT, method)
    assert is_graph(converted.get_submodule("0.graph"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


# ---- decisions by the data


def test_a_trace_keeps_no_decision() -> None:
    model, x = Branching().eval(), torch.rand(16, 4)
    with pytest.raises(
        CaptureError,
        match=r"a trace would keep what this call decided: .*models\.py:\d+: Converting a tensor to a Python boolean "
        r".*\. With jit='script' decisions stay\.",
    ):
        torchscript.check(model, Call((x,)), "static", TRACE)
    converted: Any = int8_of(model, x)
    assert not is_graph(converted)
    assert decibels(model(x), converted(x)) >= STATIC_DB
    # the other part was never called with data of the first kind: it stays float, and is still chosen
    torch.testing.assert_close(converted(-x), model(-x))


def test_a_script_keeps_decisions() -> None:
    model, x = Branching().eval(), torch.rand(64, 4)
    prepared = prepare(model, SCRIPT, method="static", example_inputs=x)
    with torch.no_grad():
        prepared(x)
        prepared(-x)
    converted = convert(prepared)
    assert is_graph(converted)
    for data in (x, -x):
        assert decibels(model(data), converted(data)) >= STATIC_DB


def test_a_branch_that_no_data_took_is_refused() -> None:
    prepared = calibrated(Branching().eval(), torch.rand(8, 4), config=SCRIPT)
    with pytest.raises(
        CalibrationError,
        match=r"\d observers saw no data \(the first: .*_observer_\d+\), others did: they stand in a branch that no "
        r"calibration data took, .* Calibrate with data that takes every branch, or leave the part with the branch in "
        r"float with QuantConfig\(skip=\.\.\.\)\.",
    ):
        convert(prepared)


class Settings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, double: bool = False) -> torch.Tensor:
        if mask is not None:
            x = x * mask
        y = self.fc(x)
        if double:
            y = y + y
        return y


@JIT
@pytest.mark.parametrize("named", [{}, {"double": True}, {"mask": torch.ones(4)}], ids=["none", "setting", "tensor"])
def test_settings_are_those_of_the_call(named: dict[str, Any], config: QuantConfig) -> None:
    model, x = Settings().eval(), torch.randn(32, 4)
    prepared = prepare(model, config, method="static", example_inputs={"x": x, **named})
    data = {"x": x, **{k: v for k, v in named.items() if isinstance(v, torch.Tensor)}}
    with torch.no_grad():
        prepared(**data)
    assert decibels(model(x, **named), convert(prepared)(**data)) >= STATIC_DB


class ByDimensions(nn.Module):
    """No proxy of torch.fx has a number of dimensions; a trace of torch.jit does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 3:
            x = x.flatten(1)
        return self.second(F.relu(self.first(x)))


@METHODS
def test_what_torch_fx_cannot_trace_is_traced_as_it_is(method: Method) -> None:
    model, x = ByDimensions().eval(), torch.randn(32, 4)
    converted = int8_of(model, x, TRACE, method)
    assert is_graph(converted)
    assert coverage(converted, x).share == 1.0
    assert decibels(model(x), converted(x)) >= STATIC_DB
    rows = coverage(int8_of(model, x, QuantConfig(backend="torchscript", skip=("first",)), method), x).rows
    assert [row.int8 for row in rows] == [False, True]


class Flagged(nn.Module):
    """A branch on an attribute, as residual blocks have."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shortcut:
            return x + self.fc(x)
        return self.fc(x)


@JIT
def test_branches_on_attributes_are_decided(config: QuantConfig) -> None:
    model, x = nn.Sequential(Flagged(False), nn.ReLU(), Flagged(True)).eval(), torch.randn(32, 4)
    converted = int8_of(model, x, config)
    assert is_graph(converted)
    assert "prim::If" not in str(converted.script.inlined_graph)
    assert decibels(model(x), converted(x)) >= STATIC_DB
    assert "__constants__" not in model[0].__dict__


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


def test_a_module_that_carries_state_is_not_traced() -> None:
    with pytest.raises(CaptureError, match=r"its forward changes self\.calls: it carries state from call to call"):
        torchscript.check(Counting().eval(), Call((torch.randn(4, 4),)), "static", TRACE)


class NoScript(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = [self.fc(x)]
        return sum(y, start=torch.zeros(()))


def test_what_cannot_be_scripted_says_where() -> None:
    model, x = NoScript().eval(), torch.randn(16, 4)
    with pytest.raises(CaptureError, match=r"cannot be scripted: .*test_torchscript\.py:\d+: "):
        torchscript.check(model, Call((x,)), "static", SCRIPT)
    converted: Any = int8_of(model, x, SCRIPT)
    assert is_graph(converted.fc.graph)


class Unused(nn.Module):
    """Torch's pass adds observers to the type of a layer, and would read beyond the end of one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize("scripted", [False, True])
def test_modules_that_are_never_called(scripted: bool) -> None:
    model, x = Unused().eval(), torch.randn(32, 4)
    converted = int8_of(torch.jit.script(model) if scripted else model, x, SCRIPT)
    assert decibels(model(x), converted(x)) >= STATIC_DB


# ---- what is scripted already


@METHODS
@pytest.mark.parametrize("traced", [False, True])
def test_a_scripted_model_is_quantized_as_it_is(traced: bool, method: Method) -> None:
    model, x = settle(Residual()), torch.randn(32, 3, 8, 8)
    script: Any = torch.jit.trace(model, x[:2]) if traced else torch.jit.script(model)
    code = script.code
    converted = int8_of(script, x, TRACE, method)
    assert is_graph(converted)
    assert decibels(model(x), converted(x)) >= STATIC_DB
    assert coverage(converted, x).share == 1.0 if method == "static" else 0 < coverage(converted, x).share < 1
    assert script.code == code
    assert torch.equal(script(x), model(x))


def test_a_scripted_part_is_quantized_within_its_parent() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), torch.jit.script(settle(Residual()))).eval()
    x = torch.randn(32, 3, 8, 8)
    converted = int8_of(model, x)
    assert is_graph(converted)
    assert coverage(converted, x).share == 1.0
    assert decibels(model(x), converted(x)) >= STATIC_DB


def test_layers_whose_kernel_cannot_be_asked_about_stay_float() -> None:
    model, x = UpAndDown().eval(), torch.randn(16, 3, 8, 8)
    prepared = calibrated(torch.jit.script(model), x, config=TRACE)
    converted = convert(prepared, TRACE)
    assert info(converted).float_layers == {
        "up": "it was scripted before, and does not tell which int8 kernel would run it"
    }
    if info(converted).config.engine != "qnnpack":  # which never saturates
        limits = [part.quant_max for name, part in prepared.script.named_modules() if "conv._observer" in name]
        assert limits == [63]
    assert decibels(model(x), converted(x)) >= STATIC_DB


def test_in_a_traced_parent_scripted_attention_is_refused_too() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), torch.jit.script(Attention().eval())).eval(), torch.randn(4, 6, 8)
    with pytest.raises(CaptureError, match=r"attention is a scripted MultiheadAttention"):
        torchscript.check(model, Call((x,)), "static", TRACE)


def test_scripted_parts_of_a_traced_parent_are_quantized_with_care() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(UpAndDown().eval())), torch.randn(16, 3, 8, 8)
    converted = int8_of(model.eval(), x)
    assert is_graph(converted)
    assert "quantized::conv_transpose2d" not in kernels_of(converted)
    assert decibels(model(x), converted(x)) >= STATIC_DB


@METHODS
def test_a_scripted_child_of_a_lightning_module(method: Method) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    module = Classifier(torch.jit.script(net.eval()))
    names = list(module.state_dict())
    callback = PostTrainingQuantization(TRACE, method=method, export=ExportConfig(formats=("torchscript",)))
    trainer(callback).validate(module, datamodule=Digits(), verbose=False)
    report: Any = callback.report
    assert report.targets == ["net"]
    assert isinstance(module.net, torch.jit.ScriptModule)
    assert list(module.state_dict()) == names
    assert report.sqnr_db >= STATIC_DB
    int8: Any = copy.deepcopy(callback.quantized_model)
    assert list(int8.parameters()) == []
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(load(report.artifacts["torchscript"])(images), int8(images))


@METHODS
def test_fx_says_that_a_scripted_module_is_for_this_backend(method: Method) -> None:
    with pytest.raises(CaptureError, match="it is scripted already: backend='torchscript' quantizes it as it is"):
        prepare(torch.jit.script(Mlp().eval()), method=method, example_inputs=torch.randn(4, 4))


# ---- layers


@JIT
def test_transposed_convolutions_have_one_scale_or_stay_float(config: QuantConfig) -> None:
    model, x = UpAndDown().eval(), torch.randn(16, 3, 8, 8)
    converted = int8_of(model, x, config)
    kernels = kernels_of(converted)
    if "up" in info(converted).float_layers:  # this CPU's kernel is wrong
        assert "quantized::conv_transpose2d" not in kernels
    else:
        assert "quantized::conv_transpose2d" in kernels
    assert decibels(model(x), converted(x)) >= STATIC_DB


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.Conv2d])
def test_weights_have_a_scale_for_each_channel_but_transposed_ones(kind: type[nn.Module]) -> None:
    qconfig = QConfigs(QuantConfig(backend="torchscript", engine="fbgemm", reduce_range=True), "static")
    observer: Any = qconfig.of(kind).weight()
    per_tensor = kind is nn.ConvTranspose2d
    assert observer.original_name == ("MinMaxObserver" if per_tensor else "PerChannelMinMaxObserver")


@JIT
@METHODS
def test_skipped_layers_are_float(method: Method, config: QuantConfig) -> None:
    model, x = Mlp().eval(), torch.randn(32, 4)
    skipping = QuantConfig(backend="torchscript", jit=config.jit, skip=("second",))
    rows = coverage(int8_of(model, x, skipping, method), x).rows
    assert [row.int8 for row in rows] == [True, False]


# ---- the protocol


@JIT
def test_copies_have_their_observations(config: QuantConfig) -> None:
    model, x = settle(Residual()), torch.randn(32, 3, 8, 8)
    prepared = calibrated(model, x, config=config)
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    twin = copy.deepcopy(prepared)
    with torch.no_grad():
        twin(100 * x)
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())
    converted = convert(prepared)
    again = convert(copy.deepcopy(prepared))
    assert torch.equal(converted(x), again(x))
    assert torch.equal(copy.deepcopy(converted)(x), converted(x))
    assert not converted.training
    assert not copy.deepcopy(converted).train().eval().training


@JIT
def test_observers_without_data(config: QuantConfig) -> None:
    prepared = prepare(Mlp().eval(), config, method="static", example_inputs=torch.randn(4, 4))
    with pytest.raises(
        CalibrationError, match=r"\d observers saw no data \(the first: .*_observer_\d\), so that there"
    ):
        convert(prepared)


@JIT
@METHODS
def test_files_compute_what_the_model_computes(method: Method, config: QuantConfig, tmp_path: Path) -> None:
    model, x = settle(Residual()), torch.randn(32, 3, 8, 8)
    prepared = calibrated(model, x, method=method, config=config)
    files = export(prepared, None, ExportConfig(directory=str(tmp_path)), x)
    loaded = load(files["torchscript"])
    converted = convert(prepared)
    for data in (x, x[:1], x[:7]):
        torch.testing.assert_close(loaded(data), converted(data))


def test_debug_keeps_weights_as_attributes() -> None:
    model, x = Mlp().eval(), torch.randn(32, 4)
    debug = QuantConfig(backend="torchscript", debug=True)
    converted = int8_of(model, x, debug)
    assert "script.traced.first.0.weight" in dict(converted.named_parameters())  # with its ReLU
    assert "aten::dequantize" in kernels_of(converted)
    assert not any(kernel.startswith("quantized::") for kernel in kernels_of(converted))
    # the same integers: only the order of float sums differs, and with it now and then the last step of 256
    assert decibels(int8_of(model, x)(x), converted(x)) >= STATIC_DB


def test_there_is_no_neutral_form() -> None:
    prepared = calibrated(Mlp().eval(), torch.randn(4, 4), config=TRACE)
    with pytest.raises(ExportError, match=r"backend='torchscript' writes TorchScript files only: .* Use backend='fx'"):
        torchscript.reference(prepared)


@METHODS
def test_the_model_keeps_its_structure(method: Method) -> None:
    model = Mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrated(model, torch.randn(4, 4), method=method, config=TRACE)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@JIT
def test_keywords_and_dicts(config: QuantConfig) -> None:
    model, a, b = TwoInputs().eval(), torch.randn(32, 4), torch.randn(32, 4)
    prepared = prepare(model, config, method="static", example_inputs={"a": a, "b": b})
    with torch.no_grad():
        prepared(a, b=b)
    converted = convert(prepared)(a, b=b)
    assert converted.keys() == {"sum", "left"}
    assert decibels(model(a, b=b)["sum"], converted["sum"]) >= STATIC_DB
    if config is TRACE:
        with pytest.raises(TypeError, match=r"takes a, b; was given 1 of them and \[\]"):
            prepared(a)
    else:  # TorchScript has no arguments that are keywords only: its layers are the targets
        assert not is_graph(prepared)


# ---- with a Trainer


class Joined(pl.LightningModule):
    """Two inputs, one of them inside of a dict, and a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 16)
        self.right = nn.Linear(4, 16)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(16, 3))

    def forward(self, a: torch.Tensor, *, b: dict[str, torch.Tensor], double: bool = False) -> dict[str, torch.Tensor]:
        y = self.left(a) + self.right(b["x"])
        return {"out": self.head(y * 2 if double else y)}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        a, b, target = batch
        self.log("val_loss", F.mse_loss(self(a, b={"x": b}, double=True)["out"], target))

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(40, 8), torch.randn(40, 4), torch.randn(40, 3)), batch_size=16)


@JIT
@METHODS
def test_a_module_with_several_inputs(method: Method, config: QuantConfig) -> None:
    callback = PostTrainingQuantization(config, method=method)
    trainer(callback).validate(Joined(), verbose=False)
    report: Any = callback.report
    # a LightningModule is no TorchScript: its parts are
    assert report.targets == (["forward"] if config.jit == "trace" else ["left", "right", "head"])
    assert report.coverage == 1.0
    assert report.sqnr_db >= STATIC_DB
    assert set(report.artifacts) == {"torchscript"}
    assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.05)


def test_the_report_says_why_a_layer_inside_of_a_program_is_float() -> None:
    callback = PostTrainingQuantization(TRACE, method="dynamic")
    trainer(callback).validate(Classifier(Recurrent()), datamodule=Digits(), verbose=False)
    report: Any = callback.report
    reason = "TorchScript graph mode quantizes Linear only dynamically; use backend='fx' or 'eager'"
    assert report.float_layers == {"net.lstm": reason}
    assert report.coverage < 0.5


@JIT
def test_the_demo_after_training(config: QuantConfig) -> None:
    from lightning_quant.demo import Digits as Images
    from lightning_quant.demo import DigitsClassifier

    callback = PostTrainingQuantization(config)
    module = DigitsClassifier(8)
    trainer(callback, limit_train_batches=8, limit_val_batches=2).fit(module, datamodule=Images())
    report: Any = callback.report
    assert report.targets == ["model"]
    assert report.coverage == 1.0
    assert report.sqnr_db >= STATIC_DB
    assert report.size_bytes_int8 == Path(report.artifacts["torchscript"]).stat().st_size
    tested = trainer(limit_val_batches=2).validate(callback.quantized_model, datamodule=Images(), verbose=False)[0]
    assert tested["val_acc"] == pytest.approx(report.metrics_int8["val_acc"])

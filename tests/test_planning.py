"""The plan of a model says what is done with it, and is a config that does it; edited, it does what is edited."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import modules
import pytest
import torch
import yaml
from models import Branching, Residual, TwoInputs, settle
from torch import nn
from torch.nn import functional as F

from lightning_quant import (
    ConfigError,
    ExportConfig,
    LayerConfig,
    Plan,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    plan,
    recipes,
)
from lightning_quant.config import resolve
from lightning_quant.qconfig import QUANTIZABLE, in_words, layer_qconfig

IMAGES = torch.randn(4, 3, 8, 8)


class Mixed(nn.Module):
    """Takes ``(N, length)`` tokens: a layer of each kind, a functional one, a tied one, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.enc = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.unused = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.randn(5, 16))
        self.tied = nn.Linear(16, 20, bias=False)
        self.tied.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, _ = self.lstm(self.enc(self.emb(x)))
        y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        return F.linear(y, self.weight), self.tied(y)


TOKENS = torch.randint(0, 20, (2, 7))


def facts(found: Plan) -> list[Any]:
    """What it says of each layer, but where an entry came from."""
    return [replace(layer, entry=None, reason="") for layer in found.layers] + list(found.functions)


def edited(found: Plan, name: str, before: str, after: str) -> QuantConfig:
    """The config of the plan's file with one line changed by hand."""
    found.write("plan.yaml")
    lines = Path("plan.yaml").read_text(encoding="utf8").splitlines()
    number = lines.index(f"- name: {name}") + 1
    assert lines[number] == f"  {before}"
    lines[number] = f"  {after}"
    Path("edited.yaml").write_text("\n".join(lines), encoding="utf8")
    return recipes.load("edited.yaml")


# ---- it is what is done


def test_each_layer_by_hand() -> None:
    found = plan(settle(Residual(width=8)), QuantConfig(skip=("fc",)), example_inputs=IMAGES)
    rows = {layer.name: layer for layer in found.layers}
    assert list(rows) == ["stem", *(f"blocks.{b}.conv{c}" for b in (0, 1) for c in (1, 2)), "fc"]
    pixels = 4 * 8 * 8
    assert rows["stem"].macs == pixels * 8 * 3 * 9
    assert rows["blocks.1.conv2"].macs == pixels * 8 * 8 * 9
    assert rows["fc"].macs == 4 * 8 * 5
    assert rows["stem"].group[:2] == ("stem", "bn")
    assert [layer.int8 for layer in found.layers] == [True] * 5 + [False]
    assert (rows["fc"].reason, rows["stem"].reason) == ("left float by 'skip'", "")
    total = pixels * (8 * 27 + 4 * 8 * 72) + 160
    assert found.coverage == pytest.approx(1 - 160 / total)
    assert rows["stem"].type == "Conv2d"
    weight = TensorSpec(dtype="qint8", qscheme="per_channel_symmetric", observer="balanced")
    assert rows["stem"].weight == weight
    assert rows["stem"].activation == TensorSpec(dtype="quint8", qscheme="per_tensor_affine", observer="histogram")


def test_it_is_what_the_report_says() -> None:
    module = modules.ConvClassifier()
    config = QuantConfig(skip=("conv",))
    found = plan(module, config, datamodule=modules.Digits())
    callback = modules.ptq(config)
    modules.trainer(callback).validate(module, datamodule=modules.Digits(), verbose=False)
    assert found.coverage == pytest.approx(callback.report.coverage)
    assert {layer.name: layer.reason for layer in found.layers if not layer.int8} == callback.report.float_layers
    groups = {layer.group for layer in found.layers if layer.group}
    assert groups <= set(callback.report.fused)
    assert found.resolved.reduce_range == callback.report.config["reduce_range"]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (kind, method)
        for kind in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LSTM)
        for method in ("static", "qat", "dynamic")
        if kind in QUANTIZABLE[method]
    ],
)
@pytest.mark.parametrize("config", [QuantConfig(), recipes.mobile_qnnpack], ids=["x86", "qnnpack"])
def test_words_are_what_torch_is_given(config: QuantConfig, kind: Any, method: Any) -> None:
    config = resolve(config)
    activation, weight = in_words(config, method, kind)
    made = layer_qconfig(config, method, kind)
    observer = made.weight()
    observer = getattr(observer, "activation_post_process", observer)
    assert f"torch.{weight.qscheme}" == str(observer.qscheme)
    assert f"torch.{weight.dtype}" == str(observer.dtype)
    given = made.activation()
    assert getattr(given, "is_dynamic", False) is (activation is None)
    if activation is not None:
        assert (f"torch.{activation.qscheme}", f"torch.{activation.dtype}") == (str(given.qscheme), str(given.dtype))
        assert activation.observer == ("histogram" if method == "static" else "moving_average")


# ---- the file is a config


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(Mixed, TOKENS), (Branching, torch.randn(2, 4)), (TwoInputs, {"a": torch.randn(2, 4), "b": torch.randn(2, 4)})],
)
@pytest.mark.parametrize(
    ("backend", "method"),
    [
        *(("fx", method) for method in ("static", "qat", "dynamic")),
        ("eager", "static"),
        ("torchscript", "static"),
        ("torchscript", "dynamic"),
        ("pt2e", "static"),
    ],
)
def test_unedited_it_changes_nothing(
    backend: Any, method: Any, model: Any, inputs: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = model().eval()
    found = plan(network, QuantConfig(backend=backend), method, example_inputs=inputs)
    found.write("a/plan.yaml")
    config = recipes.load("a/plan.yaml")
    assert config == found.edited
    assert facts(plan(network, config, method, example_inputs=inputs)) == facts(found)
    capfd.readouterr()  # torch.export prints the graph that it cannot follow


def test_every_layer_of_a_mixed_model() -> None:
    found = plan(Mixed().eval(), method="dynamic", example_inputs=TOKENS)
    rows = {layer.name: layer for layer in found.layers}
    assert [name for name, row in rows.items() if row.int8] == [
        "emb", "enc.self_attn", "enc.linear1", "enc.linear2", "lstm", "tied",
    ]  # fmt: skip
    assert rows["conv"].reason == "method 'dynamic' has no int8 kernel for a Conv1d"
    assert rows["unused"].reason == "the batch does not run it"
    assert [(row.name, row.macs, row.int8) for row in found.functions] == [("forward", 2 * 7 * 16 * 5, True)]
    text = found.to_yaml()
    # what is a fact, and no choice, has no entry
    assert "- name: conv\n" not in text
    assert "# conv: Conv1d, 10.75 k multiply-accumulates" in text
    assert "#   in float: method 'dynamic' has no int8 kernel for a Conv1d" in text
    assert "# in the forward of forward, by a function: aten::mm, 1.12 k multiply-accumulates" in text


def test_entries_of_the_users_stay() -> None:
    layers = (
        LayerConfig(type="torch.nn.BatchNorm2d", activation=TensorSpec(observer="min_max")),
        LayerConfig(name="blocks.0", keep=True),
        LayerConfig(name="*.conv1", weight=TensorSpec(qscheme="per_tensor_symmetric")),
        LayerConfig(name="fc", activation=TensorSpec(observer="percentile", percentile=99.0)),
    )
    found = plan(settle(Residual()), QuantConfig(layers=layers), example_inputs=IMAGES)
    assert found.edited.layers[:3] == layers[:3]
    assert LayerConfig(name="fc", dtype="int8", activation=layers[3].activation) in found.edited.layers
    assert LayerConfig(name="blocks.1.conv1", dtype="int8", weight=layers[2].weight) in found.edited.layers
    assert "blocks.0.conv1" not in {entry.name for entry in found.edited.layers}
    rows = {layer.name: layer for layer in found.layers}
    assert rows["blocks.0.conv1"].reason.startswith("kept whole")
    assert rows["blocks.1.conv1"].weight.qscheme == "per_tensor_symmetric"
    found.write("plan.yaml")
    assert recipes.load("plan.yaml") == found.edited
    assert "quint8 per_tensor_affine, percentile 99" in Path("plan.yaml").read_text(encoding="utf8")


def test_a_model_without_entries_is_a_config_too() -> None:
    found = plan(
        nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(4, 4)), method="dynamic", example_inputs=torch.randn(1, 2, 4)
    )
    found = replace(found, layers=found.layers[:1])
    assert yaml.safe_load(found.to_yaml())["layers"] == []


# ---- edited


@pytest.mark.parametrize("backend", ["fx", "eager", "torchscript", "pt2e"])
def test_int8_to_float_in_one_line(backend: Any) -> None:
    model = settle(Residual())
    found = plan(model, QuantConfig(backend=backend), example_inputs=IMAGES)
    after = plan(model, edited(found, "blocks.0.conv2", "dtype: int8", "dtype: float"), example_inputs=IMAGES)
    assert {layer.name: layer.reason for layer in after.layers if not layer.int8} == {
        "blocks.0.conv2": "left float by 'layers'"
    }
    share = next(layer.macs for layer in found.layers if layer.name == "blocks.0.conv2") / found._total()
    assert after.coverage == pytest.approx(1 - share)


def test_float_to_int8_in_one_line() -> None:
    """Also where a pattern of ``skip`` had left it in float, which stays for the others."""
    model = settle(Residual())
    found = plan(model, QuantConfig(skip=("blocks.*",)), example_inputs=IMAGES)
    config = edited(found, "blocks.0.conv2", "dtype: float", "dtype: int8")
    assert config.skip == ("blocks.*",)
    after = plan(model, config, example_inputs=IMAGES)
    assert [layer.name for layer in after.layers if layer.int8] == ["stem", "blocks.0.conv2", "fc"]


def test_other_settings_of_one_layer() -> None:
    model = settle(Residual())
    found = plan(model, example_inputs=IMAGES)
    config = edited(found, "fc", "dtype: int8", "weight: {qscheme: per_tensor_symmetric}")
    after = plan(model, config, example_inputs=IMAGES)
    assert [layer.weight.qscheme for layer in after.layers] == ["per_channel_symmetric"] * 5 + ["per_tensor_symmetric"]


def test_a_line_that_cannot_be() -> None:
    config = QuantConfig(layers=(LayerConfig(name="conv", dtype="int8"),))
    text = (
        "LayerConfig(name='conv', dtype='int8'): it stays in float: method 'dynamic' has no int8 kernel for a Conv1d. "
        "Leave out this entry, or give dtype='float'."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        plan(Mixed().eval(), config, "dynamic", example_inputs=TOKENS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers:\n- name: fc\n  dtype: int7\n", r"^bad.yaml: this is no QuantConfig\. (?s:.*)dtype(?s:.*)int7"),
        ("layers:\n- name: fc\n  dtipe: int8\n", r"^bad.yaml: this is no QuantConfig\. (?s:.*)dtipe"),
        ("backend: fy\n", r"^bad.yaml: this is no QuantConfig\. (?s:.*)'fx', 'eager', 'torchscript', 'pt2e'(?s:.*)fy"),
        ("weight: {dtype: quint8}\n", r"^QuantConfig\(weight.dtype='quint8'\)"),
    ],
)
def test_a_file_with_a_mistake(text: str, message: str) -> None:
    Path("bad.yaml").write_text(text, encoding="utf8")
    with pytest.raises(ConfigError, match=message):
        recipes.load("bad.yaml")


def test_no_inputs() -> None:
    text = "plan(Residual): give example_inputs: only a LightningModule brings data."
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        plan(Residual())


# ---- plan_only


@pytest.mark.parametrize("kind", [PostTrainingQuantization, QuantizationAwareTraining])
def test_the_callbacks_write_it_and_training_is_float_training(kind: Any) -> None:
    def trained(*callbacks: Any) -> Any:
        torch.manual_seed(0)
        module = modules.ConvClassifier()
        modules.trainer(*callbacks, max_epochs=1, limit_train_batches=3).fit(module, datamodule=modules.Digits())
        return module

    callback = kind(QuantConfig(skip=("conv",)), export=ExportConfig(directory="out"), plan_only=True)
    module, without = trained(callback), trained()
    assert modules.different(modules.weights(module), modules.weights(without)) == []
    assert modules.surface(module) == modules.surface(without)
    assert [path.name for path in Path("out").iterdir()] == ["plan.yaml"]
    assert callback.report is None
    assert recipes.load("out/plan.yaml") == callback.plan.edited
    assert callback.plan.method == ("static" if kind is PostTrainingQuantization else "qat")
    assert "one batch of the validation data" in Path("out/plan.yaml").read_text(encoding="utf8")


def test_with_validate_and_test_and_fast_dev_run() -> None:
    callback = PostTrainingQuantization(export=ExportConfig(directory="out"), plan_only=True)
    module, datamodule = modules.ConvClassifier(), modules.Digits()
    trainer = modules.trainer(callback, fast_dev_run=True)
    trainer.validate(module, datamodule=datamodule, verbose=False)
    assert callback.plan is not None
    assert [path.name for path in Path("out").iterdir()] == ["plan.yaml"]
    trainer.test(module, datamodule=datamodule, verbose=False)
    assert callback.quantized_model is None


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_without_validation_data_and_without_forward() -> None:
    """The targets alone are run, by what the training step gave them."""
    callback = QuantizationAwareTraining(export=ExportConfig(directory="out"), plan_only=True)
    module = modules.StepsOnly()
    modules.trainer(callback, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(
        module, modules.train_loader()
    )
    batch = len(next(iter(modules.train_loader()))[0])
    assert callback.plan.source == "training_step"
    assert [(layer.name, layer.int8, layer.macs) for layer in callback.plan.layers] == [
        ("encoder.0", True, batch * 64 * 8 * 9),
        ("head", True, batch * 128 * 10),
    ]

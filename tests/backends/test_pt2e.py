"""PT2E: export, observers placed by our quantizer, training through torchao's fake quantizes, QDQ programs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Block, Mlp, Residual
from modules import Classifier, Digits, convnet, trainer, weights

from torch import nn
from torch.nn import functional as F

from lightning_quant import (
    CaptureError,
    ConfigError,
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    convert,
    coverage,
    export,
    load,
    prepare,
)
from lightning_quant._torch_ao import is_fake_quantize
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.backends.graph import followers, info, link, observers, sees_weights
from lightning_quant.phases import freeze_batch_norm, load_observer_state, observer_state, set_observing

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'lightning-quant[pt2e]'")

PT2E = QuantConfig(backend="pt2e")


class Functions(nn.Module):
    """Takes ``(N, 3, 8, 8)``, gives ``(N, 5)``: functions, a concatenation, a sum, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.bias = nn.Parameter(torch.randn(6))
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(12, 12, 2, stride=2, groups=2)
        self.relu = nn.ReLU()
        self.matrix = nn.Parameter(torch.randn(12, 5) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.bias, padding=1))
        y = self.relu(self.norm(self.up(x)))
        z = F.max_pool2d(y, 2)
        x = torch.cat([z + x, z], 1)
        x = self.relu(self.down(x))
        x = F.dropout(x.mean((2, 3)), 0.3, self.training)
        return x @ self.matrix


class Odd(nn.Module):
    """Takes ``(N, 3, 8, 8)``, gives ``(N, 5)``. Batch norms and dropouts are not at their defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.drop = nn.Dropout(0.2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.bn_up = nn.BatchNorm2d(8, eps=1e-2, momentum=0.2)
        self.alone = nn.BatchNorm2d(8, eps=1e-3, momentum=0.05)
        self.fc = nn.Linear(8, 5)
        self.bn_fc = nn.BatchNorm1d(5, eps=1e-3, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.relu_(self.bn(self.conv(x))))
        x = self.alone(F.gelu(self.bn_up(self.up(x))))
        return self.bn_fc(self.fc(F.dropout(x.mean((2, 3)), 0.4, self.training)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.embed(x))[0])


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def settled(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(*(torch.randn_like(x) if x.is_floating_point() else x for x in inputs))
    return model.eval()


def calibrated(model: nn.Module, example: torch.Tensor, config: QuantConfig = PT2E, method: Any = "static") -> Any:
    prepared = prepare(model, config, method=method, example_inputs=example)
    with torch.no_grad():
        for _ in range(4):
            prepared(torch.randn_like(example) if example.is_floating_point() else torch.randint_like(example, 20))
    return prepared


IMAGES, ROWS, TOKENS, SEQUENCES = (
    torch.randn(4, 3, 8, 8), torch.randn(4, 4), torch.randint(0, 20, (4, 6)), torch.randn(4, 6, 16),
)  # fmt: skip

NETS: Any = {
    "functions": (Functions, IMAGES),
    "odd": (Odd, IMAGES),
    "residual": (Residual, IMAGES),
    "mlp": (Mlp, ROWS),
    "tagger": (Tagger, TOKENS),
    "transformer": (transformer, SEQUENCES),
}


# ---- every net, every method


@pytest.mark.parametrize("net", NETS)
def test_static_gives_what_float_gives(net: str) -> None:
    make, example = NETS[net]
    model = settled(make(), example)
    converted = convert(calibrated(model, example))
    with torch.no_grad():
        # 8 bits give 40 dB and more on one layer; over the few layers here roundings add up to less than 15 dB
        assert sqnr_db(model(example), converted(example)) > 25
        for rows in (1, 3, 64):
            data = example[torch.arange(rows) % 4]
            assert sqnr_db(model(data), converted(data)) > 25
    found = coverage(converted, example)
    expected = {"tagger": 32 / (32 + 512)}.get(net, 1.0)  # the linear layer: 8 * 4 of 8 * 4 + 4 * 8 * (8 + 8)
    assert found.share == pytest.approx(expected)
    assert not any("observer" in type(module).__name__.lower() for module in converted.modules())
    assert {x.dtype for x in converted.state_dict().values() if x.dim() > 1} <= {torch.int8, torch.float32}


@pytest.mark.parametrize("net", NETS)
def test_training_reaches_all_weights_and_converts(net: str) -> None:
    make, example = NETS[net]
    model = settled(make(), example)
    prepared: Any = prepare(model, PT2E, method="qat", example_inputs=example)
    assert info(prepared).interface.owner == ""  # one graph of all of it
    assert {id(p) for p in prepared.parameters()} == {id(p) for p in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    prepared.train()
    for _ in range(3):
        optimizer.zero_grad()
        prepared(example).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    prepared.eval()
    with torch.no_grad():
        trained, converted = prepared(example), convert(prepared)(example)
    # the same integers in another order of sums: a rounding here and there differs by one step of 255
    assert sqnr_db(trained, converted) > 30


@pytest.mark.parametrize("net", ["mlp", "tagger", "transformer"])
def test_dynamic_quantizes_linear_layers(net: str) -> None:
    make, example = NETS[net]
    model = make().eval()
    converted = convert(prepare(model, PT2E, method="dynamic", example_inputs=example))
    with torch.no_grad():
        assert sqnr_db(model(example), converted(example)) > 30
    assert {row.int8 for row in coverage(converted, example).rows if row.weighted and "rnn" not in row.op} == {True}
    if net == "tagger":
        assert info(converted).float_layers == {"lstm": "torchao has no int8 form of recurrent layers: use backend='fx'"}


# ---- training


def _switched_off(prepared: Any) -> None:
    for module in observers(prepared).values():
        module.disable_fake_quant()
        module.disable_observer()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [PT2E, QuantConfig(backend="pt2e", weight=TensorSpec(qscheme="per_tensor_symmetric"))])
def test_without_fake_quantize_the_graph_is_the_model(training: bool, config: QuantConfig) -> None:
    model = settled(Odd(), IMAGES)
    twin = copy.deepcopy(model).double()
    prepared: Any = prepare(model, config, method="qat", example_inputs=IMAGES)
    link(prepared, model)
    model.double()
    prepared.double()
    _switched_off(prepared)
    twin.train(training)
    prepared.train(training)
    for _ in range(2):
        data = torch.randn(6, 3, 8, 8, dtype=torch.double)
        outputs = []
        for module in (twin, prepared):
            torch.manual_seed(1)
            outputs.append(module(data))
            outputs[-1].square().sum().backward()
        # double rounds by 1e-16, and the sums have a few hundred terms
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)
    assert twin.bn.num_batches_tracked == 20 + 2 * training


def test_a_batch_norm_of_zeros_gives_no_nan() -> None:
    for qscheme in ("per_channel_symmetric", "per_tensor_symmetric"):
        model = settled(Block(4), torch.randn(2, 4, 8, 8))
        nn.init.zeros_(model.bn2.weight)
        config = QuantConfig(backend="pt2e", weight=TensorSpec(qscheme=qscheme))  # type: ignore[arg-type]
        example = torch.randn(2, 4, 8, 8)
        prepared: Any = prepare(model, config, method="qat", example_inputs=example)
        prepared.train()(example).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.bn2.weight.grad.abs().sum() > 0
        assert convert(prepared)(example).isfinite().all()



def test_calibration_ends_with_a_report_and_files_that_load() -> None:
    callback = PostTrainingQuantization(PT2E, export=ExportConfig(formats=("pt2", "onnx")))
    trainer(callback).validate(Classifier(convnet()), datamodule=Digits())
    report: Any = callback.report
    assert report.artifacts == {"pt2": Path("quantized/model.pt2"), "onnx": Path("quantized/model.onnx")}
    assert report.coverage == 1.0
    assert report.sqnr_db > 25
    for path in report.artifacts.values():
        loaded = load(path)
        for rows in (1, 3, 64):
            assert loaded(torch.randn(rows, 1, 8, 8)).shape == (rows, 10)


def test_training_ends_with_a_report_and_files_that_load() -> None:
    callback = QuantizationAwareTraining(PT2E, export=ExportConfig(formats=("pt2", "onnx")))
    model = Classifier(convnet())
    before = weights(model)
    trainer(callback, max_epochs=1, num_sanity_val_steps=1).fit(model, datamodule=Digits())
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    report: Any = callback.report
    assert report.coverage == 1.0
    assert report.sqnr_db > 25

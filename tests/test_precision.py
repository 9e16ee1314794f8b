"""Mixed precision: layers compute in half, ranges are float32, and what is delivered is float32 altogether."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modules import BATCH, Classifier, Digits, as_test, convnet, different, digits, merged, ptq, qat, trainer, weights
from roots import part
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import ExportConfig, QuantConfig, QuantizationAwareTraining, TensorSpec, load, native, prepare
from lightning_quant._torch_ao import is_fake_quantize
from lightning_quant.backends.graph import observers, sees_weights
from lightning_quant.placement import ToFile, ToGraph

ModelCheckpoint = part("callbacks").ModelCheckpoint

BACKENDS = ["fx", "eager", "pt2e"]
KINDS = ["auto", "learned"]


class MixedNet(nn.Module):
    """Convolution with batch norm, a sum, layers that stay float between layers that do not, a region in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.between = nn.LayerNorm(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.max_pool2d(F.relu(x + self.again(x)), 2).flatten(1)
        with torch.autocast("cpu", enabled=False):
            x = x.float() * 2
        return self.head(F.gelu(self.between(x)))


def settings(backend: Any, kind: Any) -> QuantConfig:
    spec = TensorSpec(fake_quantize=kind)
    return QuantConfig(backend=backend, activation=spec, weight=spec)


def exporting(backend: str) -> ExportConfig:
    return ExportConfig(formats=("pt2" if backend == "pt2e" else "torchscript",))


def batch() -> torch.Tensor:
    return digits()[0][:BATCH] / 16


@contextmanager
def seen_by(graph: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Fake quantize -> what it was called with last."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach().clone()}))
        for name, module in observers(graph).items()
        if is_fake_quantize(module)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("backend", "kind", "compiled"),
    [
        # exporting takes a second or two
        pytest.param(*case, marks=[pytest.mark.slow] if case[0] == "pt2e" and case != ("pt2e", "auto", True) else [])
        for case in itertools.product(BACKENDS, KINDS, (True, False))
    ],
)
def test_ranges_are_those_of_what_was_computed_in_half(
    backend: str, kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "kernels", lambda: None)
    net = MixedNet()
    graph = prepare(net, settings(backend, kind), method="qat", example_inputs=batch()[:2]).train()
    (inner,) = [m for m in graph.modules() if "lightning_quant" in m.__dict__.get("meta", {})]
    with seen_by(inner) as seen, torch.autocast("cpu", torch.bfloat16):
        output = graph(batch())
        F.cross_entropy(output, digits()[1][:BATCH]).backward()
    halves = 0
    modules: dict[str, Any] = observers(inner)
    for name, x in seen.items():
        module = modules[name]
        is_weight = sees_weights(inner, name)
        assert x.dtype == torch.float32 or not is_weight, name  # weights are rounded before autocast casts them
        halves += x.dtype == torch.bfloat16
        least, most = module.clamp
        x = x.float().clamp(least, most)
        low, high = module.activation_post_process.min_val, module.activation_post_process.max_val
        assert low.dtype == high.dtype == module.scale.dtype == torch.float32
        if is_weight:
            continue  # with the batch norm, or a scale for each channel: as in float32, below
        assert low.item() == x.min().item(), name
        assert high.item() == x.max().item(), name
        span = max(high.item(), 0) - min(low.item(), 0)
        assert module.scale.item() == pytest.approx(span / 255, rel=1e-6)
    assert halves >= (1 if backend == "pt2e" else 2)  # which rounds the inputs of layers alone
    in_float = prepare(net, settings(backend, kind), method="qat", example_inputs=batch()[:2]).train()
    (other,) = [m for m in in_float.modules() if "lightning_quant" in m.__dict__.get("meta", {})]
    in_float(batch())
    own: dict[str, Any] = observers(other)
    for name in seen:
        if sees_weights(inner, name):
            assert torch.equal(modules[name].scale, own[name].scale), name
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("fx", "auto"),
        ("fx", "learned"),
        ("eager", "auto"),
        pytest.param("pt2e", "auto", marks=pytest.mark.slow),
        pytest.param("eager", "learned", marks=pytest.mark.slow),
        pytest.param("pt2e", "learned", marks=pytest.mark.slow),
    ],
)
def test_training_in_mixed_precision(backend: Any, kind: str) -> None:
    reports = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(11)
        model = Classifier(MixedNet())
        callback = QuantizationAwareTraining(settings(backend, kind), export=exporting(backend))
        runner = trainer(callback, precision=precision, max_epochs=2)
        torch.manual_seed(12)
        runner.fit(model, Digits())
        report = callback.report
        # evaluated in float32, whatever it was trained in
        assert report.metrics_float == merged(trainer().validate(model, Digits(), verbose=False))
        # int8 runs in the middle of what autocast has cast
        assert merged(runner.test(model, Digits(), verbose=False)) == as_test(report.metrics_int8)
        assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.1)
        reports.append(report)
    ours, float32 = reports
    assert ours.targets == float32.targets
    assert ours.coverage == float32.coverage
    # a step in half rounds by 2 ** -9; 12 of them stay near
    assert ours.metrics_float != float32.metrics_float
    assert ours.metrics_float["val_loss"] == pytest.approx(float32.metrics_float["val_loss"], rel=0.2)


def test_calibration_is_in_float32() -> None:
    torch.manual_seed(11)
    model = Classifier(MixedNet())
    reports = []
    for precision in ("32-true", "bf16-mixed"):
        callback = ptq()
        runner = trainer(callback, precision=precision)
        runner.validate(model, Digits(), verbose=False)
        reports.append(callback.report)
        assert merged(runner.test(model, Digits(), verbose=False)) == as_test(callback.report.metrics_int8)
    assert reports[0].metrics_int8 == reports[1].metrics_int8
    assert reports[0].metrics_float == reports[1].metrics_float


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_quantizing_what_was_trained_in_mixed_precision(method: Any) -> None:
    callback, model = ptq(method=method), Classifier(convnet())
    runner = trainer(callback, precision="bf16-mixed")
    runner.fit(model, Digits())
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits(), verbose=False))
    assert merged(runner.test(model, Digits(), verbose=False)) == as_test(callback.report.metrics_int8)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_equals_the_uninterrupted_run() -> None:
    def run(folder: str, **kwargs: Any) -> Any:
        torch.manual_seed(11)
        model, callback = Classifier(convnet()), qat()
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        runner = trainer(callback, keep, precision="bf16-mixed", max_epochs=2, enable_checkpointing=True)
        runner.fit(model, Digits(shuffle=False), **kwargs)
        return weights(model), callback.report.metrics_int8

    whole = run("whole")
    resumed = run("resumed", ckpt_path="whole/epoch=0.ckpt")
    assert different(whole[0], resumed[0]) == []
    assert whole[1] == resumed[1]


def test_int8_runs_in_float32_whatever_is_on() -> None:
    callback = ptq()
    model = Classifier(MixedNet())
    trainer(callback).fit(model, Digits())
    int8 = callback.quantized_model
    x = batch()
    expected = int8(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8(x), expected)
        file = ToFile(load(callback.report.artifacts["torchscript"]))
        assert torch.equal(file(model, (x,), {}), expected)
    halved = x.bfloat16()
    assert torch.equal(int8(halved), int8(halved.float()))


class _Passes(nn.Module):
    def forward(self, *data: Any) -> Any:
        return data


def test_only_half_becomes_float32() -> None:
    class Positions:
        def flatten(self, args: Any, kwargs: Any) -> Any:
            return args

        def restore(self, output: Any) -> Any:
            return output

    route = ToGraph(_Passes(), Positions(), on_cpu=True)  # type: ignore[arg-type]
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
    given = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    found = route(_Passes(), (*given, 3), {})
    assert [x.dtype for x in found[:-1]] == [torch.float32] * 3 + dtypes[3:]
    assert found[-1] == 3


def test_half_on_the_cpu_is_what_lightning_makes_of_it() -> None:
    callback = qat()
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        runner = trainer(callback, precision="16-mixed")
    runner.fit(Classifier(convnet()), Digits())
    assert runner.precision == "bf16-mixed"
    assert callback.report is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="unavoidable: 16-mixed needs a GPU")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend: Any, kind: str, precision: Any) -> None:
    reports = []
    for used in ("32-true", precision):
        torch.manual_seed(11)
        model = Classifier(MixedNet())
        callback = QuantizationAwareTraining(settings(backend, kind), export=exporting(backend))
        runner = trainer(callback, accelerator="gpu", precision=used, max_epochs=2)
        torch.manual_seed(12)
        runner.fit(model, Digits())
        reports.append(callback.report)
        assert merged(runner.test(model, Digits(), verbose=False)) == pytest.approx(
            as_test(callback.report.metrics_int8), rel=1e-4
        )
    ours, float32 = reports
    assert ours.metrics_float["val_loss"] == pytest.approx(float32.metrics_float["val_loss"], rel=0.2)
    assert ours.metrics_int8["val_loss"] == pytest.approx(ours.metrics_float["val_loss"], rel=0.1)


def _idx(path: Path, header: int) -> torch.Tensor:
    return torch.tensor(np.frombuffer(gzip.open(path).read(), np.uint8, offset=header).copy())


def _fashion(folder: Path, kind: str, rows: int) -> TensorDataset:
    images = _idx(folder / f"{kind}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[:rows]
    return TensorDataset(images.float() / 255, _idx(folder / f"{kind}-labels-idx1-ubyte.gz", 8)[:rows].long())


class _Annealed(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _stages() -> nn.Sequential:
    stages = [
        layer
        for width, out in ((1, 16), (16, 32))
        for layer in (nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(32 * 49, 10))


@pytest.mark.slow
def test_accuracy_is_that_of_training_in_32_bits(fashion_mnist_path: Path) -> None:
    accuracy = {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        model, callback = _Annealed(_stages()), qat(freeze_observers_epoch=2)
        train = DataLoader(_fashion(fashion_mnist_path, "train", 12_800), batch_size=64, shuffle=True)
        test = DataLoader(_fashion(fashion_mnist_path, "t10k", 10_000), batch_size=1000)
        trainer(callback, precision=precision, max_epochs=3).fit(model, train, test)
        accuracy[precision] = callback.report.metrics_int8["val_acc"]
    assert accuracy["32-true"] > 0.87
    assert accuracy["bf16-mixed"] >= accuracy["32-true"] - 0.005

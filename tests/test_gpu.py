"""On a GPU: fake quantize gives what torch's operators give there, and what is delivered runs on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Classifier, Digits, Losses, as_test, convnet, different, digits, merged, ptq, qat, trainer, weights
from roots import part
from torch import nn

from lightning_quant import (
    Distillation,
    ExportConfig,
    OscillationFreezing,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    convert,
    correct,
    load,
    native,
    prepare,
    sensitivity,
)
from lightning_quant._torch_ao import FakeQuantize as TorchFakeQuantize
from lightning_quant._torch_ao import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from lightning_quant.backends.graph import observers
from lightning_quant.fake_quantize import FakeQuantize
from lightning_quant.learned_scale import LearnedFakeQuantize
from lightning_quant.observers import HistogramObserver

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="unavoidable: needs a GPU")

SCHEMES = [
    torch.per_tensor_affine,
    torch.per_tensor_symmetric,
    torch.per_channel_affine,
    torch.per_channel_symmetric,
]
BACKENDS = ["fx", "eager", "pt2e"]


def made(kind: Any, qscheme: torch.qscheme, **settings: Any) -> Any:
    per_channel = qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
    averaged = MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver
    if per_channel:
        settings["ch_axis"] = 1
    return kind(
        observer=averaged, dtype=torch.qint8, qscheme=qscheme, quant_min=-128, quant_max=127, averaging_constant=0.1,
        **settings,
    )  # fmt: skip


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, 9, 5, generator=generator) * (i + 1) for i in range(count)]


def on_both(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the input, of a squared error."""
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    y.float().square().sum().backward()
    assert leaf.grad is not None
    return y.detach(), leaf.grad


# ---- fake quantize and observers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qscheme", SCHEMES, ids=str)
def test_values_and_gradients_are_those_of_torch(qscheme: torch.qscheme, dtype: torch.dtype) -> None:
    ours = made(FakeQuantize, qscheme).to(GPU)
    theirs = made(TorchFakeQuantize, qscheme).to(GPU)
    for layout in (torch.contiguous_format, torch.channels_last):
        for x in batches():
            x = x.to(GPU, dtype).contiguous(memory_format=layout)
            y, gradient = on_both(ours, x)
            expected, its_gradient = on_both(theirs, x.float())
            assert ours.scale.is_cuda
            assert torch.equal(ours.scale, theirs.scale)
            assert torch.equal(ours.zero_point, theirs.zero_point)
            assert y.dtype == gradient.dtype == dtype
            assert torch.equal(y, expected.to(dtype))
            if dtype == torch.float32:
                assert torch.equal(gradient, its_gradient)


@pytest.mark.parametrize("qscheme", SCHEMES, ids=str)
def test_ranges_are_those_of_the_cpu(qscheme: torch.qscheme) -> None:
    there, here = made(FakeQuantize, qscheme).to(GPU), made(FakeQuantize, qscheme)
    for x in batches():
        there(x.to(GPU))
        here(x)
    for name, value in there.state_dict().items():
        # a GPU divides by a number as it multiplies by its inverse: a scale may be another in its last bit
        assert torch.allclose(value.cpu(), here.state_dict()[name], rtol=3e-7, atol=0), name
    ends = [
        getattr(module.activation_post_process, name) for module in (there, here) for name in ("min_val", "max_val")
    ]
    assert torch.equal(ends[0].cpu(), ends[2])
    assert torch.equal(ends[1].cpu(), ends[3])
    # and a state goes from the one to the other
    again = made(FakeQuantize, qscheme)
    again.load_state_dict(there.state_dict())
    assert different(weights(again), {name: value.cpu() for name, value in weights(there).items()}) == []


@pytest.mark.parametrize("with_offset", [False, True], ids=["LSQ", "LSQ+"])
@pytest.mark.parametrize("qscheme", SCHEMES, ids=str)
def test_a_learned_scale_is_that_of_the_cpu(qscheme: torch.qscheme, with_offset: bool) -> None:
    found = []
    for device in (GPU, "cpu"):
        module = made(LearnedFakeQuantize, qscheme, with_offset=with_offset).to(device)
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        for x in batches(4):
            optimizer.zero_grad()
            y, gradient = on_both(module, x.to(device))
            optimizer.step()
        found.append([y.cpu(), gradient.cpu(), *(p.detach().cpu() for p in module.parameters())])
    for ours, expected in zip(*found, strict=True):
        # sums of gradients come in another order: a scale that is another in its last bit rounds a few values otherwise
        assert ((ours - expected).abs() <= 1e-4 * expected.abs().max()).float().mean() > 0.99


def test_a_histogram_is_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)  # they count other samples
    there, here = HistogramObserver().to(GPU), HistogramObserver()
    for x in batches():
        there(x.to(GPU))
        here(x)
    assert there.histogram.is_cuda
    assert different(weights(here), {name: value.cpu() for name, value in weights(there).items()}) == []
    for ours, expected in zip(there.calculate_qparams(), here.calculate_qparams(), strict=True):
        assert torch.allclose(ours.cpu(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_graph_gives_the_same(backend: Any) -> None:
    images = (digits()[0][:16] / 16).to(GPU)
    torch.manual_seed(0)
    graph = prepare(convnet(), QuantConfig(backend=backend), method="qat", example_inputs=images[:2].cpu()).to(GPU)
    graph.train()
    twin = copy.deepcopy(graph)
    compiled = torch.compile(twin)
    with torch.no_grad():
        for _ in range(3):
            assert torch.allclose(compiled(images), graph(images), atol=1e-4)
    for name, module in observers(graph).items():
        assert torch.allclose(observers(twin)[name].scale, module.scale, rtol=1e-4), name


# ---- functions


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["static", "qat"])
def test_a_graph_on_the_gpu_is_converted_to_the_cpu(backend: Any, method: Any) -> None:
    images = digits()[0][:64] / 16
    torch.manual_seed(0)
    net = convnet().eval()
    converted = []
    for device in (GPU, "cpu"):
        graph = prepare(copy.deepcopy(net).to(device), QuantConfig(backend=backend), method=method,
                        example_inputs=images[:2].to(device))  # fmt: skip
        tensors = (*graph.parameters(), *graph.buffers())
        assert {tensor.device.type for tensor in tensors} == {device}
        graph.train(method == "qat")
        for x in images.to(device).split(16):
            graph(x)
        converted.append(convert(graph))
    ours, expected = (int8(images) for int8 in converted)
    assert ours.device.type == "cpu"
    # a sum in another order moves a range by its last bit
    assert (ours - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_graph_has_the_parameters_of_the_module(backend: Any) -> None:
    images = (digits()[0][:16] / 16).to(GPU)
    net = convnet().to(GPU)
    before = {name: (id(tensor), tensor.data_ptr()) for name, tensor in net.state_dict(keep_vars=True).items()}
    graph = prepare(net, QuantConfig(backend=backend), method="qat", example_inputs=images[:2])
    assert {n: (id(t), t.data_ptr()) for n, t in net.state_dict(keep_vars=True).items()} == before
    assert {id(p) for p in net.parameters()} <= {id(p) for p in graph.parameters()}
    graph.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in net.parameters())


def test_a_module_on_the_gpu_before_there_is_a_trainer() -> None:
    callback, model = qat(), Classifier(convnet()).to(GPU)
    trainer(callback, accelerator="gpu").fit(model, Digits())
    assert callback.report.coverage == 1
    callback, model = ptq(), model.to(GPU)
    trainer(callback, accelerator="cpu").validate(model, Digits(), verbose=False)
    assert callback.report.coverage == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_corrections_on_the_gpu(backend: Any) -> None:
    images = (digits()[0][:64] / 16).to(GPU)
    torch.manual_seed(0)
    config = QuantConfig(backend=backend, corrections=("cross_layer_equalization", "choose_ranges", "gptq"))
    net = convnet().eval().to(GPU)
    graph = prepare(net, config, method="static", example_inputs=images[:2])
    data = list(images.split(16))
    for x in data:
        graph(x)
    int8 = convert(correct(graph, data))
    error = (int8(images.cpu()) - net(images).cpu()).square().mean().sqrt()
    assert error < 0.05 * net(images).cpu().square().mean().sqrt()


def test_sensitivity_on_the_gpu() -> None:
    images = (digits()[0][:64] / 16).to(GPU)
    torch.manual_seed(0)
    graph = prepare(convnet().eval().to(GPU), QuantConfig(), method="static", example_inputs=images[:2])
    for x in images.split(16):
        graph(x)
    found = sensitivity(graph, list(images.split(16)))
    assert len(found.layers) == 2
    assert found.sqnr_db > 25


# ---- callbacks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["auto", "learned", "learned_offset"])
def test_training(backend: Any, kind: Any) -> None:
    spec = TensorSpec(fake_quantize=kind)
    config = QuantConfig(backend=backend, activation=spec, weight=spec)
    formats: Any = ("pt2" if backend == "pt2e" else "torchscript",)
    callback = QuantizationAwareTraining(config, export=ExportConfig(formats=formats))
    losses, here = Losses(), Losses()
    for shown, accelerator in ((here, "cpu"), (losses, "gpu")):
        torch.manual_seed(11)
        model = Classifier(convnet(), lr=0.01)
        runner = trainer(callback, shown, accelerator=accelerator, max_epochs=3)
        runner.fit(model, Digits(shuffle=False))
    # the longer it runs, the more is made of a last bit
    assert losses.values[:6] == pytest.approx(here.values[:6], rel=0.02)
    report = callback.report
    assert report.metrics_float["val_acc"] > 0.5
    assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.1)
    # int8 is on the CPU, whatever the Trainer runs on
    assert merged(runner.test(model, Digits(), verbose=False)) == pytest.approx(as_test(report.metrics_int8), rel=1e-4)
    (path,) = report.artifacts.values()
    images = digits()[0][96:136] / 16
    assert torch.allclose(load(path)(images), callback.quantized_model(images), atol=1e-4)


@pytest.mark.parametrize("method", ["static", "dynamic"])
@pytest.mark.parametrize("started_by", ["fit", "validate"])
def test_quantizing(method: Any, started_by: str) -> None:
    callback = ptq(method=method)
    torch.manual_seed(11)
    model = Classifier(convnet())
    runner = trainer(callback, accelerator="gpu")
    if started_by == "fit":
        runner.fit(model, Digits())
    else:
        runner.validate(model, Digits(), verbose=False)
    report = callback.report
    expected = merged(trainer().validate(model, Digits(), verbose=False))
    assert report.metrics_float == pytest.approx(expected, rel=1e-4)
    assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.1)
    found = merged(runner.test(model, Digits(), verbose=False))
    assert found == pytest.approx(as_test(report.metrics_int8), rel=1e-4)


def test_quantizing_with_bounds_and_corrections() -> None:
    config = QuantConfig(corrections=("bias_correction",))
    callback = PostTrainingQuantization(
        config, max_drop=0.05, monitor="val_acc", mode="max", export=ExportConfig(formats=("torchscript",))
    )
    torch.manual_seed(11)
    runner = trainer(callback, accelerator="gpu", max_epochs=2)
    model = Classifier(convnet())
    runner.fit(model, Digits())
    assert callback.report.metrics_int8["val_acc"] >= callback.report.metrics_float["val_acc"] - 0.05


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("learned", [False, True])
def test_resuming_on_the_gpu_and_on_the_cpu(learned: bool, tmp_path: Any) -> None:
    spec = TensorSpec(fake_quantize="learned") if learned else TensorSpec()

    def run(folder: str, accelerator: str, **kwargs: Any) -> Any:
        torch.manual_seed(11)
        model, callback = Classifier(convnet()), qat(QuantConfig(activation=spec, weight=spec))
        keep = part("callbacks").ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        runner = trainer(callback, keep, accelerator=accelerator, max_epochs=2, enable_checkpointing=True)
        runner.fit(model, Digits(shuffle=False), weights_only=True, **kwargs)
        state = {name: value.cpu() for name, value in weights(model).items()}
        return state, callback.report.metrics_int8

    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        whole = run("whole", "gpu")
        resumed = run("resumed", "gpu", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
        elsewhere = run("elsewhere", "cpu", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    finally:
        torch.backends.cudnn.deterministic = before
    assert different(whole[0], resumed[0]) == []
    assert whole[1] == resumed[1]
    assert elsewhere[1]["val_loss"] == pytest.approx(whole[1]["val_loss"], rel=0.05)


def test_with_a_teacher_frozen_weights_and_averages() -> None:
    spec = TensorSpec(fake_quantize="learned")
    config = QuantConfig(activation=spec, weight=TensorSpec(fake_quantize="learned", bits=4))
    torch.manual_seed(11)
    callback = qat(
        config,
        freeze_oscillations=OscillationFreezing(threshold=0.2, final_threshold=0.1, momentum=0.1),
        distill=Distillation(),
    )
    averages = part("callbacks").EMAWeightAveraging(decay=0.9)
    runner = trainer(callback, averages, accelerator="gpu", max_epochs=3)
    model = Classifier(convnet())
    runner.fit(model, Digits())
    report = callback.report
    assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.2)


def test_a_group_of_gpus() -> None:
    """One process, whose group is NCCL's: ranges go through it."""
    callback = qat()
    torch.manual_seed(11)
    runner = trainer(callback, accelerator="gpu", strategy="ddp", max_epochs=2)
    model = Classifier(convnet())
    runner.fit(model, Digits())
    assert callback.report.metrics_int8["val_loss"] == pytest.approx(callback.report.metrics_float["val_loss"], rel=0.1)


def test_cross_entropy_reaches_every_weight_under_a_scaler() -> None:
    """16-mixed by hand: a loss scaled by 2 ** 16 must not overflow in the straight-through estimator."""
    images, labels = (x[:32].to(GPU) for x in digits())
    torch.manual_seed(0)
    net = convnet().to(GPU)
    graph = prepare(net, QuantConfig(), method="qat", example_inputs=images[:2] / 16).train()
    scaler = torch.amp.GradScaler(GPU)
    optimizer = torch.optim.SGD(graph.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(GPU, torch.float16):
            loss = F.cross_entropy(graph(images / 16), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**16  # no step was left out
    for name, parameter in graph.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name

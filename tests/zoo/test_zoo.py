"""Architectures that nobody here wrote: static quantization of each without exclusions, and training of each family.

The fast ones run with every `make test`, all of them with `make zoo`.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import AMPLIFIES, ARCHITECTURES, FAMILIES, MIN_COVERAGE, MIN_SQNR_DB, Architecture
from epoch import train
from measure import FORMATS, calibrated, call, files, measure, settled
from results import keep
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_quant import ExportConfig, ExportError, export, prepare
from lightning_quant._torch_ao import FakeQuantizeBase

needs = {"torchvision": ["torchvision"], "timm": ["timm", "torchvision"], "transformers": ["transformers"]}


def _parameter(entry: Architecture, *, fast: bool) -> Any:
    marks = [pytest.mark.torchvision] if fast else [pytest.mark.torchvision, pytest.mark.zoo]
    return pytest.param(entry, id=entry.name, marks=marks)


def _skip_if_missing(entry: Architecture) -> None:
    for package in needs[entry.library]:
        pytest.importorskip(package)


@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.parametrize("entry", [_parameter(entry, fast=entry.fast) for entry in ARCHITECTURES])
def test_static(entry: Architecture) -> None:
    _skip_if_missing(entry)
    row = measure(entry)
    keep(row)
    assert row.sqnr_db >= entry.min_sqnr_db
    assert row.coverage >= entry.min_coverage


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", [_parameter(entry, fast=False) for entry in ARCHITECTURES])
def test_files(entry: Architecture) -> None:
    _skip_if_missing(entry)
    written = files(entry)
    keep(written)
    assert set(written.sqnr_db) == set(FORMATS) - set(entry.without)
    assert all(figure >= entry.min_sqnr_db for figure in written.sqnr_db.values())


REFUSED = [entry for entry in ARCHITECTURES if entry.without and AMPLIFIES not in entry.without.values()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", [_parameter(entry, fast=False) for entry in REFUSED])
def test_a_file_that_a_runtime_does_not_run_is_refused(entry: Architecture, tmp_path: Path) -> None:
    """And nothing is written: a runtime that is wrong is found by comparing."""
    _skip_if_missing(entry)
    _, prepared = calibrated(entry)
    for name in (name for name in FORMATS if name in entry.without):
        config = ExportConfig(directory=str(tmp_path), formats=(name,))
        with pytest.raises(
            ExportError, match=r"computes something else|export of forward failed|a file cannot hold it"
        ):
            export(prepared, None, config, entry.inputs(8))
        assert list(tmp_path.iterdir()) == []


def test_names_are_unique_and_a_lower_floor_has_its_reason() -> None:
    names = [e.name for e in ARCHITECTURES]
    assert len(set(names)) == len(names) >= 60
    for e in ARCHITECTURES:
        lowered = e.min_sqnr_db < MIN_SQNR_DB or e.min_coverage < MIN_COVERAGE
        assert lowered == bool(e.reason)


# ---- training

EACH_FAMILY = pytest.mark.parametrize(
    "entry", [_parameter(e, fast=e.name in ("resnet18", "bert")) for e in FAMILIES.values()]
)


@pytest.mark.filterwarnings("ignore")
@EACH_FAMILY
def test_an_epoch(entry: Architecture, tmp_path: Path) -> None:
    """A Trainer and the callback, on real data: every weight that float training moves is moved, and int8 follows."""
    _skip_if_missing(entry)
    pytest.importorskip("sklearn")
    epoch = train(entry, tmp_path)
    keep(epoch)
    assert epoch.files
    assert epoch.coverage >= entry.min_coverage
    assert not epoch.unmoved
    assert epoch.fake_losses == pytest.approx(epoch.float_losses, rel=0.25)
    for metrics in (epoch.float_metrics, epoch.fake_metrics, epoch.int8_metrics, epoch.file_metrics):
        assert metrics.keys() == {"val_loss", "val_acc"}
        assert all(math.isfinite(value) for value in metrics.values())
    # random weights amplify: 1e-6 of the input moves the fake quantized MobileOne by 15 dB, and its loss by 6 %
    assert epoch.int8_metrics["val_loss"] == pytest.approx(epoch.fake_metrics["val_loss"], rel=0.15)
    assert epoch.file_metrics["val_loss"] == pytest.approx(epoch.int8_metrics["val_loss"], rel=0.15)


def _outputs(value: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(value if not hasattr(value, "to_tuple") else value.to_tuple()) if _is_float(x)]


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _as_double(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {k: v.double() if _is_float(v) else v for k, v in inputs.items()}
    return tuple(x.double() if _is_float(x) else x for x in inputs)


def _step(model: nn.Module, inputs: Any, parameters: dict[str, nn.Parameter]) -> tuple[list[torch.Tensor], Any]:
    torch.manual_seed(3)
    np.random.seed(3)  # Wav2Vec2 masks some of its features in training
    outputs = _outputs(call(model, inputs))
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in outputs)
    assert isinstance(loss, torch.Tensor)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return [x.detach() for x in outputs], dict(zip(parameters, found, strict=True))


def _close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    return bool((expected - found).norm() <= 1e-9 * expected.norm() + 1e-12)


@pytest.mark.filterwarnings("ignore")
@EACH_FAMILY
def test_gradients(entry: Architecture) -> None:
    """Gradients reach every weight; with fake quantize off it is the float model, in float64, in both modes."""
    _skip_if_missing(entry)
    model = settled(entry)
    model.train()
    prepared = prepare(model, method="qat", example_inputs=entry.inputs(4))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-4)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        inputs = entry.inputs(4)
        _, float_gradients = _step(model, inputs, parameters)
        _, gradients = _step(prepared, inputs, parameters)
        missing = [n for n, g in float_gradients.items() if g is not None and gradients[n] is None]
        assert not missing
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
            assert gradients[name] is None or gradients[name].isfinite().all()
        optimizer.step()

    model.load_state_dict(before)
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeBase):
            module.disable_fake_quant()
            module.disable_observer()
    model.double()
    prepared.double()
    _same_buffers(prepared, model)
    inputs = _as_double(entry.inputs(4))
    for training in (False, True):
        model.train(training)
        prepared.train(training)
        expected, float_gradients = _step(model, inputs, parameters)
        found, gradients = _step(prepared, inputs, parameters)
        for a, b in zip(expected, found, strict=True):
            assert _close(a, b)
        scale = max(g.norm() for g in float_gradients.values() if g is not None)
        for name, gradient in float_gradients.items():
            if gradient is not None and gradient.norm() > 1e-9 * scale:
                assert _close(gradient, gradients[name]) or (gradient - gradients[name]).norm() <= 1e-9 * scale, name


def _same_buffers(prepared: nn.Module, model: nn.Module) -> None:
    """Batch norms of the prepared copy followed the training: put them back to those of the model."""
    from lightning_quant.backends.graph import is_graph, link

    for name, graph in list(prepared.named_modules()):
        if is_graph(graph):
            place = ".".join(part for part in name.split(".") if part != "graph")
            link(graph, model.get_submodule(place))

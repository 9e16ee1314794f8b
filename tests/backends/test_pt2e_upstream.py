"""What torchao does to batch norms and modes, and what we do instead.

Each test has a half that shows the defect: when it fails, torchao has changed, and the half of
``lightning_quant.backends.pt2e_folding`` or ``pt2e_capture`` that it is about may be given up.
https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/pt2e/qat_utils.py
https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/pt2e/export_utils.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, convert, prepare
from lightning_quant.analysis.sqnr import sqnr_db

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'lightning-quant[pt2e]'")

IMAGES = torch.randn(4, 3, 8, 8)
ATEN = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(F.relu(self.bn(self.conv(x))))


def net() -> Net:
    model = Net()
    nn.init.uniform_(model.bn.running_var, 1e-4, 1e-3)  # so small that eps counts
    nn.init.normal_(model.bn.running_mean, std=0.1)
    return model


def stock(model: nn.Module) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    return prepare_qat_pt2e(torch.export.export(model.train(), (IMAGES,), strict=True).module(), quantizer)


def ours(model: nn.Module) -> Any:
    return prepare(model, QuantConfig(backend="pt2e"), method="qat", example_inputs=IMAGES)


def literals(graph_module: Any, target: Any) -> list[Any]:
    return [node.args[1:] if target is ATEN.dropout.default else node.args[5:8]
            for node in graph_module.graph.nodes if node.target is target]  # fmt: skip


@pytest.fixture(scope="module")
def prepared_by_torchao() -> Any:
    torch.manual_seed(0)
    return stock(net())


def test_batch_norms_keep_eps_and_momentum(prepared_by_torchao: Any) -> None:
    assert literals(prepared_by_torchao, ATEN.batch_norm.default) == [(True, 0.1, 1e-5)]
    model = net()
    prepared = ours(model)
    assert (prepared.bn.eps, prepared.bn.momentum) == (1e-3, 0.03)
    assert not literals(prepared, ATEN.batch_norm.default)


def test_modes_keep_dropout_and_batch_norm(prepared_by_torchao: Any) -> None:
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train

    twin = copy.deepcopy(prepared_by_torchao)
    assert literals(twin, ATEN.dropout.default) == [(0.2, True)]
    move_exported_model_to_train(move_exported_model_to_eval(twin))
    assert literals(twin, ATEN.dropout.default) == [(0.5, True)]
    prepared = ours(net())
    prepared.eval().train()
    assert prepared.drop.p == 0.2
    assert prepared.drop.training


def test_modes_are_those_of_any_module(prepared_by_torchao: Any) -> None:
    with pytest.raises(NotImplementedError, match="train"):
        prepared_by_torchao.train()
    # what Lightning does after its sanity check: the attribute, without the method
    twin = copy.deepcopy(prepared_by_torchao)
    for module in twin.modules():
        module.training = False
    assert literals(twin, ATEN.batch_norm.default)[0][0] is True
    prepared = ours(net())
    assert prepared.train() is prepared
    before = prepared.bn.running_mean.clone()
    for module in prepared.modules():
        module.training = False
    prepared(IMAGES)
    torch.testing.assert_close(prepared.bn.running_mean, before, rtol=0, atol=0)
    for module in prepared.modules():
        module.training = True
    prepared(IMAGES)
    assert not torch.equal(prepared.bn.running_mean, before)


@pytest.mark.slow  # torchao traces a hundred patterns
def test_a_batch_norm_is_folded_with_its_own_eps(prepared_by_torchao: Any) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    model = net()
    with torch.no_grad():
        twin = copy.deepcopy(prepared_by_torchao)
        twin(IMAGES)
        for name in ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
            owner, _, leaf = name.partition(".")
            getattr(getattr(twin, owner), leaf).copy_(getattr(getattr(model, owner), leaf))

        def bias(eps: float) -> torch.Tensor:
            factor = model.bn.weight / torch.sqrt(model.bn.running_var + eps)
            return model.bn.bias + (model.conv.bias - model.bn.running_mean) * factor

        torch.testing.assert_close(convert_pt2e(twin).conv.bias, bias(1e-5))
        prepared = ours(model).eval()
        prepared(IMAGES)
        converted = convert(prepared)
        found = next(x for x in converted.state_dict().values() if x.shape == (4,) and x.dtype == torch.float32
                     and torch.allclose(x, bias(1e-3)))  # fmt: skip
        assert not torch.allclose(found, bias(1e-5), rtol=0.1)
        expected = model.eval()(IMAGES)
        assert sqnr_db(expected, converted(IMAGES)) > 30


def test_a_batch_norm_of_zeros_gives_no_nan() -> None:
    model = net()
    nn.init.zeros_(model.bn.weight)
    assert stock(copy.deepcopy(model))(IMAGES).isnan().any()
    assert ours(model).train()(IMAGES).isfinite().all()

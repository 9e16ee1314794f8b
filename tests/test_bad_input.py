"""What cannot work is refused with a remedy: before the first training batch, with the weights as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import (
    ONE_FORMAT,
    WITHOUT_VAL_LOADER,
    Classifier,
    Digits,
    convnet,
    different,
    ptq,
    qat,
    rows,
    surface,
    train_loader,
    trainer,
    val_loader,
    weights,
)
from roots import pl
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import (
    CaptureError,
    ConfigError,
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    QuantizationError,
)

BOTH = pytest.mark.parametrize("made_by", [ptq, qat], ids=["ptq", "qat"])


class Watched(Classifier):
    """Knows whether it was trained."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net or convnet())
        self.trained = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained += 1
        return super().training_step(batch, batch_idx)


def refused(
    callback: Any,
    error: type[Exception],
    message: str,
    *data: Any,
    model: Any = None,
    entry: str = "fit",
    **kwargs: Any,
) -> None:
    """The run ends with this message, and has done nothing."""
    model = model or Watched()
    before, seen = weights(model), surface(model)
    sources = {} if data else {"datamodule": Digits()}
    with pytest.raises(error, match=message):
        getattr(trainer(callback, **kwargs), entry)(model, *data, **sources)
    assert model.trained == 0
    assert different(before, weights(model)) == []
    assert surface(model) == seen
    assert callback.report is None
    assert callback.quantized_model is None


NO_VALIDATION = (
    "static quantization calibrates on validation data, and there is none: give the Trainer a val dataloader"
)


@WITHOUT_VAL_LOADER
def test_static_without_a_val_dataloader() -> None:
    refused(ptq(), ConfigError, NO_VALIDATION, train_loader())


def test_validate_without_a_val_dataloader() -> None:
    model = Watched()
    with pytest.raises(ConfigError, match=NO_VALIDATION):
        trainer(ptq()).validate(model)


@pytest.mark.parametrize("entry", ["fit", "validate"])
def test_static_with_limit_val_batches_0(entry: str) -> None:
    refused(ptq(), ConfigError, r"leave limit_val_batches above 0.*method='dynamic'", entry=entry, limit_val_batches=0)


class _WithoutValidationStep(Watched):
    validation_step = pl.LightningModule.validation_step


@pytest.mark.filterwarnings("ignore:you passed in a `val_dataloader` but have no `validation_step`")
def test_static_without_a_validation_step() -> None:
    refused(ptq(), ConfigError, "define validation_step", model=_WithoutValidationStep())


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
@pytest.mark.parametrize("entry", ["fit", "validate"])
def test_static_with_an_empty_val_dataloader(entry: str) -> None:
    data = [train_loader()] if entry == "fit" else []
    data.append(DataLoader(rows(0, 0), batch_size=4))
    refused(ptq(), QuantizationError, r"val(idation)? dataloader", *data, entry=entry)


@BOTH
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            QuantConfig(skip=("net.O",)),
            r"QuantConfig\(skip=\.\.\.\): 'net\.O' matches no submodule\. Did you mean 'net",
        ),
        (QuantConfig(targets=("nett",)), r"QuantConfig\(targets=\.\.\.\): 'nett' matches no submodule\. .*'net'"),
        (QuantConfig(skip=("net.0", "*.head")), r"'\*\.head' matches no submodule"),
    ],
)
def test_a_pattern_that_matches_nothing(made_by: Any, config: QuantConfig, message: str) -> None:
    refused(made_by(config), ConfigError, message)


class _Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10] * self.scale


class _Normalises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.flatten(1))[:, :10]


@BOTH
@pytest.mark.parametrize("net", [_Scales, _Normalises])
def test_nothing_to_quantize(made_by: Any, net: Any) -> None:
    message = "has nothing that can be quantized: no convolution or linear layer that its forward reaches"
    refused(made_by(), CaptureError, f"Watched {message}", model=Watched(net()))


@BOTH
def test_everything_is_skipped(made_by: Any) -> None:
    refused(made_by(QuantConfig(skip=("net",))), CaptureError, r"nothing that can be quantized.*\n  net.*'skip'")


@BOTH
@pytest.mark.parametrize("folder", ["taken", "taken/below"])
def test_a_folder_that_cannot_be_written(made_by: Any, folder: str) -> None:
    Path("taken").write_text("a file in the way")
    callback = type(made_by())(export=ExportConfig(directory=folder, formats=("torchscript",)))
    refused(callback, ConfigError, rf"ExportConfig\(directory='{folder}'\): cannot write there: .* another folder")
    assert Path("taken").read_text() == "a file in the way"


NO_INPUT = r"no input was found to trace Watched with.*Set self\.example_input_array in the LightningModule"


@WITHOUT_VAL_LOADER
@pytest.mark.parametrize("made_by", [lambda: ptq(method="dynamic"), qat], ids=["dynamic", "qat"])
def test_no_inputs_can_be_found(made_by: Any) -> None:
    iterator = iter(train_loader())
    refused(made_by(), CaptureError, NO_INPUT, iterator)
    assert len(list(iterator)) == 6  # nothing was taken


def test_no_inputs_can_be_found_in_validation() -> None:
    refused(ptq(), CaptureError, NO_INPUT, iter(val_loader()), entry="validate")


class _ValidationFails(Watched):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("no such label")


@BOTH
def test_a_validation_step_that_raises(made_by: Any) -> None:
    message = (
        r"_ValidationFails\.validation_step raised ValueError on one batch.*: no such label\..*example_input_array"
    )
    refused(made_by(), CaptureError, message, model=_ValidationFails())


@BOTH
@pytest.mark.parametrize(
    ("precision", "remedy"),
    [
        ("bf16-true", r", or 'bf16-mixed': layers compute in half as here, and their weights stay float32\.$"),
        ("16-true", r", or '16-mixed': layers compute in half as here, and their weights stay float32\.$"),
        ("64-true", r"\.$"),
    ],
)
def test_precisions_that_cast_weights(made_by: Any, precision: str, remedy: str) -> None:
    message = (
        rf"^Trainer\(precision='{precision}'\): int8 is made from float32 weights, and this precision casts them\. "
        rf"Use Trainer\(precision='32-true'\){remedy}"
    )
    refused(made_by(), ConfigError, message, precision=precision)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "float64|Double"), (torch.bfloat16, "bfloat16|BFloat16")], ids=str
)
def test_weights_that_are_not_float32(made_by: Any, dtype: torch.dtype, name: str) -> None:
    class Cast(Watched):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0].to(dtype), batch[1]

    data = [train_loader(), val_loader()]
    refused(made_by(), QuantizationError, name, *data, model=Cast().to(dtype))


def test_two_quantization_callbacks() -> None:
    model = Watched()
    with pytest.raises(ConfigError, match="QuantizationAwareTraining"):
        trainer(ptq(), qat()).fit(model, Digits())
    assert model.trained == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "qat"}, r"PostTrainingQuantization\(method='qat'\).*use QuantizationAwareTraining"),
        ({"method": "statik"}, r"give 'static' or 'dynamic'"),
        *(
            ({"calibration_batches": value}, r"calibration_batches=.*: give 1 or more, or None for all")
            for value in (0, -1, True, 1.5, "3")
        ),
        ({"config": {"skip": ["net"]}}, r"config=\{'skip': \['net'\]\}: give a QuantConfig"),
        ({"config": None}, "config=None: give a QuantConfig"),
        ({"export": "out"}, "export='out': give an ExportConfig"),
        ({"export": ExportConfig(formats=("onnx",)), "method": "dynamic"}, "method='dynamic' cannot write 'onnx'"),
    ],
)
def test_arguments_of_post_training_quantization(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PostTrainingQuantization(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "fx"}, "config='fx': give a QuantConfig"),
        ({"export": Path("out")}, "give an ExportConfig"),
        ({"start_epoch": -1}, "start_epoch=-1: give an epoch, 0 or later"),
        ({"start_epoch": 1.0}, r"start_epoch=1\.0: give an epoch"),
        ({"freeze_observers_epoch": 0}, "freeze_observers_epoch=0 with start_epoch=0.*give 1 or later"),
        ({"start_epoch": 3, "freeze_batch_norm_epoch": 2}, "freeze_batch_norm_epoch=2 with start_epoch=3.*give 3 or"),
        ({"freeze_observers_epoch": "1"}, "freeze_observers_epoch='1': give an epoch, or None for never"),
    ],
)
def test_arguments_of_quantization_aware_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationAwareTraining(**arguments)


class _BranchesOnData(Watched):
    """Nothing can be traced: the branch is inside of the only layer's parent, and the layer is a function's."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.kernel = nn.Parameter(torch.randn(10, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return F.linear(x, self.kernel) if x.sum() > 0 else x[:, :10]


@BOTH
def test_a_forward_that_cannot_be_captured(made_by: Any) -> None:
    refused(made_by(), CaptureError, "_BranchesOnData has nothing that can be quantized", model=_BranchesOnData())


def test_one_callback_can_be_used_after_it_was_refused() -> None:
    callback = qat()
    refused(callback, ConfigError, "float32", precision="bf16-true")
    trainer(callback).fit(Watched(), Digits())
    assert callback.report.artifacts["torchscript"].is_file()
    assert callback.export == ONE_FORMAT

"""PT2E: export, observers placed by our quantizer, training through torchao's fake quantizes, QDQ programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, Digits, convnet, trainer, weights

from lightning_quant import (
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    load,
)

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'lightning-quant[pt2e]'")

PT2E = QuantConfig(backend="pt2e")


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

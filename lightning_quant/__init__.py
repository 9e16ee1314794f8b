"""Quantize any LightningModule to int8 with one callback: calibrated or trained, verified, exported."""

from lightning_quant import recipes
from lightning_quant.analysis.coverage import Coverage, LayerRow, coverage
from lightning_quant.analysis.plots import plot_sensitivity
from lightning_quant.analysis.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from lightning_quant.backends import convert, prepare
from lightning_quant.batch_norms import reestimate_batch_norms
from lightning_quant.callbacks import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.config import ExportConfig, LayerConfig, QuantConfig, TensorSpec
from lightning_quant.corrections import (
    adaround,
    analytic_bias_correction,
    bias_correction,
    choose_ranges,
    correct,
    cross_layer_equalization,
    gptq,
    smoothquant,
)
from lightning_quant.diagnosis import Diagnosis, Trial, diagnose
from lightning_quant.distillation import Distillation
from lightning_quant.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    ConfigError,
    CoverageError,
    ExportError,
    MissingExtraError,
    QuantizationError,
    RankError,
)
from lightning_quant.exporters import export
from lightning_quant.from_checkpoint import export_checkpoint
from lightning_quant.oscillation import OscillationFreezing
from lightning_quant.planning import Plan, PlannedLayer, plan
from lightning_quant.post_training import quantize_checkpoint
from lightning_quant.report import FormatReport, QuantReport
from lightning_quant.runtime import load

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "Coverage",
    "CoverageError",
    "Diagnosis",
    "Distillation",
    "ExportConfig",
    "ExportError",
    "FormatReport",
    "LayerConfig",
    "LayerRow",
    "LayerSensitivity",
    "MissingExtraError",
    "OscillationFreezing",
    "Plan",
    "PlannedLayer",
    "PostTrainingQuantization",
    "QuantConfig",
    "QuantReport",
    "QuantizationAwareTraining",
    "QuantizationError",
    "RankError",
    "Sensitivity",
    "TensorSpec",
    "Trial",
    "adaround",
    "analytic_bias_correction",
    "bias_correction",
    "choose_ranges",
    "convert",
    "correct",
    "coverage",
    "cross_layer_equalization",
    "diagnose",
    "export",
    "export_checkpoint",
    "gptq",
    "load",
    "plan",
    "plot_sensitivity",
    "prepare",
    "quantize_checkpoint",
    "recipes",
    "reestimate_batch_norms",
    "sensitivity",
    "smoothquant",
]

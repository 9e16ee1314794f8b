"""PostTrainingQuantization and QuantizationAwareTraining: hooks only, no quantization logic.

The order of Lightning's hooks decides where each thing happens; the comments say why.
"""

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.qat import QuantizationAwareTraining

__all__ = ["PostTrainingQuantization", "QuantizationAwareTraining", "QuantizationCallback"]

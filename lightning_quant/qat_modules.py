"""Trainable convolution (or linear) + batch norm with fake-quantized weights.

Torch's own modules fake quantize the folded weight ``w * s`` with ``s = gamma / sigma``, convolve, and divide the
*output* by ``s`` again (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, and Krishnamoorthi 2018, section 3.2.2).
That costs two passes over the output, and gives NaN where ``gamma`` is 0, the usual initialisation of the last batch
norm of a residual branch. Here the *weight* is divided: ``conv(x, fq(w * s)) / s == conv(x, fq(w * s) / s)``. With
one scale per channel and a symmetric range even that is not needed, because ``fq(w * s) / s == fq(w)``: scales are
proportional to the channel's largest weight.

The classes derive from torch's, so that torch.ao converts them as it does its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lightning_quant._torch_ao import BackendConfig, BackendPatternConfig, qat_conv_bn_modules


def quantized_weight(module: Any) -> torch.Tensor:
    """The weight that the int8 kernel will compute with, as a float tensor without the batch norm folded in.

    Args:
        module: With ``weight`` ``(out, ...)``, ``weight_fake_quant`` and ``bn``.
    """
    fake_quantize = module.weight_fake_quant
    if fake_quantize.qscheme == torch.per_channel_symmetric:
        weight: torch.Tensor = fake_quantize(module.weight)
        return weight
    norm = module.bn
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).reshape([-1] + [1] * (module.weight.dim() - 1))
    folded = fake_quantize(module.weight * factor)
    # a channel that is scaled by 0 has no quantization error
    silent = factor == 0
    return torch.where(silent, module.weight, folded / torch.where(silent, torch.ones_like(factor), factor))


def _conv_bn(module: Any, x: torch.Tensor) -> torch.Tensor:
    normalised: torch.Tensor = module.bn(module._conv_forward(x, quantized_weight(module), module.bias))
    return normalised


def _relu(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.relu(x) if module.clamps else x


class ConvBn1d(qat_conv_bn_modules.ConvBn1d):
    """See the module's docstring."""

    def _forward(self, input: torch.Tensor) -> torch.Tensor:
        return _conv_bn(self, input)


class ConvBn2d(qat_conv_bn_modules.ConvBn2d):
    """See the module's docstring."""

    def _forward(self, input: torch.Tensor) -> torch.Tensor:
        return _conv_bn(self, input)


class ConvBn3d(qat_conv_bn_modules.ConvBn3d):
    """See the module's docstring."""

    def _forward(self, input: torch.Tensor) -> torch.Tensor:
        return _conv_bn(self, input)


class ConvBnReLU1d(qat_conv_bn_modules.ConvBnReLU1d):
    """See the module's docstring."""

    clamps = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the class it derives from; see ``WITH_RELU``."""
        return _relu(self, _conv_bn(self, input))


class ConvReLU1d(qat_conv_bn_modules.ConvReLU1d):
    """See ``WITH_RELU``."""

    clamps = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the class it derives from."""
        return _relu(self, self._conv_forward(input, self.weight_fake_quant(self.weight), self.bias))


class ConvBnReLU2d(qat_conv_bn_modules.ConvBnReLU2d):
    """See the module's docstring."""

    clamps = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the class it derives from; see ``WITH_RELU``."""
        return _relu(self, _conv_bn(self, input))


class ConvReLU2d(qat_conv_bn_modules.ConvReLU2d):
    """See ``WITH_RELU``."""

    clamps = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the class it derives from."""
        return _relu(self, self._conv_forward(input, self.weight_fake_quant(self.weight), self.bias))


class ConvBnReLU3d(qat_conv_bn_modules.ConvBnReLU3d):
    """See the module's docstring."""

    clamps = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the class it derives from; see ``WITH_RELU``."""
        return _relu(self, _conv_bn(self, input))


class ConvReLU3d(qat_conv_bn_modules.ConvReLU3d):
    """See ``WITH_RELU``."""

    clamps = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the class it derives from."""
        return _relu(self, self._conv_forward(input, self.weight_fake_quant(self.weight), self.bias))


class LinearBn1d(qat_conv_bn_modules.LinearBn1d):
    """See the module's docstring."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(batch, in) -> (batch, out)``."""
        normalised: torch.Tensor = self.bn(F.linear(input, quantized_weight(self), self.bias))
        return normalised


class LinearReLU(qat_conv_bn_modules.LinearReLU):
    """See ``WITH_RELU``."""

    clamps = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in) -> (..., out)``."""
        return _relu(self, F.linear(input, self.weight_fake_quant(self.weight), self.bias))


#: Those that are folded with a batch norm.
WITH_BATCH_NORM: Any = (ConvBn1d, ConvBn2d, ConvBn3d, ConvBnReLU1d, ConvBnReLU2d, ConvBnReLU3d, LinearBn1d)
#: Those with a ReLU at their end. With ``clamps = False`` it is left to what reads them.
WITH_RELU: Any = (ConvBnReLU1d, ConvBnReLU2d, ConvBnReLU3d, ConvReLU1d, ConvReLU2d, ConvReLU3d, LinearReLU)
#: Torch's trainable module -> ours.
REPLACEMENTS: dict[type, type] = {cls.__mro__[1]: cls for cls in (*WITH_BATCH_NORM, *WITH_RELU)}


def with_own_modules(config: BackendConfig) -> BackendConfig:
    """``config`` with our trainable modules in the place of torch's."""
    patterns = []
    for pattern in config.configs:
        values = pattern.to_dict()
        if pattern.pattern in REPLACEMENTS:
            values["pattern"] = REPLACEMENTS[pattern.pattern]
        if pattern.qat_module in REPLACEMENTS:
            values["qat_module"] = REPLACEMENTS[pattern.qat_module]
        patterns.append(BackendPatternConfig.from_dict(values))
    return BackendConfig(config.name).set_backend_pattern_configs(patterns)

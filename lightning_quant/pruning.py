"""Weights that are pruned while they are trained: ``torch.nn.utils.prune``, and Lightning's ``ModelPruning``.

A pruned layer keeps its Parameter as ``weight_orig`` and multiplies it by a mask before its forward. A prepared graph
has the same Parameter and does not call that forward, so that the mask is put on the Parameter itself, and on its
gradient: a step then is that of the masked weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_quant._roots import ROOTS
from lightning_quant.errors import ConfigError

_CALLBACKS = tuple(root.callbacks.ModelPruning for root in ROOTS)


def check_pruning(trainer: Any) -> None:
    """Refuse a pruning that is never made permanent.

    Raises:
        ConfigError: A ``ModelPruning`` of the Trainer is one.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, _CALLBACKS) and not callback._make_pruning_permanent:
            raise ConfigError(
                "ModelPruning(make_pruning_permanent=False): at the end of the training weights would still be "
                "products with a mask, and int8 is made from plain ones. Leave it at True."
            )


def _pruned(model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each pruned Parameter of ``model``, and its mask."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                yield module.get_parameter(f"{name}_orig"), module.get_buffer(f"{name}_mask")


def hold(model: nn.Module) -> None:
    """Let what is pruned be 0, whatever moved it: momentum, weight decay, a restored checkpoint."""
    for parameter, mask in _pruned(model):
        parameter.data.mul_(mask)


def mask_gradients(model: nn.Module) -> None:
    """Let what is pruned have no gradient, as behind a mask."""
    for parameter, mask in _pruned(model):
        if parameter.grad is not None:
            parameter.grad.mul_(mask)

"""The phases of quantization-aware training, and the state that they put a prepared graph into.

float -> fake quantize with observers -> observers frozen, and independently batch norm frozen. A :class:`Schedule` says
which phase an epoch has, :class:`Phases` puts a module into any of them, and :func:`observer_state` is what a
checkpoint keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_quant._torch_ao import is_fake_quantize
from lightning_quant.attachment import attached_to, run_quantized
from lightning_quant.backends.graph import observers, sees_weights
from lightning_quant.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What happens to a model in an epoch.

    Attributes:
        quantize: Fake quantize runs (else the model is float).
        observe: Ranges of activations follow the data.
        update_batch_norm: Running statistics follow the data, and training normalises with those of the batch.
    """

    quantize: bool
    observe: bool
    update_batch_norm: bool


FLOAT = Phase(quantize=False, observe=False, update_batch_norm=True)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When each phase begins, in epochs; None: never.

    Raises:
        ConfigError: A negative epoch, or a freeze before quantization starts.
    """

    start_epoch: int = 0
    freeze_observers_epoch: int | None = None
    freeze_batch_norm_epoch: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.start_epoch, bool) or not isinstance(self.start_epoch, int) or self.start_epoch < 0:
            raise ConfigError(f"start_epoch={self.start_epoch!r}: give an epoch, 0 or later.")
        for name in ("freeze_observers_epoch", "freeze_batch_norm_epoch"):
            epoch = getattr(self, name)
            if epoch is None:
                continue
            if isinstance(epoch, bool) or not isinstance(epoch, int):
                raise ConfigError(f"{name}={epoch!r}: give an epoch, or None for never.")
            # observers that are frozen in the epoch in which they start would have seen nothing
            least = self.start_epoch + (name == "freeze_observers_epoch")
            if epoch < least:
                raise ConfigError(
                    f"{name}={epoch} with start_epoch={self.start_epoch}: quantization has to have begun; give {least} "
                    "or later, or None for never."
                )

    def phase(self, epoch: int) -> Phase:
        """The phase of an epoch, counted from 0.

        >>> Schedule(start_epoch=1, freeze_observers_epoch=3).phase(2)
        Phase(quantize=True, observe=True, update_batch_norm=True)
        """
        if epoch < self.start_epoch:
            return FLOAT
        frozen = self.freeze_observers_epoch is not None and epoch >= self.freeze_observers_epoch
        still = self.freeze_batch_norm_epoch is not None and epoch >= self.freeze_batch_norm_epoch
        return Phase(quantize=True, observe=not frozen, update_batch_norm=not still)


def set_observing(prepared: nn.Module, *, activations: bool, weights: bool) -> None:
    """Let the fake quantizes of activations and of weights follow what they see, or not."""
    module: Any
    for name, module in observers(prepared).items():
        if is_fake_quantize(module):
            wanted = weights if sees_weights(prepared, name) else activations
            module.enable_observer() if wanted else module.disable_observer()


def freeze_batch_norm(prepared: nn.Module) -> list[nn.Module]:
    """Normalise with the running statistics, and leave them as they are. Undone by ``train()``: set it every epoch.

    Returns:
        The batch norms that were in training mode until now.
    """
    changed: list[nn.Module] = []
    for module in prepared.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.training:
            changed.append(module.eval())
    return changed


class Phases:
    """The phase of a module with attached graphs: set to any one, read back, and left without a trace.

    What is set follows from the last call alone and not from what came before it, so that a training that was killed
    goes on where it was: whoever resumes enters the phase of the epoch.

    Args:
        model: After :func:`lightning_quant.attachment.attach`.

    Attributes:
        phase: The one that was entered last; until then the model is float.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.phase = FLOAT
        self._frozen: dict[int, nn.Module] = {}

    def _graphs(self) -> list[nn.Module]:
        attached = attached_to(self.model)
        return list(attached.named().values()) if attached is not None else []

    def enter(self, phase: Phase) -> None:
        """Train in ``phase`` from the next batch on."""
        self.phase = phase
        run_quantized(self.model, phase.quantize)
        for graph in self._graphs():
            # weights are known in full: their range is always that of the weights as they are
            set_observing(graph, activations=phase.observe, weights=phase.quantize)
        self.hold()

    def hold(self) -> None:
        """Stay in the phase whoever called ``train()`` in between, which thaws batch norms."""
        attached = attached_to(self.model)
        if attached is None:
            return
        if self.phase.update_batch_norm:
            self._thaw()
        attached.follow()
        if not self.phase.update_batch_norm:
            for graph in self._graphs():
                self._frozen.update({id(module): module for module in freeze_batch_norm(graph)})

    def pause(self, *, quantize: bool) -> None:
        """Nothing follows the data until :meth:`enter`: for validation.

        Args:
            quantize: Fake quantize runs.
        """
        for graph in self._graphs():
            set_observing(graph, activations=False, weights=False)
        run_quantized(self.model, quantize)

    def end(self) -> None:
        """Leave the model float, with its batch norms in the mode that they would have."""
        self.phase = FLOAT
        self._thaw()
        run_quantized(self.model, False)

    def _thaw(self) -> None:
        for module in self._frozen.values():
            module.training = self.model.training
        self._frozen = {}


def observer_state(prepared: nn.Module) -> dict[str, torch.Tensor]:
    """Ranges, scales and zero points: what a checkpoint needs beside the float weights. Tensors on the CPU."""
    return {
        f"{name}.{key}": value.detach().cpu().clone()
        for name, module in observers(prepared).items()
        for key, value in module.state_dict().items()
    }


def load_observer_state(prepared: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The reverse of :func:`observer_state`.

    Raises:
        ConfigError: The state is that of another model or another configuration.
    """
    found = observers(prepared)
    names = {name for name in found if any(key.startswith(name + ".") for key in state)}
    known = {key for key in state if any(key.startswith(name + ".") for name in found)}
    if len(known) != len(state) or len(names) != len(found):
        raise ConfigError(
            f"the checkpoint has observers for another graph: {len(state)} values, of which {len(known)} fit, for "
            f"{len(found)} observers. Use the QuantConfig and the model that it was trained with."
        )
    for name, module in found.items():
        own = {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name + ".")}
        if own.keys() != (expected := module.state_dict().keys()):
            unlike = ", ".join(sorted(own.keys() ^ expected))
            raise ConfigError(
                f"the checkpoint has observers of another kind: at {name}, only one of it and this module "
                f"has {unlike}. Use the TensorSpec (observer, fake_quantize) that it was trained with."
            )
        module.load_state_dict(own)

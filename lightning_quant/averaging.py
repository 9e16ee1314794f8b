"""Averages of weights that Lightning's ``WeightAveraging`` keeps, and the ranges that belong to them.

It copies the module when a training is set up, moves the copy towards the module by the places of Parameters and
buffers, exchanges the values of both while validation runs, and gives the copy's to the module at the end. Ranges and
learned scales are averaged so as well: those of an average of weights are near to the average of theirs. What cannot be
averaged is brought in order here: integers (flags, zero points), and ranges that began later than the average.

``StochasticWeightAveraging`` needs none of this: it averages Parameters alone, from a copy without our graphs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_quant._roots import ROOTS
from lightning_quant.attachment import attached_to, detach, relink, unbind
from lightning_quant.backends.graph import observers
from lightning_quant.errors import ConfigError
from lightning_quant.fake_quantize import is_ours, keep_qparams, qparams_of_range
from lightning_quant.learned_scale import is_learned
from lightning_quant.phases import load_observer_state, observer_state

_CALLBACKS = tuple(root.callbacks.WeightAveraging for root in ROOTS)

#: Target name -> observers of its graph, as a checkpoint has them.
State = dict[str, dict[str, torch.Tensor]]


def averages_of(trainer: Any) -> list[AveragedModel]:
    """The averages that callbacks of a running ``fit`` keep."""
    found = [getattr(c, "_average_model", None) for c in trainer.callbacks if isinstance(c, _CALLBACKS)]
    return [average for average in found if average is not None]


def prepare_averages(trainer: Any, model: nn.Module) -> None:
    """Let the averages be copies of ``model`` as it is now, with its graphs, whichever callback was set up first.

    Args:
        trainer: All callbacks have been set up, and no weights were restored.
        model: After :func:`lightning_quant.attachment.attach`.

    Raises:
        ConfigError: An average leaves out the buffers of batch norms that train.
    """
    for average in averages_of(trainer):
        if not average.use_buffers:
            _check_batch_norms(model)
        average.module = copy.deepcopy(model).to(average.n_averaged.device)


def _check_batch_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and module.running_mean is not None and module.training:
            raise ConfigError(
                f"WeightAveraging(use_buffers=False): at the end of the training, batch norms (the first: {name}) "
                "would have the statistics from before it, and int8 would be made with these. Use use_buffers=True, "
                "or keep batch norms in eval mode."
            )


class Averages:
    """The ranges in the averages of a module that trains.

    Args:
        model: With attached graphs, on its device.
        averages: Of it, from :func:`averages_of` after :func:`prepare_averages`.
    """

    def __init__(self, model: nn.Module, averages: list[AveragedModel]) -> None:
        self._averages = averages
        #: Observers of ``model`` and their copies.
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        #: Those whose copy has no range, or one that was averaged with none.
        self._waiting: list[tuple[nn.Module, nn.Module]] = []
        #: What is not averaged, and where it is put.
        self._taken: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        attached = attached_to(model)
        if attached is None:
            return
        for average in averages:
            relink(average.module)
            theirs = _graphs(average)
            for name, graph in attached.named().items():
                copies = observers(theirs[name])
                for key, observer in observers(graph).items():
                    self._add(observer, copies[key], average.use_buffers)
        self._waiting = list(self._pairs)

    def _add(self, own: Any, theirs: Any, use_buffers: bool) -> None:
        self._pairs.append((own, theirs))
        for source, target in zip(own.buffers(), theirs.buffers(), strict=True):
            if not (use_buffers and source.is_floating_point()):
                self._taken[0].append(source)
                self._taken[1].append(target)
        if is_learned(theirs):  # it says how far the scale may be from where it was
            self._taken[0].append(theirs.scale.data)
            self._taken[1].append(theirs.scale_before)

    @property
    def exist(self) -> bool:
        """Whether there is an average."""
        return bool(self._averages)

    def settle(self) -> None:
        """Bring in order what was averaged: call it after each update, and before values are exchanged."""
        with torch.no_grad():
            begun = [pair for pair in self._waiting if _has_begun(pair[0])]
            for own, theirs in begun:
                torch._foreach_copy_(_tensors(theirs), _tensors(own))
            self._waiting = [pair for pair in self._waiting if pair not in begun]
            if self._taken[0]:
                torch._foreach_copy_(self._taken[1], self._taken[0])

    def state(self) -> State | None:
        """Observers as they belong to the averaged weights; None: there is no average."""
        if not self.exist:
            return None
        self.settle()
        for _, theirs in self._pairs:
            if is_ours(theirs) and not is_learned(theirs):  # at its next pass it would do so itself
                with torch.no_grad():
                    keep_qparams(theirs, *qparams_of_range(theirs))
        return {name: observer_state(graph) for name, graph in _graphs(self._averages[-1]).items()}

    def load(self, state: State) -> None:
        """The reverse of :meth:`state`."""
        for average in self._averages:
            for name, graph in _graphs(average).items():
                load_observer_state(graph, state[name])
        self._waiting = [pair for pair in self._pairs if not _has_begun(pair[1])]

    def end(self) -> None:
        """Take our graphs off the averages: outside of a training they are copies of the float module again."""
        for average in self._averages:
            unbind(average.module)
            detach(average.module)
        self._averages, self._pairs, self._waiting, self._taken = [], [], [], ([], [])


def _graphs(average: AveragedModel) -> dict[str, nn.Module]:
    attached = attached_to(average.module)
    assert attached is not None
    return attached.named()


def _has_begun(observer: Any) -> bool:
    """Whether it has what a range, or a scale that is trained, begins with."""
    if is_learned(observer) and observer.scale.requires_grad:
        return bool(observer.learned)
    low = getattr(getattr(observer, "activation_post_process", observer), "min_val", None)
    return low is None or (low.numel() > 0 and bool(torch.isfinite(low).all()))


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*(parameter.data for parameter in module.parameters()), *module.buffers()]

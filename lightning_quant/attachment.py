"""Prepared graphs on the module that trains: its layers, its Parameters and the keys of its ``state_dict`` stay.

:func:`attach` registers the graphs as one child, so that they move with the module to its device, and links their batch
norms and other layers to the module's own. :func:`detach` takes them off again, and nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_quant.backends.graph import followers, info, link, observers, own_modules
from lightning_quant.placement import ToGraph, divert, recompile, restore, uncompile

CHILD = "_lightning_quant"


class Attached(nn.Module):
    """The prepared graphs of a module, as a child that no ``state_dict`` sees, and whose Parameters are the model's.

    Learned scales are the exception; see :mod:`lightning_quant.scale_training`.

    Attributes:
        names: Of the targets, ``""`` for the module's own forward.
    """

    def __init__(self, graphs: dict[str, nn.Module], model: nn.Module) -> None:
        super().__init__()
        self.names = tuple(graphs)
        self.graphs = nn.ModuleList(graphs.values())
        self.look_at(model)
        self.register_load_state_dict_post_hook(_expect_nothing)

    def look_at(self, model: nn.Module) -> None:
        """Find which modules the graphs have for themselves, and which follow one of ``model``."""
        # beside the registered children, so that a deepcopy of the model has its own
        self.__dict__["own"] = [
            module for name, graph in self.named().items() for module in own_modules(graph, model.get_submodule(name))
        ]
        self.__dict__["followers"] = [
            pair for name, graph in self.named().items() for pair in followers(graph, model.get_submodule(name))
        ]

    def named(self) -> dict[str, nn.Module]:
        """Target name -> graph."""
        return dict(zip(self.names, self.graphs, strict=True))

    def train(self, mode: bool = True) -> Attached:
        """Set the mode of what only the graphs have.

        The model's own layers follow the model, which may keep some of them in eval mode on purpose.
        """
        self.training = mode
        for module in self.__dict__["own"]:
            module.training = mode
        self.follow()
        return self

    def follow(self) -> None:
        """Let batch norms that stand for one of the model have the mode that the model gave that one."""
        for module, original in self.__dict__["followers"]:
            module.training = original.training

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: weights are in the model, observers are stored beside its ``state_dict``."""
        return kwargs.get("destination", args[0] if args else {})

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """None: they are the model's."""
        return iter(())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """None: they are the model's."""
        return iter(())


def _expect_nothing(module: nn.Module, incompatible_keys: Any) -> None:
    """``load_state_dict(strict=True)`` of a float checkpoint is complete without this child."""
    keys = [key for key in incompatible_keys.missing_keys if f"{CHILD}." in key]
    for key in keys:
        incompatible_keys.missing_keys.remove(key)


def attach(model: nn.Module, graphs: dict[str, nn.Module]) -> Attached:
    """Register the graphs on ``model`` and link them to its layers. ``forward`` still runs the model as it is.

    Args:
        model: A LightningModule. Its Parameters, buffers and ``state_dict`` stay as they are.
        graphs: Target name -> prepared for ``qat`` from that submodule of ``model``.
    """
    detach(model)
    for name, graph in graphs.items():
        link(graph, model.get_submodule(name))
    attached = Attached(graphs, model)
    model.add_module(CHILD, attached)
    return attached


def relink(model: nn.Module) -> None:
    """Link again after the model moved to another device, or got other batch norms (``sync_batchnorm``)."""
    attached = attached_to(model)
    if attached is not None:
        for name, graph in attached.named().items():
            link(graph, model.get_submodule(name))
        attached.look_at(model)


def is_ours(name: str) -> bool:
    """Whether a name of a module is that of a part of what :func:`attach` registers."""
    return name == CHILD or name.startswith(f"{CHILD}.")


def attached_to(model: nn.Module) -> Attached | None:
    """What :func:`attach` put on ``model``, or None."""
    found = model._modules.get(CHILD)
    return found if isinstance(found, Attached) else None


_IGNORED = "_ddp_params_and_buffers_to_ignore"
_IGNORED_BEFORE = "ignored_before"


def keep_from_broadcast(model: nn.Module) -> None:
    """Let a ``DistributedDataParallel`` that wraps ``model`` leave observers and learned scales to this package.

    It would give the ranges of rank 0 to all, and wait for gradients of scales that have none yet. Buffers of the
    model, those of batch norms among them, are broadcast as before. :func:`detach` ends it.
    """
    attached = attached_to(model)
    if attached is None:
        return
    ours = {
        id(buffer) for graph in attached.graphs for module in observers(graph).values() for buffer in module.buffers()
    }
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{CHILD}.")]
    names += [name for name, buffer in model.named_buffers() if id(buffer) in ours]
    before = list(model.__dict__.get(_IGNORED, []))
    attached.__dict__.setdefault(_IGNORED_BEFORE, model.__dict__.get(_IGNORED))
    # the one way that torch has for it (torch/nn/parallel/distributed.py)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *names])


def state_of(model: nn.Module) -> list[torch.Tensor]:
    """The Parameters and buffers that are the same on all ranks of a training.

    Not those of what :func:`attach` put on ``model``, and not those that ``model`` keeps from
    ``DistributedDataParallel``.
    """
    own = set(model.__dict__.get(_IGNORED, []))
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [tensor for name, tensor in tensors if not name.startswith(f"{CHILD}.") and name not in own]


def run_quantized(model: nn.Module, enabled: bool) -> None:
    """Let the targets of ``model`` run their graphs, or their own ``forward``."""
    attached = attached_to(model)
    if attached is None:
        return
    if enabled:
        uncompile(model)
    for name, graph in attached.named().items():
        target = model.get_submodule(name)
        if enabled:
            divert(target, ToGraph(graph, info(graph).interface))
        else:
            restore(target)
    if not enabled:
        recompile(model)


def detach(model: nn.Module) -> None:
    """Take the graphs off ``model``; its targets run their own ``forward`` again."""
    run_quantized(model, False)
    attached = attached_to(model)
    model._modules.pop(CHILD, None)
    if attached is not None and _IGNORED_BEFORE in attached.__dict__:
        model.__dict__.pop(_IGNORED, None)
        before = attached.__dict__[_IGNORED_BEFORE]
        if before is not None:
            model.__dict__[_IGNORED] = before


_BOUND = "_lightning_quant_bound"


def after_method(module: Any, name: str, then: Callable[..., object]) -> None:
    """After each call of ``module.<name>``, call ``then`` with the module and the arguments. :func:`unbind` ends it.

    The method is bound to the instance, so that a deepcopy of ``module`` calls its own.
    """
    before = module.__dict__.get(name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = before(*args, **kwargs) if before else getattr(type(self), name)(self, *args, **kwargs)
        then(self, *args, **kwargs)
        return result

    module.__dict__.setdefault(_BOUND, {}).setdefault(name, before)
    module.__dict__[name] = MethodType(method, module)


def around_method(module: Any, name: str, wrap: Callable[[Any, Callable[[], Any]], Any]) -> None:
    """Let ``wrap`` answer each call of ``module.<name>``, given the module and the call. :func:`unbind` ends it."""
    before = module.__dict__.get(name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap(
            self, lambda: before(*args, **kwargs) if before else getattr(type(self), name)(self, *args, **kwargs)
        )

    module.__dict__.setdefault(_BOUND, {}).setdefault(name, before)
    module.__dict__[name] = MethodType(method, module)


def unbind(module: Any) -> None:
    """Take off every method that :func:`after_method` bound."""
    for name, before in module.__dict__.pop(_BOUND, {}).items():
        del module.__dict__[name]
        if before is not None:
            module.__dict__[name] = before

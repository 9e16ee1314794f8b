"""Submodules that are TorchScript already: their calls can be watched and diverted from the outside alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule


class ScriptedChild(nn.Module):
    """Stands for a ScriptModule in a copy that is ours.

    Whatever is bound to a ScriptModule is lost when it is copied, and nothing can be taken out of it.
    """

    def __init__(self, script: ScriptModule) -> None:
        super().__init__()
        self.script = script

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The program's own."""
        return self.script(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the program has: models read the attributes of their parts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            script = self.__dict__["_modules"].get("script")
            if script is None:
                raise
            return getattr(script, name)


def is_scripted(module: nn.Module) -> bool:
    """Whether ``module`` is TorchScript already, or stands for what is."""
    return isinstance(module, (ScriptModule, ScriptedChild))


def program_of(module: nn.Module) -> nn.Module:
    """The ScriptModule that ``module`` stands for, or ``module`` itself."""
    return module.script if isinstance(module, ScriptedChild) else module


def opened_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with a :class:`ScriptedChild` in the place of each ScriptModule, also of ``model`` itself."""
    with torch.no_grad():  # else the parameters in a copy of a ScriptModule have a history
        return _opened(copy.deepcopy(model))


def _opened(model: nn.Module) -> nn.Module:
    if isinstance(model, ScriptModule):
        return ScriptedChild(model)
    if isinstance(model, ScriptedChild):
        return model
    for name, child in list(model._modules.items()):
        if child is not None:
            model._modules[name] = _opened(child)
    return model


def signature_of_program(script: Any) -> inspect.Signature:
    """The signature of a ScriptModule's ``forward``, without ``self``: TorchScript keeps names and defaults."""
    parameters = []
    for argument in script._c._get_method("forward").schema.arguments[1:]:
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        parameters.append(inspect.Parameter(argument.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    return inspect.Signature(parameters)

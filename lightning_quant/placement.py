"""Putting a graph where a submodule was, without editing the module that holds it.

* :func:`divert` sends the calls of a submodule's ``forward`` to a graph. The tree of modules, its Parameters and the
  keys of its ``state_dict`` stay as they are; :func:`restore` undoes it. Training runs so.
* :func:`graft` is for a copy that is ours: the float layers that the graph stands for are taken out.

A bound method is used (``types.MethodType``) and not a closure: ``copy.deepcopy`` binds it to the copy, so that a copy
runs its own graph.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_quant.arguments import Interface
from lightning_quant.structures import is_setting

_ROUTE = "_lightning_quant_route"
_BEFORE = "_lightning_quant_before"
_CHILD = "int8"


class Route(Protocol):
    """Where the calls of a diverted ``forward`` go."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of ``module.forward``."""


class ToGraph:
    """Run a graph instead of ``forward``.

    Args:
        graph: Takes the data of the call by position.
        interface: Which arguments are data.
        on_cpu: The graph is an int8 one: it runs on the CPU and in float32 only, whatever autocast is on. Its inputs
            are taken there, its outputs back to their device.
    """

    def __init__(self, graph: nn.Module, interface: Interface, *, on_cpu: bool = False) -> None:
        self.graph = graph
        self.interface = interface
        self.on_cpu = on_cpu

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The graph's output."""
        data = self.interface.flatten(args, kwargs)
        if not self.on_cpu:
            return self.interface.restore(self.graph(*data))
        devices = {x.device for x in tree_flatten(data)[0] if isinstance(x, torch.Tensor)}
        with torch.autocast("cpu", enabled=False):
            output = self.graph(*_to_cpu(data))
        if devices and devices != {torch.device("cpu")}:
            output = _to(output, devices.pop())
        return self.interface.restore(output)


class ToFile:
    """Run a loaded file, which takes the tensors of the call and is on the CPU, instead of ``forward``."""

    def __init__(self, loaded: nn.Module) -> None:
        self.loaded = loaded

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the file computes, on the device of the inputs."""
        devices = {x.device for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        args, kwargs = _to_cpu((args, kwargs))
        with torch.autocast("cpu", enabled=False):
            output = self.loaded(*args, **kwargs)
        return _to(output, devices.pop()) if len(devices) == 1 else output


class Observed:
    """Show the data to a prepared graph, and answer with what the module itself computes, to the last bit."""

    def __init__(self, graph: nn.Module, interface: Interface) -> None:
        self.graph = graph
        self.interface = interface
        self.enabled = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own output."""
        if self.enabled:
            self.graph(*self.interface.flatten(args, kwargs))
        return type(module).forward(module, *args, **kwargs)


def _to_cpu(value: Any) -> Any:
    """What int8 kernels and runtimes take: float32, also of what mixed precision computed in half."""

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.cpu().float() if x.dtype in (torch.bfloat16, torch.float16) else x.cpu()

    return tree_map(moved, value)


def _to(value: Any, device: torch.device) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, value)


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What stands in for ``forward`` on a diverted module."""
    return self.__dict__[_ROUTE](self, args, kwargs)


def divert(module: nn.Module, route: Route) -> None:
    """Send the calls of ``module.forward`` to ``route``, also those of a module that was compiled in place."""
    if _ROUTE not in module.__dict__:
        before = {name: module.__dict__.get(name) for name in ("forward", "_compiled_call_impl")}
        module.__dict__[_BEFORE] = before, id(module)
    module.__dict__[_ROUTE] = route
    module.__dict__["forward"] = MethodType(forward, module)
    module.__dict__["_compiled_call_impl"] = None


def restore(module: nn.Module) -> None:
    """Let ``module`` run its own ``forward`` again."""
    if module.__dict__.pop(_ROUTE, None) is None:
        return
    before, owner = module.__dict__.pop(_BEFORE)
    for name, value in before.items():
        module.__dict__.pop(name, None)
        # what was compiled for the module that a copy was made of would run that one
        if value is not None and (name == "forward" or owner == id(module)):
            module.__dict__[name] = value


class Uncompiled:
    """Run what ``torch.compile`` wrapped, as Python does: a graph that was put inside of it has to be seen."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's output."""
        original: Any = module._orig_mod
        return original(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile(module)`` gave."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # who compiled has imported it
    return eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)


#: What Lightning compiles of the module in ``fit(torch.compile(module))``, by attributes of the module.
_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
_COMPILED = "_lightning_quant_compiled"


def uncompile(model: nn.Module) -> None:
    """Let every compiled part of ``model`` run as Python does: what was put inside of it has to be seen.

    These are submodules that ``torch.compile`` wrapped, and the steps of a LightningModule that it wrapped. Undone by
    :func:`recompile`.
    """
    for module in model.modules():
        if is_compiled(module):
            divert(module, Uncompiled())
    context: Any = model.__dict__.get("_compiler_ctx")  # Lightning's (utilities/compile.py)
    if not context or _COMPILED in model.__dict__:
        return
    model.__dict__[_COMPILED] = {name: model.__dict__.pop(name, None) for name in _STEPS}, id(model)
    for name in _STEPS:
        original = context[f"original_{name}"]
        if getattr(original, "__func__", None) is not getattr(type(model), name, None):
            model.__dict__[name] = original


def recompile(model: nn.Module) -> None:
    """The reverse of :func:`uncompile`; a copy of ``model`` stays uncompiled where what was compiled runs ``model``."""
    for module in model.modules():
        if is_compiled(module):
            restore(module)
    compiled, owner = model.__dict__.pop(_COMPILED, ({}, None))
    if owner == id(model):
        model.__dict__.update({name: value for name, value in compiled.items() if value is not None})


def route_of(module: nn.Module) -> Route | None:
    """Where the calls of ``module.forward`` go, or None if it is not diverted."""
    route: Route | None = module.__dict__.get(_ROUTE)
    return route


def graft(module: nn.Module, graph: nn.Module, interface: Interface, replaced: tuple[str, ...]) -> None:
    """Let ``module`` run ``graph`` for good, and take the layers that it stands for out of ``module``.

    Args:
        module: Changed in place: give a copy.
        graph: Becomes the child ``int8``.
        interface: Which arguments are data.
        replaced: Names of the submodules, parameters and buffers of ``module`` that ``graph`` stands for.
    """
    imitation = nn.Module()
    imitate(imitation, module)
    for name in replaced:
        _take_out(module, name)
    for name in ("weight", "bias"):
        if name in imitation.__dict__ and name not in module._parameters:
            module.__dict__[name] = imitation.__dict__[name]
    name = _CHILD
    while name in module._modules:
        name += "_"
    module.add_module(name, graph)
    plain_train(module)
    divert(module, ToGraph(graph, interface, on_cpu=True))


def imitate(stand_in: nn.Module, module: nn.Module) -> None:
    """Give ``stand_in`` the settings of a module, and its attributes ``weight`` and ``bias`` without their values.

    Models ask for a layer's width, and for the type and the shape of its weight (``x.to(self.fc.weight.dtype)``). Who
    computes with what stands here gets NaN.
    """
    for name, value in module.__dict__.items():
        if not name.startswith("_") and name != "training" and is_setting(value):
            stand_in.__dict__.setdefault(name, value)
    for name in ("weight", "bias"):
        tensor = dict(module.named_parameters(recurse=False)).get(name)
        if tensor is not None and tensor.is_floating_point():
            empty = torch.full((), float("nan"), dtype=tensor.dtype)
            stand_in.__dict__[name] = empty.expand(tensor.shape)


def plain_train(module: nn.Module) -> None:
    """Let ``module.train`` be that of torch: an override may reach for layers that were taken out, to freeze them."""
    module.__dict__["train"] = MethodType(nn.Module.train, module)


def _take_out(module: nn.Module, name: str) -> None:
    """Remove a submodule, Parameter or buffer, and the containers that are empty without it."""
    while name:
        parent_name, _, child = name.rpartition(".")
        try:
            parent = module.get_submodule(parent_name)
        except AttributeError:  # it went with the layer that it is in: graphs use layers, and ask for their weights
            return
        for registry in (parent._modules, parent._parameters, parent._buffers):
            registry.pop(child, None)
        if parent._modules or parent._parameters or parent._buffers:
            return
        name = parent_name

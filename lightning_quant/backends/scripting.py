"""A module as a TorchScript program that takes the data of a call by position: traced, or scripted."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.jit._recursive import create_script_module, infer_methods_to_compile
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_quant.arguments import Call, Interface, Positional, signature_of
from lightning_quant.backends.state import without_changes
from lightning_quant.errors import CaptureError, first_line, where
from lightning_quant.modes import without_fast_path
from lightning_quant.structures import plain, shape_of

#: The child of a traced program that holds the modules of what was traced: see ``_Flat``.
TRACED = "traced"


class Program(nn.Module):
    """A TorchScript program as a graph: data in by position, tuples, lists and dicts out.

    Args:
        script: The program, float, prepared or converted.
        interface: How the data becomes its arguments. None: they are the data.
        inputs: Names of the data.
        output: What a flat tuple of tensors becomes, and the leaves of it that are no tensors. None: the program gives
            its output as it is.
    """

    def __init__(
        self,
        script: ScriptModule,
        interface: Interface | None,
        inputs: tuple[str, ...],
        output: tuple[TreeSpec, dict[int, Any]] | None,
    ) -> None:
        super().__init__()
        self.script = script
        self.interface = interface
        self.inputs = inputs
        self.output = output

    def forward(self, *data: Any, **named: Any) -> Any:
        """What the program gives for the data, by position or name."""
        data = (*data, *(named.pop(name) for name in self.inputs[len(data) :] if name in named))
        if len(data) != len(self.inputs) or named:
            raise TypeError(f"takes {', '.join(self.inputs)}; was given {len(data)} of them and {sorted(named)}")
        if self.interface is not None:
            args, kwargs = self.interface.rebuild(data)
            return plain(self.script(*args, **kwargs))
        tensors = self.script(*data)
        if self.output is None:
            return plain(tensors)
        spec, constants = self.output
        rest = iter(tensors)
        return tree_unflatten([constants[i] if i in constants else next(rest) for i in range(spec.num_leaves)], spec)


class _Flat(nn.Module):
    """A module whose output is a flat tuple of tensors, which is all that a trace can give."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.traced = module
        self.output: tuple[TreeSpec, dict[int, Any]] | None = None

    def forward(self, *data: Any) -> tuple[torch.Tensor, ...]:
        leaves, spec = tree_flatten(plain(self.traced(*data)))
        self.output = spec, {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def trace_program(module: nn.Module, interface: Interface, call: Call) -> Program:
    """``module``, which takes the data of ``call`` by position, traced by ``torch.jit.trace``.

    Raises:
        CaptureError: It cannot be traced, or a trace would have a decision of this call for good.
    """
    flat = _Flat(module).eval()
    data = copy.deepcopy(interface.flatten(call.args, call.keywords))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        torch.jit.TracerWarning.ignore_lib_warnings()  # the checks of shapes in torch.nn
        try:
            # a mode of torch functions (Lightning has one around configure_model) would be what warnings point at
            without_modes = torch._C.DisableTorchFunction()
            with torch.no_grad(), torch.random.fork_rng(devices=[]), without_fast_path(), without_modes:
                script = torch.jit.trace(flat, data, check_trace=False, strict=False)
        except Exception as error:  # whatever the user's code raises when it is traced
            raise CaptureError(
                f"cannot be traced by torch.jit: {where(error)}{type(error).__name__}: {first_line(error)}"
            ) from error
    for warning in caught:
        if not issubclass(warning.category, torch.jit.TracerWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            continue
        raise CaptureError(
            f"a trace would keep what this call decided: {warning.filename}:{warning.lineno}: "
            f"{_first_sentence(warning.message)}. With jit='script' decisions stay."
        )
    return Program(script, None, interface.inputs, flat.output)


def trace_module(module: nn.Module, call: Call) -> tuple[Program, Interface]:
    """``module`` itself traced by ``torch.jit.trace``, where torch.fx cannot.

    Raises:
        CaptureError: It cannot be traced, decides by its data, or changes itself.
    """
    interface, returns = _interface(module, call)
    positional = Positional(module, interface)
    return without_changes(module, lambda: trace_program(positional, interface, call)), returns


def script_module(module: nn.Module, call: Call) -> tuple[Program, Interface]:
    """``module`` compiled by ``torch.jit.script``, or as it is if it has been before.

    Raises:
        CaptureError: Its code is none of TorchScript. The message has the line.
    """
    interface, returns = _interface(module, call)
    if isinstance(module, ScriptModule):
        return Program(module, interface, interface.inputs, None), returns
    _leave_fast_path(module)
    _declare_constants(module)
    try:
        with torch.random.fork_rng(devices=[]):
            # as torch.jit.script does, but with a type for each module: see torchscript._by_kind
            script = create_script_module(module, infer_methods_to_compile, share_types=False)
    except Exception as error:  # the compiler raises more than its own errors
        raise CaptureError(f"cannot be scripted: {_place(error)}{type(error).__name__}: {first_line(error)}") from error
    _fix_settings(script, interface)
    return Program(script, interface, interface.inputs, None), returns


def _fix_settings(script: Any, interface: Interface) -> None:
    """Let the settings of the call be constants, so that branches on them or on attributes are decided."""
    graph = script._c._get_method("forward").graph  # its types are its own, and so are its graphs
    known = {
        argument.debugName().partition(".")[0]: argument
        for argument in graph.inputs()
        if argument.type().kind() != "ClassType"
    }
    first = next(iter(graph.nodes()), None)
    for name, value in interface.constants.items():
        if name not in known or first is None or not (value is None or isinstance(value, (bool, int, float, str))):
            continue
        with graph.insert_point_guard(first):
            known[name].replaceAllUsesWith(graph.insertConstant(value))
    for part in script.modules():
        for method in part._c._method_names():
            torch._C._jit_pass_constant_propagation(part._c._get_method(method).graph)
            torch._C._jit_pass_dce(part._c._get_method(method).graph)


def _interface(module: nn.Module, call: Call) -> tuple[Interface, Interface]:
    """How data becomes arguments, and the same with how the output is built."""
    interface = Interface.of(signature_of(module), call)
    if not interface.inputs:
        raise CaptureError("it is called without a tensor")
    copied = copy.deepcopy(call)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        output = without_changes(module, lambda: module(*copied.args, **copied.keywords))
    return interface, interface.returning(shape_of(output))


def _leave_fast_path(module: nn.Module) -> None:
    """Let scripted encoder layers run their own layers: compiled code does not ask whether the fast path is enabled."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            # read by the fast path alone, which has kernels for ReLU (1) and GELU (2)
            part.activation_relu_or_gelu = 0


def _declare_constants(module: nn.Module) -> None:
    """Let the compiler take attributes like ``self.use_shortcut`` for the constants that they are in evaluation."""
    for part in module.modules():
        if isinstance(part, ScriptModule):
            continue
        flags = [k for k, v in part.__dict__.items() if isinstance(v, bool) and k != "training" and k[0] != "_"]
        part.__dict__["__constants__"] = [*getattr(part, "__constants__", ()), *flags]


_IN_FILE = re.compile(r'File "(.+?)", line (\d+)')


def _place(error: BaseException) -> str:
    """``"file.py:12: "``: where the compiler says that the code is."""
    found = [place for place in _IN_FILE.findall(str(error)) if "/torch/" not in place[0]]
    return f"{found[-1][0]}:{found[-1][1]}: " if found else where(error)


def _first_sentence(message: Any) -> str:
    return str(message).strip().splitlines()[0].partition(". ")[0][:200]

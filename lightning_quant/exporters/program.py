"""What one file computes, and whether a file can hold it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_quant._torch_ao import quiet
from lightning_quant.arguments import Interface, with_batch
from lightning_quant.backends.graph import Prepared, engine
from lightning_quant.config import Method, QuantConfig, formats_of
from lightning_quant.errors import ExportError, first_line, where
from lightning_quant.exporters.torch_export import capture


@dataclass(frozen=True)
class State:
    """A buffer that a program takes after its data, and whose new value it gives after its output.

    Attributes:
        name: In the user's model.
        value: At the beginning; on the CPU.
    """

    name: str
    value: torch.Tensor


@dataclass(frozen=True)
class Program:
    """What one file computes, in the forms from which files are written. All take the data by position.

    Those with ``state`` take it behind the data, and give ``(output, new state)``.

    Attributes:
        name: Of the target; ``""`` if the file is the model's own forward.
        converted: With torch's int8 kernels.
        qdq: In the neutral form. Called only if a format needs it.
        data: Real input.
        interface: How a call of the model becomes the data.
        config: Resolved.
        method: dynamic, static or qat.
        opaque: It runs Python code that no trace has seen, and may decide by the data.
        free_dims: For each input, the dimensions besides the batch whose sizes vary.
        in_float: The float model, where there is one beside the prepared graph.
        state: What it carries from call to call.
        one_sample: It takes one sample at a time: its state is that of one.
    """

    name: str
    converted: nn.Module
    qdq: Callable[[], nn.Module]
    data: tuple[Any, ...]
    interface: Interface
    config: QuantConfig
    method: Method
    opaque: bool = False
    free_dims: tuple[tuple[int, ...], ...] = ()
    in_float: nn.Module | None = None
    state: tuple[State, ...] = ()
    one_sample: bool = False

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The data, and the state at the beginning."""
        return (*self.data, *(state.value for state in self.state))

    def of_size(self, size: int, module: nn.Module | None = None) -> tuple[Any, ...]:
        """``inputs`` with so many samples, as far as ``module`` runs on that; see :func:`smaller`.

        Args:
            size: How many.
            module: Which of the forms is to run. Default: ``converted``.
        """
        if self.one_sample:
            return self.inputs
        state = self.inputs[len(self.data) :]
        return (*smaller(module or self.converted, self.data, size, state), *state)


def check_exportable(program: Program) -> None:
    """See whether the program decides by its data: a file would have the decisions of the example for good.

    Raises:
        ExportError: It does, or ``torch.export`` cannot tell.
    """
    if not program.opaque:
        return
    samples = program.data if program.one_sample else with_batch(program.data, 2)
    inputs = (*samples, *program.inputs[len(program.data) :])
    if program.state and formats_of(program.config, program.method) == ("torchscript",):
        _check_traceable(program, inputs)
        return
    source = program.qdq() if program.method != "dynamic" else program.converted
    try:
        with quiet(), torch.no_grad():
            capture(source, inputs)
    except Exception as error:  # torch.export's own errors, and those of the code that it runs
        reason = str(error).strip().split("\n")[0]
        raise ExportError(
            f"{program.name or 'forward'}: a file cannot hold it, because its code decides by the values of its data, "
            f"or does what torch.export cannot follow: {type(error).__name__}: {reason}"
        ) from error


def _check_traceable(program: Program, inputs: tuple[Any, ...]) -> None:
    """As :func:`check_exportable`, of what has no neutral form, and becomes TorchScript alone."""
    label = program.name or "forward"
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # of properties, for all of which torch asks
        warnings.simplefilter("always", torch.jit.TracerWarning)
        torch.jit.TracerWarning.ignore_lib_warnings()  # the checks of shapes in torch.nn
        try:
            with engine(program.config.engine), torch.random.fork_rng(devices=[]):
                torch.jit.trace(program.converted.eval(), inputs, check_trace=False, strict=False)
        except Exception as error:  # whatever the user's code raises when it is traced
            raise ExportError(
                f"{label}: torch.jit cannot trace it: {where(error)}{type(error).__name__}: {first_line(error)}"
            ) from error
    for warning in caught:
        if issubclass(warning.category, torch.jit.TracerWarning):
            raise ExportError(
                f"{label}: a file cannot hold it, because its code decides by the values of its data: "
                f"{warning.filename}:{warning.lineno}"
            )


def smaller(module: nn.Module, data: tuple[Any, ...], size: int, state: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """:func:`with_batch`; or ``data``, where ``module`` cannot run on that: bags and their offsets are no batch.

    Args:
        module: Takes the data and the state by position.
        data: Real input.
        size: How many samples.
        state: What it takes behind the data, which has no batch.
    """
    cut = with_batch(data, size)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module(*cut, *state)
    except Exception:  # whatever torch or the user's code raises
        return data
    return cut


def one_config(infos: list[Prepared]) -> QuantConfig:
    """The config of a file that holds several graphs: with the engine that is right for all of them."""
    engines = {known.config.engine for known in infos}
    return (
        next((known.config for known in infos if known.config.engine == "fbgemm"), infos[0].config)
        if len(engines) > 1
        else infos[0].config
    )

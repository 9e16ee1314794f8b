"""Does a file compute what it was written from? On real input, and if it does not: where does it begin to differ?"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.utils._pytree import tree_map

from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.errors import ExportError, QuantizationError
from lightning_quant.exporters.layouts import int8_layers
from lightning_quant.structures import all_same

#: Below this a file does not compute what it was written from (lowerings that were silently wrong gave 2 to 10 dB).
MIN_SQNR_DB = 25.0
#: A network that amplifies single roundings may differ by as much as it differs from itself, and a margin; not by more.
AMPLIFICATION_MARGIN_DB = 6.0
LEAST_SQNR_DB = 10.0
#: A bit less of activations makes one rounding to the next integer twice as large.
DB_PER_BIT = 6.0
#: How much further from float than the int8 model in memory a file may be.
FLOAT_MARGIN_DB = 1.0


def verify(
    label: str,
    loaded: nn.Module,
    source: Callable[..., Any],
    inputs: list[tuple[Any, ...]],
    *,
    in_float: nn.Module | None = None,
    converted: nn.Module | None = None,
    bits: int = 8,
    differs_at: Callable[[float], str] = lambda needed: "",
) -> float:
    """Compare a loaded file with the program that it was written from.

    Args:
        label: What the file is, for messages.
        loaded: The file.
        source: The program, run by torch.
        inputs: Real inputs of several sizes. The first counts.
        in_float: The float model, if there is one.
        converted: The int8 model in memory.
        bits: The fewest that an activation has. Runtimes round ties and biases in their own ways, which moves some
            values by one integer: with fewer bits that is a larger step.
        differs_at: Given the decibels that are needed, a sentence on the first layer that has less. Asked for only if
            the file is wrong.

    Returns:
        SQNR in dB on the first of ``inputs``.

    Raises:
        ExportError: It computes something else, or overwrites what it is given.
    """
    with torch.no_grad():
        given = copy.deepcopy(inputs)
        outputs = [loaded(*data) for data in given]
        if not all_same(inputs, given):
            raise ExportError(
                f"{label}: the file overwrites its inputs: whoever runs it twice on the same data gets two answers. It "
                "was not kept. Leave the format out with ExportConfig(formats=...), or the first layers in float with "
                "QuantConfig(skip=...)."
            )
        figures = [sqnr_db(source(*data), output) for data, output in zip(inputs, outputs, strict=True)]
        least = max(LEAST_SQNR_DB, MIN_SQNR_DB - DB_PER_BIT * (8 - bits))
        if min(figures) < least:
            own = min(_own_sqnr_db(source, data) for data in inputs)
            needed = max(LEAST_SQNR_DB, min(least, own - AMPLIFICATION_MARGIN_DB))
            if min(figures) < needed:
                raise ExportError(
                    f"{label}: the file computes something else than the model that it was written from: "
                    f"{min(figures):.1f} dB, where at least {needed:.0f} dB are needed. {differs_at(needed)}It was not "
                    "kept. Leave the format out with ExportConfig(formats=...), or find the layer with "
                    "QuantConfig(skip=...)."
                )
        if in_float is not None and converted is not None and figures[0] < 2 * MIN_SQNR_DB:
            margin = FLOAT_MARGIN_DB * (9 - bits)
            _check_distance_to_float(label, inputs[0], outputs[0], in_float, converted, margin)
    return figures[0]


def _check_distance_to_float(
    label: str, data: tuple[Any, ...], output: Any, in_float: nn.Module, converted: nn.Module, margin: float
) -> None:
    expected = in_float(*data)
    of_file, of_model = sqnr_db(expected, output), sqnr_db(expected, converted(*data))
    if of_file >= of_model - margin:
        return
    # a network that amplifies single roundings is now nearer to float and now further from it
    nudged = sqnr_db(expected, converted(*_nudged(data)))
    if of_file < min(of_model, nudged) - margin:
        raise ExportError(
            f"{label}: the file is further from the float model than the int8 model in memory: {of_file:.1f} dB "
            f"against {of_model:.1f} dB. It was not kept. Leave the format out with ExportConfig(formats=...)."
        )


def _own_sqnr_db(source: Callable[..., Any], data: tuple[Any, ...]) -> float:
    """SQNR of a program against itself when its float sums are rounded otherwise, as in another runtime.

    The last bit decides now and then to which integer a value is rounded, and a network with random weights amplifies
    one such step from layer to layer.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of GPUs
    with contextlib.ExitStack() as stack:
        stack.callback(torch._C._set_mkldnn_enabled, enabled)
        other = source(*_nudged(data))
    return sqnr_db(source(*data), other)


def _nudged(data: tuple[Any, ...]) -> tuple[Any, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nudged: tuple[Any, ...] = tree_map(
            lambda x: (
                x * (1 + 1e-6 * torch.randn_like(x)) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            ),
            data,
        )
    return nudged


def first_difference(
    program: torch.export.ExportedProgram,
    write: Callable[[torch.export.ExportedProgram, Path], nn.Module],
    data: tuple[Any, ...],
    needed: float,
) -> str:
    """The first layer whose output is further than ``needed`` dB from what torch computes.

    Args:
        program: The whole, as it was written.
        write: Writes a program to a path, and loads it again.
        data: Real input.
        needed: In dB.

    Returns:
        A sentence with a space behind it; nothing, if no layer is to blame.
    """
    layers = list(int8_layers(program).items())

    def is_wrong(index: int) -> bool:
        # a layer of another branch does not see what is wrong: all that came before has to be seen
        part = _until(program, [node.name for node in _last([node for _, node in layers[: index + 1]])])
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            loaded = write(part, Path(folder))
            values = zip(part.module()(*data), loaded(*data), strict=True)
            return any(sqnr_db(expected, found) < needed for expected, found in values)

    low, high = 0, len(layers)
    try:
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if is_wrong(middle) else (middle + 1, high)
    except (QuantizationError, ValueError):  # a part may have no file where the whole has one
        return ""
    return f"The first layer that differs is {layers[low][0]}. " if low < len(layers) else ""


def _last(nodes: list[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes`` on which no other of them depends."""
    needed: set[fx.Node] = set()
    waiting = [source for node in nodes for source in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    return [node for node in nodes if node not in needed]


def _until(program: torch.export.ExportedProgram, names: list[str]) -> torch.export.ExportedProgram:
    """A copy of ``program`` that gives a list with the values of these nodes."""
    shared = {id(tensor): tensor for tensor in (*program.state_dict.values(), *program.constants.values())}
    part = copy.deepcopy(program, shared)
    output = next(node for node in part.graph.nodes if node.op == "output")
    nodes = {node.name: node for node in part.graph.nodes}
    values = [nodes[name] for name in names]
    mutations = [spec for spec in part.graph_signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    kept = output.args[0][: len(mutations)]
    output.args = ((*kept, *values),)
    part.graph_signature.output_specs = [
        *mutations, *(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=name), None) for name in names)
    ]  # fmt: skip
    part.graph.eliminate_dead_code()
    part.graph_module.recompile()
    part.module_call_graph[0].signature.out_spec = torch.utils._pytree.tree_structure([0] * len(names))
    return part

"""What a file says of itself: the names, shapes and dtypes of what it takes and gives, and where it comes from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, treespec_dumps

from lightning_quant.config import QuantConfig
from lightning_quant.exporters.program import Program
from lightning_quant.runtime import FORMAT_VERSION
from lightning_quant.runtime.state import described as described_state
from lightning_quant.structures import Setting, described

Exported = torch.export.ExportedProgram


@dataclass(frozen=True)
class Facts:
    """What a file says of the model, beside what can be seen in it.

    Attributes:
        metrics: As ``{"float": {"val_acc": 0.97}, "int8": {"val_acc": 0.96}}``.
        class_labels: In the order of the outputs; None: not known.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    class_labels: tuple[str, ...] | None = None


NO_FACTS = Facts()


def metadata_of(
    program: Program,
    output: Any,
    format_name: str,
    shapes: list[list[int | None]],
    left_float: tuple[str, ...],
    facts: Facts,
) -> dict[str, Any]:
    """What a file says of itself, as JSON values; docs/deploy.md lists them.

    Args:
        program: What it computes.
        output: What that gives, without its state.
        format_name: torchscript, onnx, openvino, pt2 or aoti.
        shapes: Of its inputs, from :func:`shapes_of` or :func:`any_sizes`.
        left_float: Layers that this file alone computes in float.
        facts: What is known of the model beside that.
    """
    tensors = [x for x in tree_flatten(program.data)[0] if isinstance(x, torch.Tensor)]
    leaves, spec = tree_flatten(output)
    metadata = {
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "lightning_quant": _version(),
        "format": format_name,
        "method": program.method,
        "config": asdict(program.config),
        "target": program.name,
        "inputs": list(program.interface.inputs),
        "parameters": {
            key: described(part) for key, part in program.interface.structures.items() if not isinstance(part, Setting)
        },
        "tensors": _flat_names(list(program.interface.inputs), program.data),
        "shapes": shapes[: len(tensors)],
        "input_shapes": [list(x.shape) for x in tensors],
        "input_dtypes": [str(x.dtype) for x in tensors],
        "outputs": _output_names(output),
        "output_dtypes": [str(x.dtype) for x in leaves],
        "output_spec": treespec_dumps(spec),
        "left_float": list(left_float),
        "bits": bits_of(program.config, format_name),
        "metrics": facts.metrics,
        "class_labels": None if facts.class_labels is None else list(facts.class_labels),
    }
    return metadata | ({"state": _state(program, metadata)} if program.state else {})


#: Formats whose runtimes take integers of 4 bits, from which they make int8 when they load the file.
STORE_4_BITS = ("onnx", "openvino")


def bits_of(config: QuantConfig, format_name: str) -> dict[str, Any]:
    """Of weights and activations, as ``config`` has them, each number once; and the type that the smallest are kept in.

    >>> from lightning_quant.config import TensorSpec
    >>> bits_of(QuantConfig(weight=TensorSpec(bits=4)), "onnx")
    {'weights': [4], 'activations': [8], 'weights_stored': 'int4'}
    """
    weights = sorted({config.weight.bits, *(layer.weight.bits for layer in config.layers if layer.weight)})
    activations = sorted({config.activation.bits, *(o.activation.bits for o in config.layers if o.activation)})
    stored = "int4" if weights[0] <= 4 and format_name in STORE_4_BITS else "int8"
    return {"weights": weights, "activations": activations, "weights_stored": stored}


def remarks_on_bits(config: QuantConfig, formats: Collection[str]) -> list[str]:
    """Sentences for the report, where something has fewer than 8 bits."""
    bits = bits_of(config, "")
    remarks = []
    if bits["weights"][0] < 8:
        small = [name for name in formats if bits_of(config, name)["weights_stored"] == "int4"]
        wide = [name for name in formats if name not in small]
        remarks.append(
            f"Weights have {_numbers(bits['weights'])} bits."
            + (f" {', '.join(small)}: those of 4 or fewer are stored in 4 bits." if small else "")
            + (f" {', '.join(wide)}: stored in 8 bits, with the values of fewer, and no smaller." if wide else "")
        )
    if bits["activations"][0] < 8:
        remarks.append(
            f"Activations have {_numbers(bits['activations'])} bits: kernels compute with 8, and are held to the "
            "values of fewer."
        )
    return remarks


def _numbers(values: list[int]) -> str:
    return " and ".join(map(str, values))


def _state(program: Program, metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """The state with the names that it has in the file, which are no others of it."""
    used, entries = {*metadata["tensors"], *metadata["outputs"]}, []
    for state in program.state:
        names = []
        for name in (f"state_{state.name.replace('.', '_')}", f"next_state_{state.name.replace('.', '_')}"):
            while name in used:
                name += "_"
            used.add(name)
            names.append(name)
        entries.append(described_state(state.name, state.value, *names))
    return entries


def metadata_of_part(metadata: dict[str, Any], part: Exported) -> dict[str, Any]:
    """The metadata of a file that gives other outputs, and takes the state as data."""
    outputs = [torch.zeros(())] * len(part.graph_signature.user_outputs)
    state = metadata.pop("state", [])
    taken = [entry["input"] for entry in state]
    return {
        **metadata,
        "inputs": [*metadata["inputs"], *taken],
        "tensors": [*metadata["tensors"], *taken],
        "shapes": [*metadata["shapes"], *(entry["shape"] for entry in state)],
        "input_dtypes": [*metadata["input_dtypes"], *(entry["dtype"] for entry in state)],
        "outputs": _output_names(outputs),
        "output_spec": treespec_dumps(tree_flatten(outputs)[1]),
    }


def shapes_of(program: Exported) -> list[list[int | None]]:
    """The sizes of each input of a program; None: any."""
    inputs = set(program.graph_signature.user_inputs)
    return [
        [size if isinstance(size, int) else None for size in node.meta["val"].shape]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs and isinstance(node.meta.get("val"), torch.Tensor)
    ]


def any_sizes(program: Program) -> list[list[int | None]]:
    """TorchScript has no shapes: what it takes depends on what it computes with them."""
    first: list[int | None] = [1 if program.one_sample else None]
    tensors = [x for x in tree_flatten(program.data)[0] if isinstance(x, torch.Tensor)]
    return [[*first, *([None] * (x.dim() - 1))] if x.dim() else [] for x in tensors]


def _flat_names(names: list[str], inputs: tuple[Any, ...]) -> list[str]:
    """One name per tensor: the parameter's, numbered where the parameter is a container."""
    flat: list[str] = []
    for name, value in zip(names, inputs, strict=True):
        count = len([x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor)])
        flat.extend([name] if count == 1 else [f"{name}_{i}" for i in range(count)])
    return flat


def _output_names(output: Any) -> list[str]:
    """``output``; or, of several, their keys and indices in what forward returns."""
    paths = [path for path, _ in tree_flatten_with_path(output)[0]]
    names = ["_".join(keystr((key,)).strip("[].'\"") for key in path) for path in paths]
    return [name if name and not name[0].isdigit() else f"output{'_' * bool(name)}{name}" for name in names]


def _version() -> str:
    try:
        return version("lightning-quant")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"

"""What every loaded file has: its metadata, and inputs that are checked and in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from lightning_quant.errors import ArtifactError
from lightning_quant.formatting import shown_shape
from lightning_quant.structures import collect


class Artifact(nn.Module):
    """A loaded file. It is on the CPU, in eval mode, and has no Parameters.

    Attributes:
        metadata: What the file says of itself; see docs/deploy.md.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.metadata = metadata

    def ordered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The data of a call, in the order of the file's inputs.

        Raises:
            ArtifactError: An input is missing, is there twice or is unknown, or is of another dtype or shape.
        """
        names: list[str] = self.metadata["inputs"]
        data = self._by_name(names, args, kwargs)
        tensors = [x for x in tree_flatten(data)[0] if isinstance(x, torch.Tensor)]
        self._check(tensors)
        return data

    def _by_name(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        parameters: dict[str, Any] = self.metadata["parameters"]
        containers = any(not isinstance(x, torch.Tensor) for x in (*args, *kwargs.values()))
        if containers and len(args) <= len(parameters) and kwargs.keys() <= parameters.keys():
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            try:
                return tuple(x for name, part in parameters.items() for x in collect(part, given.get(name)))
            except KeyError as error:
                raise ArtifactError(f"this artifact takes {', '.join(names)}; {error} is missing.") from None
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        unknown, missing = [k for k in kwargs if k not in names], [name for name in names if name not in values]
        twice = set(names[: len(args)]) & kwargs.keys()
        if len(args) > len(names) or unknown or missing or twice:
            raise ArtifactError(
                f"this artifact takes {', '.join(names)}; it was given {len(args)} positional and "
                f"{sorted(kwargs)} keyword arguments."
            )
        return tuple(values[name] for name in names)

    def _check(self, tensors: list[torch.Tensor]) -> None:
        """Refuse dtypes and shapes that the file was not made for: not every runtime does."""
        shapes: list[list[int | None]] = self.metadata["shapes"]
        names, dtypes = self.metadata["tensors"], self.metadata["input_dtypes"]
        if len(tensors) != len(names):
            raise ArtifactError(f"this artifact takes {len(names)} tensors ({', '.join(names)}), not {len(tensors)}.")
        for name, tensor, dtype, shape in zip(names, tensors, dtypes, shapes, strict=True):
            if str(tensor.dtype) != dtype:
                raise ArtifactError(f"{name} is {tensor.dtype}; this artifact takes {dtype}: {name}.to({dtype})")
            fits = len(shape) == tensor.dim() and all(
                size is None or size == own for size, own in zip(shape, tensor.shape, strict=True)
            )
            if not fits:
                raise ArtifactError(
                    f"{name} has the shape {tuple(tensor.shape)}; this artifact takes {shown_shape(shape)}, where * is "
                    "any size."
                )

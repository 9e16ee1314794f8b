"""What every loaded file has: its metadata, and inputs that are checked and in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_loads

from lightning_quant.errors import ArtifactError
from lightning_quant.formatting import shown_shape
from lightning_quant.runtime.state import State
from lightning_quant.structures import collect


class Artifact(nn.Module):
    """A loaded file. It is on the CPU, in eval mode, and has no Parameters.

    What a model keeps in buffers from call to call is ``state``, which is fed to the file and taken from it again.

    Attributes:
        metadata: What the file says of itself; see docs/deploy.md.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.metadata = metadata
        self._state = State(metadata.get("state", []))

    @property
    def state(self) -> State:
        """Name of a buffer that the model's forward changes -> its value now. Empty: it changes none.

        ``file.state["last"] = value`` sets one, ``file.state = {"last": value}`` all of them.

        Raises:
            ArtifactError: Where it is set: a name, dtype or shape is not that of the file.
        """
        return self._state

    @state.setter
    def state(self, values: Mapping[str, torch.Tensor]) -> None:
        self._state.replace(values)

    def reset_state(self) -> None:
        """Let the next call be the first one again."""
        self._state.reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for its inputs, by position or by name."""
        output, state = self.compute(self.ordered(args, kwargs), tuple(self._state.values()))
        self._state.follow(state)
        return output

    def compute(self, data: tuple[Any, ...], state: tuple[torch.Tensor, ...]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """Run the file once, whatever ``self.state`` is.

        Args:
            data: From :meth:`ordered`.
            state: In the order of ``self.state``.

        Returns:
            The model's output, and the new state.
        """
        raise NotImplementedError  # each runtime has its own

    def _taken_apart(self, flat: Sequence[torch.Tensor]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """What the runtime gave, as :meth:`compute` gives it."""
        count = len(flat) - len(self._state)
        return tree_unflatten(list(flat[:count]), treespec_loads(self.metadata["output_spec"])), tuple(flat[count:])

    def _like(self, twin: Artifact) -> Artifact:
        """``twin`` with the mode and the state of this one."""
        twin.state = self.state
        return twin.train(self.training)

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


class Explicit(nn.Module):
    """A loaded file as a function of its data and its state, by position, which gives ``(output, new state)``.

    The state of the file itself does not move.
    """

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self.artifact = artifact

    def forward(self, *inputs: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """One call."""
        count = len(inputs) - len(self.artifact.state)
        return self.artifact.compute(self.artifact.ordered(inputs[:count], {}), inputs[count:])

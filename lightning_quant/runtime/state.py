"""The state that a file carries from call to call: what it begins with, and what it is now."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from lightning_quant.errors import ArtifactError


def described(name: str, value: torch.Tensor, taken_as: str, given_as: str) -> dict[str, Any]:
    """One buffer as JSON values.

    Args:
        name: Of the buffer in the user's model.
        value: At the beginning.
        taken_as: The file's input.
        given_as: The file's output, which is the next call's input.

    >>> described("last", torch.zeros(1, 2), "state_last", "next_state_last")["initial"]
    'AAAAAAAAAAA='
    """
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return {
        "name": name,
        "input": taken_as,
        "output": given_as,
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "initial": base64.b64encode(flat.numpy().tobytes()).decode(),
    }


def initial(entry: dict[str, Any]) -> torch.Tensor:
    """The value at the beginning, of what :func:`described` gave.

    Raises:
        ArtifactError: It is damaged.
    """
    try:
        dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
        content = bytearray(base64.b64decode(entry["initial"], validate=True))
        tensor = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return tensor.reshape(entry["shape"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, binascii.Error) as error:
        raise ArtifactError(f"the file's metadata has damaged state: {type(error).__name__}: {error}") from error


def tensor_names(metadata: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The names of all inputs and outputs of a file: those of the state come behind those of the model."""
    state = metadata.get("state", [])
    return (
        [*metadata["tensors"], *(entry["input"] for entry in state)],
        [*metadata["outputs"], *(entry["output"] for entry in state)],
    )


class State(MutableMapping[str, torch.Tensor]):
    """Name of a buffer of the model -> the value that it has now. Values can be set, names cannot be added or removed.

    Setting one copies it, and raises :class:`ArtifactError` where its dtype or shape is another one.
    """

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._first = {entry["name"]: initial(entry) for entry in entries}
        self._now = {name: value.clone() for name, value in self._first.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._now[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self._now[name] = self._checked(name, value).detach().cpu().clone()

    def __delitem__(self, name: str) -> None:
        raise ArtifactError(f"state[{name!r}] cannot be removed; reset_state() gives it its first value again.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._now)

    def __len__(self) -> int:
        return len(self._now)

    def __repr__(self) -> str:
        return repr(self._now)

    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set all of them at once, or none.

        Raises:
            ArtifactError: A name is missing or unknown, or a value does not fit.
        """
        if values.keys() != self._now.keys():
            known = ", ".join(self._now) or "nothing"
            raise ArtifactError(
                f"the state of this file is {known}; it was given {', '.join(map(str, values)) or 'nothing'}."
            )
        checked = {name: self._checked(name, values[name]) for name in self._now}
        for name, value in checked.items():
            self[name] = value

    def follow(self, values: tuple[torch.Tensor, ...]) -> None:
        """Take what a call gave, in order.

        Raises:
            ArtifactError: It is of another shape or dtype.
        """
        checked = [self._checked(name, value) for name, value in zip(self._now, values, strict=True)]
        for name, value in zip(self._now, checked, strict=True):
            self._now[name] = value.detach()

    def reset(self) -> None:
        """The values of the beginning."""
        self._now = {name: value.clone() for name, value in self._first.items()}

    def _checked(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in self._first:
            raise ArtifactError(f"state[{name!r}]: the state of this file is {', '.join(self._first) or 'nothing'}.")
        first = self._first[name]
        if not isinstance(value, torch.Tensor):
            raise ArtifactError(f"state[{name!r}]: give a tensor, not a {type(value).__name__}.")
        if value.dtype != first.dtype or value.shape != first.shape:
            raise ArtifactError(
                f"state[{name!r}] is {first.dtype} of the shape {tuple(first.shape)}; it was given {value.dtype} of "
                f"the shape {tuple(value.shape)}."
            )
        return value

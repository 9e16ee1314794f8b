"""What the zoo trains on: small tasks on real data that comes inside scikit-learn, its digits and its documentation.

A task gives the inputs in the shape that an architecture takes, and turns outputs and targets into scores of classes
and labels, so that all of them are trained alike: cross entropy and accuracy.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Of a task.
SAMPLES = 48
IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: In docs/zoo.md.
        data: Given an example of the architecture's inputs: inputs of that kind with ``SAMPLES`` rows, and a target of
            each.
        scores: Given outputs and targets: scores ``(n, classes)`` and labels ``(n,)``, of what is to be told apart.
    """

    name: str
    data: Callable[[Any], tuple[Any, Tensor]]
    scores: Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def _digits() -> tuple[Tensor, Tensor]:
    """``(samples, 8, 8)`` from -1 to 1, and the digits ``(samples,)``."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    return torch.tensor(found.images, dtype=torch.float32)[order] / 8 - 1, torch.tensor(found.target)[order]


def _resized(grey: Tensor, shape: torch.Size) -> Tensor:
    """``(samples, height, width)`` as images or clips of ``shape``, the same in each channel and frame."""
    sized = F.interpolate(grey[:, None], size=tuple(shape[-2:]), mode="bilinear")
    return sized.reshape(len(grey), *(1,) * (len(shape) - 3), *shape[-2:]).expand(len(grey), *shape[1:]).contiguous()


def _images(example: Any) -> tuple[Any, Tensor]:
    grey, labels = _digits()
    return (_resized(grey, example[0].shape),), labels


def _masked_images(example: Any) -> tuple[Any, Tensor]:
    grey, _ = _digits()
    images = _resized(grey, example[0].shape)
    return (images,), (images[:, 0] > 0).long()


def _placed_images(example: Any) -> tuple[Any, Tensor]:
    """Each digit half as large, in one of the four corners; the target is where its ink is."""
    grey, _ = _digits()
    canvas = torch.full((len(grey), 16, 16), -1.0)
    for index, image in enumerate(grey):
        top, left = 8 * (index % 2), 8 * (index // 2 % 2)
        canvas[index, top : top + 8, left : left + 8] = image
    images = _resized(canvas, example[0].shape)
    return (images,), (images[:, 0] > 0).long()


def _waves(example: Any) -> tuple[Any, Tensor]:
    """The 64 grey values of a digit, row by row, as a wave of the length of the example."""
    grey, labels = _digits()
    return (F.interpolate(grey.flatten(1)[:, None], size=example[0].shape[-1], mode="linear")[:, 0],), labels


def _lines(example: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Lines of two texts by turns, as ASCII codes with zeros behind; the target is the text that it comes from."""
    from sklearn.datasets import load_breast_cancer, load_digits

    length = example["input_ids"].shape[1]
    texts = [textwrap.wrap(load().DESCR, length) for load in (load_digits, load_breast_cancer)]
    lines = [texts[index % 2][index // 2] for index in range(SAMPLES)]
    ids = torch.tensor([list(line.encode("ascii").ljust(length, b"\0")) for line in lines])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.arange(SAMPLES) % 2


def _next_letters(example: Any) -> tuple[dict[str, Tensor], Tensor]:
    inputs, _ = _lines(example)
    ids = inputs["input_ids"]
    return inputs, ids.masked_fill(ids == 0, IGNORED)


def _of_sample(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One score per class: of ten classes, or of two where the network has no more."""
    if hasattr(outputs, "last_hidden_state"):  # a network without a head: its first features, averaged over the text
        outputs = outputs.last_hidden_state.mean(1)
    scores = getattr(outputs, "logits", outputs)[:, :10]
    return scores, targets % scores.shape[1]


def _of_pixels(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Ink or paper, in each pixel."""
    return outputs["out"][:, :2].permute(0, 2, 3, 1).flatten(0, 2), targets.flatten()


def _of_cells(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Ink or none, in each cell of each map of a feature pyramid."""
    scores = [level[:, :2].permute(0, 2, 3, 1).flatten(0, 2) for level in outputs.values()]
    labels = [F.adaptive_max_pool2d(targets[:, None].float(), x.shape[-2:]).long().flatten() for x in outputs.values()]
    return torch.cat(scores), torch.cat(labels)


def _of_next_letters(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    scores, labels = outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
    return scores[labels != IGNORED], labels[labels != IGNORED]


DIGITS = Task("digits", _images, _of_sample)
MASKS = Task("ink of digits, by pixel", _masked_images, _of_pixels)
PLACES = Task("ink of digits in a corner, by cell of each level", _placed_images, _of_cells)
WAVES = Task("digits as waves, odd or even", _waves, _of_sample)
TEXTS = Task("lines of two texts", _lines, _of_sample)
NEXT_LETTERS = Task("next letter", _next_letters, _of_next_letters)

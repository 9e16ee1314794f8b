"""A float teacher in quantization-aware training: the module before it was quantized shows what it gave.

The loss of the user's ``training_step`` gets a term that is small where the quantized network gives what the float one
gives for the same data: of its output (Hinton et al. 2015, https://arxiv.org/abs/1503.02531), and of layers inside of
it (FitNets, Romero et al. 2015, https://arxiv.org/abs/1412.6550).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from lightning_quant.arguments import Positional
from lightning_quant.backends.graph import info
from lightning_quant.backends.taps import Tap, tap
from lightning_quant.config import near
from lightning_quant.errors import ConfigError
from lightning_quant.evaluate import copy_of

LossName = Literal["auto", "kl", "mse"]

#: The name of the logged metric.
METRIC = "distillation_loss"


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a float teacher takes part in the loss. The teacher is the module as it was when quantization began.

    Attributes:
        weight: Factor of the term of the output. 0: there is none.
        temperature: By which scores are divided before the softmax; the term is multiplied by its square, so that its
            gradients stay of one size (Hinton et al. 2015, section 2).
        loss: Of the output: ``kl``, the Kullback-Leibler divergence of the softmax over dimension 1; ``mse``, the mean
            squared error; ``auto``: ``kl`` for outputs ``(N, classes)`` with more than one class, ``mse`` for others.
        features: Names of submodules whose outputs are compared as well, by their mean squared error in units of the
            teacher's mean square.
        feature_weight: Factor of the sum of their terms.

    Raises:
        ConfigError: A value is not one of the choices, or nothing is compared.

    >>> Distillation(temperature=2.0).loss
    'auto'
    """

    weight: float = 1.0
    temperature: float = 4.0
    loss: LossName = "auto"
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight", "temperature", "feature_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"Distillation({name}={value!r}): give a number that is not negative.")
        if self.temperature == 0:
            raise ConfigError("Distillation(temperature=0): scores are divided by it. Give a number above 0.")
        if self.loss not in get_args(LossName):
            raise ConfigError(f"Distillation(loss={self.loss!r}): not one of 'auto', 'kl', 'mse'.")
        if isinstance(self.features, str):
            raise ConfigError(f"Distillation(features={self.features!r}): give a list, e.g. ({self.features!r},).")
        object.__setattr__(self, "features", tuple(self.features))  # YAML gives lists
        if self.weight == 0 and not (self.features and self.feature_weight):
            raise ConfigError(
                "Distillation(weight=0) without features: nothing is compared. Give a weight, or features."
            )


# ---- losses


def output_loss(student: Any, teacher: Any, settings: Distillation) -> torch.Tensor:
    """How far two outputs of one structure are apart: a scalar, float32.

    Args:
        student: Tensors in tuples, lists and dicts; those of floats count, each as much as any other.
        teacher: The same of the float module.
        settings: Which loss, and its temperature.
    """
    pairs = zip(tree_flatten(student)[0], tree_flatten(teacher)[0], strict=True)
    terms = [
        _tensor_loss(a.float(), b.float(), settings)
        for a, b in pairs
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    return torch.stack(terms).sum()


def _tensor_loss(student: torch.Tensor, teacher: torch.Tensor, settings: Distillation) -> torch.Tensor:
    scores = student.dim() == 2 and student.shape[1] > 1
    if settings.loss == "mse" or (settings.loss == "auto" and not scores):
        return F.mse_loss(student, teacher)
    return divergence(student, teacher, settings.temperature)


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, the mean over all but dimension 1.

    Args:
        student: Scores ``(N, classes, ...)``.
        teacher: As many.
        temperature: ``T``.
    """
    log_student, log_teacher = (F.log_softmax(scores / temperature, dim=1) for scores in (student, teacher))
    total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return total * temperature**2 / (student.numel() / student.shape[1])


def feature_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error in units of the teacher's mean square: 1 for a student that gives 0 everywhere."""
    student, teacher = student.float(), teacher.float()
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


# ---- in training


class Distiller:
    """Adds the terms to the loss of ``training_step``, while ``enabled``.

    The teacher is no child of the module that trains: no ``state_dict`` of it and no file has it.

    Args:
        settings: What is compared.
        module: The LightningModule, with graphs attached.
        graphs: Target name -> prepared graph.
        parallel: There are several processes.

    Raises:
        ConfigError: The module optimizes by hand, or a feature cannot be read.
    """

    def __init__(self, settings: Distillation, module: Any, graphs: Mapping[str, nn.Module], parallel: bool) -> None:
        check_optimization(module)
        self.settings = settings
        self.enabled = False
        self.teacher: Any = None
        self._graphs = dict(graphs)
        self._parallel = parallel
        self._taps = {name: self._find(module, name) for name in settings.features}
        self._of_teacher: dict[str, list[torch.Tensor]] = {}

    def _find(self, module: Any, name: str) -> tuple[str, Tap] | None:
        """The target that a feature is in, and where; None: it is not in a graph."""
        names = {n for n, _ in module.named_modules() if n and not n.startswith("_lightning_quant")}
        if name not in names:
            raise ConfigError(f"Distillation(features=...): there is no submodule {name!r}. {near(name, names)}")
        inside = [target for target in self._graphs if not target or name == target or name.startswith(f"{target}.")]
        if not inside:
            return None
        target = max(inside, key=len)
        if name == target:
            raise ConfigError(
                f"Distillation(features=...): {name!r} is quantized as a whole, and what it gives is compared by "
                "weight. Name a part of it."
            )
        return target, tap(self._graphs[target], name.removeprefix(f"{target}.") if target else name)

    # -- the teacher

    def begin(self, module: Any) -> None:
        """Take the module as it is now as the teacher, if there is none."""
        if self.teacher is not None:
            return
        self.teacher = copy_of(module).to(module.device)
        self.teacher.requires_grad_(False)
        for name in self.settings.features:
            kept = self._of_teacher.setdefault(name, [])
            self.teacher.get_submodule(name).register_forward_hook(lambda _, __, given, kept=kept: kept.append(given))

    def state(self) -> dict[str, torch.Tensor] | None:
        """The weights and buffers of the teacher, for a checkpoint; None: quantization has not begun."""
        if self.teacher is None:
            return None
        return {name: value.detach().cpu() for name, value in self.teacher.state_dict().items()}

    def restore(self, module: Any, state: dict[str, Any]) -> None:
        """Go on with the teacher of a checkpoint, or of the last run.

        Args:
            module: The LightningModule.
            state: Of the callback; empty: there is none.

        Raises:
            ConfigError: It is of a quantized training without a teacher.
        """
        if state.get("teacher"):
            self.begin(module)
            self.teacher.load_state_dict(state["teacher"])
        elif state and state["phase"]["quantize"]:
            raise ConfigError(
                "distill=...: this goes on with a quantized training that had no teacher, and the float weights from "
                "before it are gone. Leave distill out, or begin with a float checkpoint."
            )

    # -- the loss

    def step(self, module: Any, call: Callable[[], Any]) -> Any:
        """What ``training_step`` gives, its loss with the terms.

        Args:
            module: The LightningModule.
            call: Its own ``training_step`` with its arguments.

        Raises:
            ConfigError: No output could be compared in this step.
        """
        if not self.enabled or self.teacher is None:
            return call()
        with self._watching(module) as (calls, features):
            result = call()
        loss = self._loss(calls, features)
        module.log(
            METRIC, loss.detach(), on_step=False, on_epoch=True, sync_dist=self._parallel, batch_size=_samples(calls)
        )
        if result is None:
            return None
        if isinstance(result, dict):
            return {**result, "loss": result["loss"] + loss}
        return result + loss

    @contextmanager
    def _watching(self, module: Any) -> Iterator[tuple[list[Any], dict[str, list[torch.Tensor]]]]:
        """Note each call of what is compared, and the features that were seen during it."""
        calls: list[Any] = []
        features: dict[str, list[torch.Tensor]] = {name: [] for name in self._taps}
        handles = []
        if len(self._graphs) == 1:
            ((target, graph),) = self._graphs.items()
            handles.append(graph.register_forward_hook(lambda _, data, given: calls.append((target, data, given))))
        else:
            # while a step runs, so that it does not see the call by which DistributedDataParallel runs the step itself
            handles.append(
                module.register_forward_hook(
                    lambda _, args, kwargs, given: calls.append((None, (args, kwargs), given)), with_kwargs=True
                )
            )
        for name, found in self._taps.items():
            handles.append(self._listen(module, name, found, features[name]))
        try:
            yield calls, features
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, module: Any, name: str, found: tuple[str, Tap] | None, into: list[torch.Tensor]) -> Any:
        if found is None:
            return module.get_submodule(name).register_forward_hook(lambda _, __, given: into.append(given))
        target, place = found
        graph: Any = self._graphs[target]
        read = graph.get_submodule(place.name)
        uses = sum(
            node.op == "call_module" and graph.get_submodule(str(node.target)) is read for node in graph.graph.nodes
        )
        count = iter(range(10**9))

        def hear(_: Any, __: Any, given: torch.Tensor) -> None:
            if next(count) % uses == place.call:
                into.append(given)

        return read.register_forward_hook(hear)

    def _loss(self, calls: list[Any], features: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        if not calls:
            raise ConfigError(_NOT_CALLED.format(", ".join(repr(name) for name in self._graphs)))
        for kept in self._of_teacher.values():
            kept.clear()
        terms = []
        for target, data, student in calls:
            with torch.no_grad():
                teacher = self._answer(target, data)
            if self.settings.weight:
                terms.append(self.settings.weight * output_loss(student, teacher, self.settings))
        for name, seen in features.items():
            expected = self._of_teacher[name]
            if len(seen) != len(expected) or not seen:
                raise ConfigError(
                    f"Distillation(features=...): {name!r} ran {len(seen)} times in the quantized network and "
                    f"{len(expected)} times in float. Name a module that is called once in a pass."
                )
            found = self._taps[name]
            clamp = Tap.clamp if found is None else found[1].clamp
            for student, teacher in zip(seen, expected, strict=True):
                terms.append(self.settings.feature_weight * feature_loss(student, teacher.clamp(*clamp)))
            expected.clear()
        return torch.stack(terms).sum() / len(calls)

    def _answer(self, target: str | None, data: Any) -> Any:
        """What the teacher gives for the same data, in the structure of what the student gave."""
        if target is None:
            args, kwargs = data
            return self.teacher(*args, **kwargs)
        part = self.teacher.get_submodule(target)
        return Positional(part, info(self._graphs[target]).interface)(*data)


_NOT_CALLED = (
    "distill=...: training_step called none of what could be compared: {}. With one quantized part its output is, with "
    "several the module's forward: call self(...) in training_step, or name one part with QuantConfig(targets=...)."
)


def check_optimization(module: Any) -> None:
    """Refuse modules that call ``backward`` themselves.

    Raises:
        ConfigError: It does.
    """
    if not module.automatic_optimization:
        raise ConfigError(
            f"distill=... with manual optimization: {type(module).__name__} calls manual_backward with losses of its "
            "own, to which nothing can be added from outside. Use automatic optimization, or leave distill out."
        )


def _samples(calls: list[Any]) -> int:
    tensors = [x for x in tree_flatten(calls[0][1])[0] if isinstance(x, torch.Tensor) and x.dim()]
    return int(tensors[0].shape[0]) if tensors else 1

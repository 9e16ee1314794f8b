"""What a checkpoint of a quantization-aware training holds beside the float module, and int8 files from it alone.

``checkpoint["lightning_quant"]`` has tensors and plain values, no code:

* ``observers``: target -> ranges, scales and zero points; ``optimizer_states``: what optimizers keep of learned scales;
* ``phase``: what the epoch was trained in;
* ``config`` and ``export``: the settings of the callback;
* ``example``: two samples of the input of ``forward``, with which the model can be traced again.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import torch

from lightning_quant._roots import ROOTS, root_of
from lightning_quant.arguments import Call, Interface, Positional, signature_of
from lightning_quant.attachment import attach
from lightning_quant.capture import Capture
from lightning_quant.config import (
    ExportConfig,
    LayerConfig,
    Method,
    QuantConfig,
    TensorSpec,
    check_method,
    plain,
    resolve_formats,
)
from lightning_quant.errors import ArtifactError, CaptureError, ConfigError, ExportError, QuantizationError, first_line
from lightning_quant.evaluate import ValidationData, copy_of
from lightning_quant.exporters import check_writable, smaller
from lightning_quant.inputs import Sample, isolated_rng, sample_without_trainer
from lightning_quant.parts import Graphs, convert_module
from lightning_quant.phases import load_observer_state
from lightning_quant.pipeline import capture, deliver, prepare_graphs
from lightning_quant.report import QuantReport

log = logging.getLogger(__name__)

#: Where a checkpoint keeps all this, beside ``state_dict``.
CHECKPOINT_KEY = "lightning_quant"

_METHOD: Method = "qat"


def settings(config: QuantConfig, export: ExportConfig) -> dict[str, Any]:
    """Both as plain values, with tuples as lists: what :func:`config_of` and :func:`export_of` read."""
    return {"config": plain(config), "export": plain(export)}


def config_of(state: dict[str, Any]) -> QuantConfig:
    """The QuantConfig that a checkpoint was trained with.

    Raises:
        ConfigError: A class of the user's own that it names cannot be imported.
    """
    kept = _with_specs(state["config"])
    return QuantConfig(**{**kept, "layers": tuple(LayerConfig(**_with_specs(layer)) for layer in kept["layers"])})


def _with_specs(kept: dict[str, Any]) -> dict[str, Any]:
    return {name: TensorSpec(**value) if isinstance(value, dict) else value for name, value in kept.items()}


def export_of(state: dict[str, Any]) -> ExportConfig:
    """The ExportConfig that a checkpoint was trained with."""
    return ExportConfig(**state["export"])


def example_of(module: Any, sample: Sample) -> dict[str, Any] | None:
    """Two samples of the input of ``module.forward`` as ``{"args": [...], "kwargs": {...}}``.

    None where no step calls ``forward``, or it takes what is neither a tensor nor plain.

    Args:
        module: The LightningModule; a copy runs.
        sample: From :func:`lightning_quant.inputs.sample`.
    """
    call = sample.recordings[""].call if "" in sample.recordings else None
    if call is None:
        return None
    try:
        interface = Interface.of(signature_of(module), call)
    except CaptureError:
        return None
    twin = Positional(copy_of(module), interface)
    args, kwargs = interface.rebuild(smaller(twin, interface.flatten(call.args, call.keywords), 2))
    example = {"args": list(args), "kwargs": dict(kwargs)}
    # a part of a larger tensor would be stored with all of it
    return _cloned(example) if _is_storable(example) else None


def _is_storable(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` reads it."""
    if type(value) in (list, tuple):
        return all(map(_is_storable, value))
    if type(value) is dict:
        return all(isinstance(key, str) and _is_storable(part) for key, part in value.items())
    return type(value) is torch.Tensor or value is None or type(value) in (bool, int, float, str)


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cloned(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_cloned, value))
    return value.clone() if isinstance(value, torch.Tensor) else value


# ---- trained graphs


def load_observers(graphs: Graphs, observers: dict[str, dict[str, torch.Tensor]]) -> None:
    """Give the graphs of all targets the ranges of a checkpoint.

    Raises:
        ConfigError: They are those of another model or another configuration.
    """
    if graphs.keys() != observers.keys():
        raise ConfigError(
            f"the checkpoint was quantized in {sorted(observers)}, this module is in {sorted(graphs)}. Use the "
            "QuantConfig (targets, skip) that it was trained with."
        )
    for name, graph in graphs.items():
        load_observer_state(graph, observers[name])


def trained_graphs(module: Any, captured: Capture, config: QuantConfig, state: dict[str, Any], label: str) -> Graphs:
    """The prepared graphs of a module that has a checkpoint's weights, with the checkpoint's ranges.

    Args:
        module: Not changed.
        captured: From :func:`lightning_quant.pipeline.capture`.
        config: That the checkpoint was trained with.
        state: ``checkpoint["lightning_quant"]``.
        label: What to call the checkpoint in a message.

    Raises:
        ConfigError: The checkpoint is from before quantization began, or of another model or configuration.
    """
    check_quantized(state, label)
    twin = copy_of(module)
    graphs = prepare_graphs(twin, captured, config, _METHOD)
    attach(twin, graphs)
    load_observers(graphs, state["observers"])
    return graphs


def check_quantized(state: dict[str, Any], label: str) -> None:
    """Refuse what was never trained with fake quantize.

    Raises:
        ConfigError: There are no observers, or the phase of the checkpoint is float.
    """
    if not state:
        raise ConfigError(
            f"{label} has no observers: it was saved without QuantizationAwareTraining. Test it without the callback, "
            "or give PostTrainingQuantization."
        )
    if not state["phase"]["quantize"]:
        raise ConfigError(
            f"{label} is from before quantization began (start_epoch): its weights have never seen fake quantize. "
            "Choose a later one (save_last=True and ckpt_path='last', or a ModelCheckpoint for each epoch), or "
            "quantize this one with PostTrainingQuantization."
        )


# ---- files from a checkpoint


def export_checkpoint(
    checkpoint: str | Path,
    module: Any,
    *,
    datamodule: Any = None,
    directory: str | None = None,
    formats: Iterable[str] | None = None,
) -> QuantReport:
    """Write the int8 files and the report of a quantization-aware training from its checkpoint.

    Nothing is trained and nothing is calibrated: weights and ranges are those of the checkpoint. Metrics, and the real
    input on which files are compared, come from the validation data of ``datamodule``, else of the module. Where there
    is none, there are no metrics, and files are compared on the two samples that the checkpoint has, else on
    ``example_input_array``.

    Args:
        checkpoint: Saved by a Trainer with :class:`lightning_quant.QuantizationAwareTraining`, also with
            ``save_weights_only``. It is read with ``weights_only=True``: no code in it is run. Classes of a user's own
            that its QuantConfig names are imported.
        module: The LightningModule that was trained (not changed), or its class, for which the checkpoint has
            hyperparameters.
        datamodule: A LightningDataModule or its class, or None.
        directory: Where the files go. None: as in training.
        formats: Which files. None: as in training.

    Returns:
        The report, which has been written beside the files.

    Raises:
        ConfigError: The checkpoint cannot be exported, or the module cannot be made from it.
        ArtifactError: The file cannot be read as a checkpoint.
        CaptureError: There is no input to trace the module with: give a datamodule.
        ExportError: A file could not be written, or computes something else.
    """
    path = Path(checkpoint)
    whole = read(path)
    state = whole.get(CHECKPOINT_KEY, {})
    check_quantized(state, f"{path}: this checkpoint")
    config = config_of(state)
    export = export_of(state)
    if directory is not None:
        export = replace(export, directory=directory)
    if formats is not None:
        export = replace(export, formats=tuple(formats))  # type: ignore[arg-type]  # checked by ExportConfig
    check_method(config, _METHOD)
    resolve_formats(config, _METHOD, export)
    check_writable(export.path)
    module = restored(module, path, whole)
    with isolated_rng():
        data = validation_data_of(module, made_datamodule(datamodule, path))
        sample = sample_without_trainer(module, data, _example(state))
        captured = _captured(module, sample, config, state["observers"])
        graphs = trained_graphs(module, captured, config, state, f"{path}: this checkpoint")
        return deliver(convert_module(module, graphs), captured, sample, data, config, _METHOD, export)


def read(path: Path, function: str = "lightning_quant.export_checkpoint") -> dict[str, Any]:
    """A checkpoint of Lightning, read without running code in it.

    Args:
        path: Of the file.
        function: What to call where the command cannot help, for messages.

    Raises:
        ConfigError: There is no such file.
        ArtifactError: It is no checkpoint, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file. Give a checkpoint of a training.")
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path}: {first_line(error)} A checkpoint is read without running code in it. If this is one, and you "
            "trust it, allow the classes that it holds (of hyperparameters, for example) with "
            f"torch.serialization.add_safe_globals, and call {function}."
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError) as error:  # what torch's unpickler raises of any bytes
        raise ArtifactError(f"{path}: cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(whole, dict) or "state_dict" not in whole:
        raise ArtifactError(f"{path}: this is no checkpoint of Lightning. Give one that a Trainer has saved.")
    return whole


def restored(
    module: Any, path: Path, whole: dict[str, Any], function: str = "lightning_quant.export_checkpoint"
) -> Any:
    """A LightningModule with the weights of a checkpoint, on the CPU.

    Args:
        module: It, or its class, which is made from the hyperparameters of the checkpoint.
        path: Of the checkpoint.
        whole: From :func:`read`.
        function: What to call where the command cannot help, for messages.

    Raises:
        ConfigError: It cannot be made, or the weights are those of another module.
    """
    if isinstance(module, tuple(root.LightningModule for root in ROOTS)):
        twin: Any = copy_of(module)
        twin.on_load_checkpoint(whole)
        return _with_weights(twin, path, whole)
    _check_class(module, "module", "LightningModule")
    try:
        made = _loaded(module, path)
    except TypeError as error:
        raise ConfigError(
            f"{module.__name__} cannot be made from {path}: {first_line(error)}. The checkpoint has the arguments of a "
            "module that calls self.save_hyperparameters() in its __init__. For another one call "
            f"{function} with a module that you have made."
        ) from error
    return _with_weights(made, path, whole)


def _check_class(value: Any, name: str, of: str) -> None:
    if not (inspect.isclass(value) and any(issubclass(value, getattr(root, of)) for root in ROOTS)):
        raise ConfigError(f"{name}={value!r}: give a {of} or its class.")


def _loaded(module: Any, path: Path) -> Any:
    try:
        return module.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if not _does_not_fit(error):
            raise
    # keys that are missing: layers that setup builds are not there yet
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found keys that are")
            made = module.load_from_checkpoint(path, map_location="cpu", strict=False, weights_only=True)
    except RuntimeError as error:
        if not _does_not_fit(error):
            raise
        raise _another_module(path, error) from error
    made.setup("fit")
    return made


def _does_not_fit(error: RuntimeError) -> bool:
    return "Error(s) in loading state_dict" in str(error)  # of torch's load_state_dict


def _another_module(path: Path, error: RuntimeError) -> ConfigError:
    return ConfigError(f"{path}: the weights are those of another module: {error}")


def _with_weights(module: Any, path: Path, whole: dict[str, Any]) -> Any:
    try:
        module.load_state_dict(whole["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        raise _another_module(path, error) from error
    return module.cpu()


def made_datamodule(datamodule: Any, path: Path, function: str = "lightning_quant.export_checkpoint") -> Any:
    """A datamodule: it, or made from its class and the hyperparameters of the checkpoint.

    Raises:
        ConfigError: It cannot be made.
    """
    if datamodule is None or not inspect.isclass(datamodule):
        return datamodule
    _check_class(datamodule, "datamodule", "LightningDataModule")
    kind: Any = datamodule
    try:
        return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except TypeError as error:
        raise ConfigError(
            f"{datamodule.__name__} cannot be made from {path}: {first_line(error)}. The checkpoint has the arguments "
            "of a datamodule that calls self.save_hyperparameters() in its __init__. For another one call "
            f"{function} with a datamodule that you have made."
        ) from error


def validation_data_of(module: Any, datamodule: Any) -> ValidationData | None:
    """All validation batches of the datamodule, else of the module; None: there are none."""
    root = root_of(module)
    overridden = root.utilities.model_helpers.is_overridden
    if not overridden("validation_step", module):
        return None
    if datamodule is not None:
        datamodule.prepare_data()
        datamodule.setup("validate")
    owner = next((o for o in (datamodule, module) if o is not None and overridden("val_dataloader", o)), None)
    if owner is None:
        return None
    loaders = owner.val_dataloader()
    # a CombinedLoader says how
    several, mode = getattr(loaders, "iterables", loaders), getattr(loaders, "_mode", "sequential")
    return ValidationData(root, several, mode, datamodule, 1.0)


def _example(state: dict[str, Any]) -> Call | None:
    kept = state["example"]
    return None if kept is None else Call(tuple(kept["args"]), kept["kwargs"])


def _captured(module: Any, sample: Sample, config: QuantConfig, observers: Iterable[str]) -> Capture:
    """The targets that were trained.

    In training they were found from training steps as well, which may call a submodule in other ways: then they are
    named.
    """
    with torch.device("cpu"):
        captured = capture(module, sample, config, _METHOD)
        if {target.name for target in captured.targets} != set(observers) and "" not in observers:
            captured = capture(module, sample, replace(config, targets=tuple(map(escape, observers))), _METHOD)
    return captured


# ---- when the end of a training fails


@contextlib.contextmanager
def nothing_is_lost(how: Callable[[], str]) -> Iterator[None]:
    """Let an error say that the training is there, and how the files are written again.

    Args:
        how: What to do.

    Raises:
        QuantizationError: The same one, with that text; any other exception becomes an ExportError.
    """
    try:
        yield
    except QuantizationError as error:
        error.args = (f"{error} {_KEPT} {how()}",)
        raise
    except Exception as error:  # whatever fails between the last batch and the last file
        raise ExportError(
            f"the int8 model could not be made: {type(error).__name__}: {str(error).rstrip('.')}. {_KEPT} {how()}"
        ) from error


_KEPT = "The training is not lost: the module has the trained weights."


def how_to_export(trainer: Any, module: Any) -> str:
    """The command that writes the files of a training again."""
    data = "" if trainer.datamodule is None else f" --data {_import_path(trainer.datamodule)}"
    path = _last_checkpoint(trainer)
    saved = "" if path else "Save a checkpoint with trainer.save_checkpoint('trained.ckpt'). "
    return (
        f"{saved}Write the files again with: lightning-quant export {path or 'trained.ckpt'} --model "
        f"{_import_path(module)}{data}"
    )


def _last_checkpoint(trainer: Any) -> str | None:
    """The file that a ModelCheckpoint wrote last."""
    found = {
        str(path)
        for callback in trainer.checkpoint_callbacks
        for path in (getattr(callback, name, "") for name in ("last_model_path", "best_model_path"))
        if path and Path(path).is_file()
    }
    return max(found, key=lambda path: Path(path).stat().st_mtime_ns, default=None)


def _import_path(value: Any) -> str:
    kind = type(value)
    module = kind.__module__
    if module == "__main__":  # a script is imported by the name of its file
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").stem
    return f"{module}.{kind.__qualname__}"

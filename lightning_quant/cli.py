"""The ``lightning-quant`` command: each function is one, its parameters are the options."""

from __future__ import annotations

import json as _json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentParser

from lightning_quant import demo as _demo
from lightning_quant._roots import ROOTS
from lightning_quant.analysis.comparison import compare as _compare
from lightning_quant.analysis.comparison import read_data
from lightning_quant.config import Method, PostTrainingMethod, QuantConfig
from lightning_quant.custom import load_class
from lightning_quant.diagnosis import diagnose as _diagnose
from lightning_quant.errors import ArtifactError, ConfigError, QuantizationError, first_line
from lightning_quant.formatting import shown_db
from lightning_quant.from_checkpoint import export_checkpoint
from lightning_quant.lightning_cli import naming_choices, quant_cli, read_recipes
from lightning_quant.planning import plan as _plan
from lightning_quant.post_training import check_pair, load_pair, quantize_checkpoint
from lightning_quant.progress import CONSOLE
from lightning_quant.recipes import made
from lightning_quant.report import QuantReport
from lightning_quant.runtime import read_metadata
from lightning_quant.tables import print_comparison, print_file


def __getattr__(name: str) -> Any:
    """``QuantCLI``: that of ``pytorch_lightning``, else of ``lightning``, made when it is asked for."""
    if name != "QuantCLI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return quant_cli(import_module(f"{ROOTS[0].__name__}.cli").LightningCLI)


def demo(directory: str = "demo_quantized", epochs: int = 4, seed: int = 0) -> None:
    """Quantize a small network on scikit-learn's digits, after and while training, and compare it with float.

    Args:
        directory: Where the files go.
        epochs: Of each training.
        seed: Of weights and order.
    """
    _demo.run(directory, epochs, seed)


def inspect(file: str, json: bool = False, full: bool = False) -> None:
    """Print what a file says of itself: format, versions, settings, inputs, outputs, metrics.

    Args:
        file: A file that this package wrote, of any format.
        json: Print the metadata alone, as JSON. Needs no runtime.
        full: Print all settings, and not only those that differ from the defaults.
    """
    path = Path(file)
    metadata = read_metadata(path)
    if json:
        sys.stdout.write(_json.dumps(metadata, indent=2) + "\n")
        return
    print_file(path, metadata, full)


def compare(
    first: str,
    second: str,
    data: str | None = None,
    batch_size: int | None = None,
    min_sqnr: float | None = None,
) -> None:
    """Run two files on the same data: what they compute, how fast, and how large they are.

    Args:
        first: The reference.
        second: The other file, with the same inputs and outputs.
        data: Arrays in a file: .npz (by the names of the inputs), .npy (one input) or .pt. Default: random numbers.
        batch_size: Samples for each call. Default: 1, or as many as a file was made for.
        min_sqnr: Fail, with exit status 1, where an output of the second file has a lower SQNR in dB.
    """
    tensors = None if data is None else read_data(data, read_metadata(first))
    found = _compare(first, second, tensors, batch_size=batch_size)
    print_comparison(first, second, found)
    if min_sqnr is not None and found.sqnr_db < min_sqnr:
        raise ArtifactError(
            f"{second}: {shown_db(found.sqnr_db)} against {first}, and --min-sqnr asks for {min_sqnr:g} dB."
        )


def export(
    checkpoint: str,
    *,
    model: str,
    data: str | None = None,
    directory: str | None = None,
    formats: list[str] | None = None,
) -> None:
    """Write the int8 files and the report of a quantization-aware training again, from its checkpoint alone.

    Args:
        checkpoint: Saved by a Trainer with QuantizationAwareTraining.
        model: Import path of the LightningModule, e.g. my_package.MyModule.
        data: Import path of a LightningDataModule, for metrics.
        directory: Where the files go. Default: as in training.
        formats: Which files, e.g. [torchscript,onnx]. Default: as in training.
    """
    export_checkpoint(
        checkpoint,
        _class(model, "--model"),
        datamodule=None if data is None else _class(data, "--data"),
        directory=directory,
        formats=formats,
    ).print()


def ptq(
    checkpoint: str,
    *,
    model: str,
    data: str | None = None,
    config: QuantConfig = QuantConfig(),
    method: PostTrainingMethod = "static",
    calibration_batches: int | None = None,
    directory: str = "quantized",
    formats: list[str] | None = None,
    max_drop: float | None = None,
    monitor: str | None = None,
    mode: Literal["min", "max"] | None = None,
    relative: bool = False,
    max_size: str | None = None,
) -> None:
    """Make an int8 model from a float checkpoint: calibrate, convert, export, verify and report.

    Args:
        checkpoint: Saved by a Trainer. No code in it is run.
        model: Import path of the LightningModule, e.g. my_package.MyModule.
        data: Import path of a LightningDataModule. Default: the dataloaders of the module.
        config: The name of a recipe, e.g. int8_static, or a YAML file, such as an edited plan.
        method: static calibrates on validation data; dynamic takes ranges at run time.
        calibration_batches: How many batches are observed. Default: all.
        directory: Where the files go.
        formats: Which files, e.g. [torchscript,onnx]. Default: those that can be written.
        max_drop: Leave as few layers in float as are needed so that monitor is no more than this worse than in float.
        monitor: With max_drop: name of a metric that the module logs in validation.
        mode: With max_drop: max if more of it is better, min if less is. Default: by the words in its name.
        relative: With max_drop: it is a share of the float value.
        max_size: Give layers weights of 4 bits until files of ONNX and OpenVINO are no larger, e.g. "1.5 MB".
    """
    quantize_checkpoint(
        checkpoint,
        _class(model, "--model"),
        config,
        method=method,
        datamodule=None if data is None else _class(data, "--data"),
        calibration_batches=calibration_batches,
        directory=directory,
        formats=formats,
        progress=CONSOLE,
        max_drop=max_drop,
        monitor=monitor,
        mode=mode,
        relative=relative,
        max_size=max_size,
    ).print()


def plan(
    *,
    model: str,
    checkpoint: str | None = None,
    data: str | None = None,
    config: QuantConfig = QuantConfig(),
    method: Method = "static",
    output: str | None = None,
) -> None:
    """Write what would be done with each layer, as YAML that can be edited and given to ptq as its config.

    Args:
        model: Import path of the LightningModule, e.g. my_package.MyModule.
        checkpoint: Saved by a Trainer: the module is made from its hyperparameters. Default: made without arguments.
        data: Import path of a LightningDataModule. Default: the dataloaders or the example_input_array of the module.
        config: The name of a recipe, e.g. int8_static, or a YAML file.
        method: dynamic, static or qat.
        output: The file to write. Default: show it.
    """
    module: Any = _class(model, "--model")
    datamodule: Any = None if data is None else _class(data, "--data")
    if checkpoint is None:
        module = _without_arguments(module, "--model")
        module.configure_model()
        datamodule = None if datamodule is None else _without_arguments(datamodule, "--data")
        check_pair(module, datamodule)
    else:
        module, datamodule = load_pair(Path(checkpoint), module, datamodule)
    found = _plan(module, config, method, datamodule=datamodule)
    if output is None:
        sys.stdout.write(found.to_yaml())
    else:
        found.write(output)
        sys.stdout.write(f"{output}: {found.coverage:.1%} of the multiply-accumulates in int8\n")


def diagnose(
    checkpoint: str,
    *,
    model: str,
    monitor: str,
    data: str | None = None,
    config: QuantConfig = QuantConfig(),
    max_drop: float = 0.005,
    mode: Literal["min", "max"] | None = None,
    relative: bool = False,
    calibration_batches: int | None = None,
    max_evaluations: int = 20,
    output: str | None = None,
) -> None:
    """Find out why int8 costs accuracy, and which settings cost least: other ranges, or a few layers in float.

    Args:
        checkpoint: Saved by a Trainer. No code in it is run.
        model: Import path of the LightningModule, e.g. my_package.MyModule.
        monitor: Name of a metric that the module logs in validation.
        data: Import path of a LightningDataModule. Default: the dataloaders of the module.
        config: What to begin with: the name of a recipe, e.g. int8_static, or a YAML file.
        max_drop: How much worse than in float the metric may be.
        mode: max if more of it is better, min if less is. Default: by the words in its name.
        relative: max_drop is a share of the float value.
        calibration_batches: How many batches are observed. Default: all.
        max_evaluations: How many sets of layers the search tries at the most.
        output: Write the settings that were found there, for ptq --config.
    """
    found = _diagnose(
        checkpoint,
        _class(model, "--model"),
        config,
        monitor=monitor,
        max_drop=max_drop,
        mode=mode,
        relative=relative,
        datamodule=None if data is None else _class(data, "--data"),
        calibration_batches=calibration_batches,
        max_evaluations=max_evaluations,
        progress=CONSOLE,
    )
    found.print()
    if output is not None:
        Path(output).write_text(found.settings(), encoding="utf8")


def report(path: str, html: str | None = None) -> None:
    """Show a report again.

    Args:
        path: The folder that a run has written, or its report.json.
        html: Write the page there, too. Needs the extra report.
    """
    found = QuantReport.load(path)
    if html is not None:
        from lightning_quant.report_page import write_html

        write_html(found, html)
    found.print()


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "plan": plan,
    "ptq": ptq,
    "diagnose": diagnose,
    "export": export,
    "inspect": inspect,
    "compare": compare,
    "report": report,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; errors of this package are shown without a traceback.

    Args:
        args: What stands behind ``lightning-quant``. None: what the process was started with.

    Returns:
        The exit status: 0, or 1 after an error of this package. A wrong argument ends the process with 2.
    """
    try:
        _run(_spelled(sys.argv[1:] if args is None else args))
    except QuantizationError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _run(args: Sequence[str]) -> None:
    # not jsonargparse's own CLI, which keeps --config for itself
    kind, mode = naming_choices(ArgumentParser), read_recipes()
    parser = kind(prog="lightning-quant", description="Int8 models of LightningModules.", parser_mode=mode)
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        first = str(function.__doc__).partition("\n")[0]
        own = kind(description=first, parser_mode=mode)
        own.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=True)
        commands.add_subcommand(name, own, help=first)
    parsed = made(parser, parser.parse_args(args))
    COMMANDS[parsed.subcommand](**parsed[parsed.subcommand])


def _class(path: str, option: str) -> type[Any]:
    """The class at an import path, also of a module in the current folder.

    Raises:
        ConfigError: There is none, or it is not of the kind that the option asks for.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:  # as python -m does
        sys.path.insert(0, os.getcwd())
    found = load_class(path, f"{option} {path}")
    kind = {"--model": "LightningModule", "--data": "LightningDataModule"}[option]
    if not issubclass(found, tuple(getattr(root, kind) for root in ROOTS)):
        roots = " or ".join(root.__name__ for root in ROOTS)
        raise ConfigError(f"{option} {path}: this class is no {kind} of {roots}. Give the import path of one.")
    return found


def _without_arguments(kind: Any, option: str) -> Any:
    """An object of a class."""
    try:
        return kind()
    except TypeError as error:
        raise ConfigError(
            f"{option} {kind.__qualname__} cannot be made without arguments: {first_line(error)}. Give --checkpoint, "
            "which has the arguments of a class that calls self.save_hyperparameters(), or call lightning_quant.plan "
            "with what you have made."
        ) from error


def _spelled(args: Sequence[str]) -> list[str]:
    """The arguments as jsonargparse takes them: options have underscores, as parameters do, and flags a value."""
    flags = {
        f"--{name}" for command in COMMANDS.values() for name, kind in get_type_hints(command).items() if kind is bool
    }
    spelled = []
    for arg in args:
        if arg.startswith("--"):
            option, equals, value = arg.partition("=")
            option = "--" + option[2:].replace("-", "_")
            arg = f"{option}=true" if option in flags and not equals else option + equals + value
        spelled.append(arg)
    return spelled

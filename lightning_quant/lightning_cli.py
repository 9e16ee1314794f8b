"""A LightningCLI that quantizes: one more argument, ``--quantize``, and recipes by their names."""

from __future__ import annotations

import functools
import re
from importlib import import_module
from typing import Any

from jsonargparse import get_loader, set_loader

from lightning_quant._roots import ROOTS
from lightning_quant.callbacks import QuantizationCallback
from lightning_quant.config import near, plain
from lightning_quant.errors import ConfigError, QuantizationError
from lightning_quant.recipes import RECIPES

#: jsonargparse's name for how we read values: as YAML, with the names of recipes.
PARSER_MODE = "lightning_quant"

_HELP = (
    "Quantize after training (PostTrainingQuantization) or while training (QuantizationAwareTraining). Left out, "
    "nothing is quantized."
)


def read_recipes() -> str:
    """Let jsonargparse know the parser mode in which the name of a recipe is read as its settings.

    So a name may stand wherever a group of settings may (``config: int8_static``), and settings beside it change
    some of them. An argument without a type takes whatever it is given, and would be given the settings.

    Returns:
        The mode, for ``ArgumentParser(parser_mode=...)``.
    """
    set_loader(PARSER_MODE, _load)
    return PARSER_MODE


def _load(text: str) -> Any:
    recipe = RECIPES.get(text.strip())
    return get_loader("yaml")(text) if recipe is None else plain(recipe.config)


@functools.cache
def quant_cli(lightning_cli: Any) -> Any:
    """A class derived from a LightningCLI, with the argument ``--quantize``.

    It takes ``PostTrainingQuantization`` or ``QuantizationAwareTraining``, by flags or in YAML, each with its own
    arguments: ``--quantize=PostTrainingQuantization --quantize.config=int8_static --quantize.config.backend=eager``.
    The callback comes first in the Trainer's list, before averages of weights and pruning. Settings that contradict
    each other are reported as wrong arguments are.

    Args:
        lightning_cli: ``LightningCLI`` of ``pytorch_lightning.cli`` or ``lightning.pytorch.cli``, or a class derived
            from it.

    Raises:
        ConfigError: It is none of these.
    """
    known = tuple(import_module(f"{root.__name__}.cli").LightningCLI for root in ROOTS)
    if not (isinstance(lightning_cli, type) and issubclass(lightning_cli, known)):
        named = " or ".join(f"{root.__name__}.cli.LightningCLI" for root in ROOTS)
        raise ConfigError(f"quant_cli({lightning_cli!r}): give {named}, or a class derived from it.")
    return _with_quantize(lightning_cli)


def _with_quantize(lightning_cli: Any) -> Any:
    class QuantCLI(lightning_cli):
        def init_parser(self, **kwargs: Any) -> Any:
            self.parser_class: Any = naming_choices(self.parser_class)
            kwargs.setdefault("parser_mode", read_recipes())
            return super().init_parser(**kwargs)

        # not add_arguments_to_parser, which is for users, who seldom call that of the class above
        def add_core_arguments_to_parser(self, parser: Any) -> None:
            super().add_core_arguments_to_parser(parser)
            parser.add_subclass_arguments(QuantizationCallback, "quantize", required=False, help=_HELP)

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except Exception as error:  # whatever the classes raise; jsonargparse wraps it
                ours = _own_error(error)
                if ours is None:
                    raise
                self._parser(self.subcommand).error(str(ours), ours)

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            quantize = self._get(self.config_init, "quantize")
            if quantize is not None:
                given = kwargs.get("callbacks", self._get(self.config_init, "trainer", default={}).get("callbacks"))
                others = [] if given is None else given if isinstance(given, list) else [given]
                kwargs["callbacks"] = [quantize, *others]
            return super().instantiate_trainer(**kwargs)

    QuantCLI.__doc__ = f"{lightning_cli.__name__} with the argument --quantize."
    return QuantCLI


def _own_error(error: BaseException | None) -> QuantizationError | None:
    while error is not None and not isinstance(error, QuantizationError):
        error = error.__cause__
    return error


#: What jsonargparse says of a value that is neither a file nor a group of settings, and of one that is no class.
_NO_CONFIG = re.compile(r"Parser key \"(?:[\w.]+\.)?config\":\s+Unable to load config '([^']*)'")
_NO_CLASS = re.compile(
    r"Parser key \"(?:[\w.]+\.)?quantize\":(?!.*Problem with given class_path 'lightning_quant)", re.S
)


@functools.cache
def naming_choices(parser_class: Any) -> Any:
    """A parser whose errors say which recipes and which callbacks there are, where jsonargparse does not know it."""

    class Parser(parser_class):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            config = _NO_CONFIG.search(message)
            if config and "no recipe" not in message:
                message += (
                    f"\n{config[1]!r} is no recipe, and no file with settings. {near(config[1], RECIPES)} Recipes: "
                    f"{', '.join(RECIPES)}."
                )
            elif _NO_CLASS.search(message):
                message += "\n--quantize takes PostTrainingQuantization or QuantizationAwareTraining."
            return super().error(message, ex)

    return Parser

"""The parser and the LightningCLI of the command line."""

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_contrast import data, methods
from lightning_contrast._checks import fail
from lightning_contrast.checkpoints import latest_checkpoint, load_checkpoint, local_path
from lightning_contrast.cli._errors import parser_message
from lightning_contrast.cli._features import FeatureWriter
from lightning_contrast.cli._names import expand_arguments, import_classes, short_names_in_yaml
from lightning_contrast.cli.commands import PROGRAM, SUMMARY

_MOST_NAMES = 60  # of subclasses listed in the help of an argument; every torch module is one of `torch.nn.Module`
_HELP = {"--model.help": methods, "--data.help": data}


class Parser(LightningArgumentParser):
    """Parser with short names, errors of one line and a short help."""

    def __init__(self, *args: Any, **options: Any) -> None:
        import_classes()
        super().__init__(*args, **options)

    def parse_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, *more: Any, **options: Any
    ) -> Any:
        """Parse arguments; short names are expanded first."""
        given = sys.argv[1:] if args is None else args
        expanded = expand_arguments([argument for argument in given if argument != "--debug"])
        if expanded and expanded[-1] in _HELP:
            self._print_classes(expanded[-1])
        return super().parse_args(expanded, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error on one line and exit with status 2; with ``--debug`` or for a nested parser, raise it."""
        if "JSONARGPARSE_DEBUG" in os.environ or not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [name.lstrip("-") for action in parser._actions for name in action.option_strings]
        sys.stderr.write(f"error: {parser_message(message, options)} (--debug shows the traceback)\n")
        self.exit(2)

    def format_help(self, *formatter: Any) -> str:
        """Return the help text without the subclasses of general types."""
        for action in self._actions:
            subclasses: Any = getattr(action, "extra_help", str)
            if subclasses().count(",") > _MOST_NAMES:
                vars(action)["extra_help"] = str
        return str(super().format_help(*formatter))

    def _print_classes(self, option: str) -> NoReturn:
        """Print the classes that an option can name, with the first line of their docstrings."""
        package = _HELP[option]
        for name in package.__all__:
            member = getattr(package, name)
            is_base = member is methods.SelfSupervisedModule
            if (
                inspect.isclass(member)
                and issubclass(member, L.LightningModule | L.LightningDataModule)
                and not is_base
            ):
                sys.stdout.write(f"{name}: {(inspect.getdoc(member) or '').splitlines()[0]}\n")
        sys.stdout.write(f"{option} NAME shows the arguments of one.\n")
        self.exit(0)


class CommandLine(LightningCLI):
    """LightningCLI that finds the last checkpoint and writes predicted features."""

    def before_fit(self) -> None:
        """Replace ``--ckpt_path last`` by the path of the newest checkpoint."""
        config = self.config_init[self.subcommand]
        if config.get("ckpt_path") == "last":
            config["ckpt_path"] = str(_last_checkpoint(self.trainer, type(self.model).__name__))

    before_validate = before_test = before_fit

    def before_predict(self) -> None:
        """Add the callback that writes the features."""
        self.before_fit()
        self.trainer.callbacks.append(FeatureWriter())  # type: ignore[attr-defined]  # a list


def _last_checkpoint(trainer: L.Trainer, model: str) -> Path:
    """Return the newest intact checkpoint in the folders that runs of this Trainer write to.

    Args:
        trainer: The Trainer; the versions of its loggers share a folder.
        model: Name of the class of the model.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the newest one is of another class.
    """
    root = Path(trainer.default_root_dir)
    folders = [root / "checkpoints", root / "lightning_logs"]
    folders += [Path(logger.save_dir or root) / str(logger.name) for logger in trainer.loggers]
    dirs = [callback.dirpath for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
    folders += [Path(folder) for folder in dirs if folder is not None]
    folders = [folder for folder in dict.fromkeys(folders) if local_path(folder) is not None]
    found = latest_checkpoint(*folders)
    if found is None:
        hint = "Leave the option out to start a new run, or set `trainer.default_root_dir` or the path of a checkpoint"
        where = f"name a run with an intact checkpoint, but there is none in {', '.join(map(str, folders))}"
        fail("ckpt_path", where, "last", hint, FileNotFoundError)
    saved = {} if found.is_dir() else load_checkpoint(found, map_location="meta").get("hyper_parameters", {})
    other = str(saved.get("_class_path", model)).rsplit(".", 1)[-1]
    if other != model:
        hint = "Give the path of a checkpoint, or a `trainer.default_root_dir` for each method"
        fail("ckpt_path", f"name a checkpoint of {model}", f"{found} of {other}", hint)
    return found


def build(args: list[str] | None, *, run: bool) -> LightningCLI:
    """Parse the arguments, build the objects and, with ``run``, run the subcommand.

    Args:
        args: The arguments, without the name of the program; None uses ``sys.argv``.
        run: Whether the first argument is a subcommand, to be run.
    """
    with short_names_in_yaml():
        return CommandLine(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            trainer_defaults={"plugins": {"class_path": "lightning_contrast.checkpoints.AtomicCheckpointIO"}},
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={"prog": PROGRAM, "description": f"{SUMMARY}."},
            args=args,
            run=run,
        )

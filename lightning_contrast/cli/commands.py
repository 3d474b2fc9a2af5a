"""The commands of the command line, listed without importing them or Lightning.

A command NAME is a file ``cli/NAME_command.py`` with a function ``run_NAME(args)``, which gets the arguments after the
name. The first line of the file's docstring, after its colon, is the line of ``lightning-contrast --help``. There is no
list to add it to. `lightning_contrast.cli._command_line.Parser` parses arguments with short names and errors of one
line; a command without classes among its arguments starts faster with `argparse` and `exit_on_error`.
"""

import argparse
import ast
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = "lightning-contrast"
SUMMARY = "Contrastive and self-supervised pretraining for PyTorch Lightning"
_SUFFIX = "_command"
TRAINER = {
    "fit": "Train a method: --config RECIPE, or --model METHOD --data DATA.",
    "validate": "Run the validation of a model, with its callbacks.",
    "test": "Run the test loop of a model.",
    "predict": "Write the features of images to features.npz.",
}
"""Commands of LightningCLI."""


def summaries() -> dict[str, str]:
    """Return the line of help of every command, by name."""
    found = dict(TRAINER)
    for path in sorted(Path(__file__).parent.glob(f"*{_SUFFIX}.py")):
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        line = " ".join(first.partition(": ")[2].split())
        found[path.stem.removesuffix(_SUFFIX)] = line[:1].upper() + line[1:]
    return found


def overview() -> str:
    """Return the text of ``lightning-contrast --help``."""
    lines = [f"usage: {PROGRAM} COMMAND [arguments] [--debug]", "", f"{SUMMARY}.", "", "commands:"]
    lines += [f"  {name:10} {line}" for name, line in summaries().items()]
    lines += ["", f"`{PROGRAM} fit --config simclr_emoji` runs a recipe by its name. `COMMAND --help` shows arguments;"]
    lines += ["`fit --model.help` lists the methods; --debug shows the traceback of an error.", ""]
    return "\n".join(lines)


def run_command(name: str, args: Sequence[str]) -> Any:
    """Import a command that is a file of this folder and run it.

    Args:
        name: Its name, one of `summaries` but not of `TRAINER`.
        args: The arguments after the name.
    """
    module = import_module(f"{__package__}.{name}{_SUFFIX}")
    return getattr(module, f"run_{name}")([argument for argument in args if argument != "--debug"])


def unknown_command(name: str) -> str:
    """Return the message for a name that is no command."""
    known = list(summaries())
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Run `{PROGRAM} --help`."
    return f"`{name}` is not one of {', '.join(known)}. {hint}"


class LightParser(argparse.ArgumentParser):
    """Parser for a command that needs no classes of the package: errors are one line, with near options, status 2.

    Args:
        name: Name of the command.
        **options: As of `argparse.ArgumentParser`.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(prog=f"{PROGRAM} {name}", allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; an unknown option is an error that names near ones."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            options = [name for action in self._actions for name in action.option_strings]
            near = get_close_matches(option, options, n=2, cutoff=0.6) if option.startswith("-") else []
            hint = f" Did you mean {' or '.join(near)}?" if near else f" `{self.prog} --help` shows the arguments."
            self.error(f"There is no {'option' if option.startswith('-') else 'argument'} `{option}`.{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """Print the message on one line and exit with status 2."""
        self.exit(2, f"error: {' '.join(message.split())} (--debug shows the traceback)\n")

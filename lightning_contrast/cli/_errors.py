"""Messages of one line for errors that the user can fix."""

import inspect
import re
from pathlib import Path
from pydoc import locate
from traceback import walk_tb
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_contrast.cli._names import class_names, recipe_names
from lightning_contrast.cli.commands import did_you_mean

_PACKAGE = Path(__file__).parents[1]
_NETWORK = ("httpx", "huggingface_hub", "requests", "urllib3")
_LONGEST = 400  # characters of a message that is shortened to one line


def user_message(error: Exception) -> str | None:
    """Return the message of an error that the user can fix, on one line, or None for any other error.

    These are errors of files and of the network, missing packages, Lightning's errors of configuration, values that a
    constructor refused while the parser built the objects, and the ValueErrors and TypeErrors raised by this package.

    Args:
        error: The error, with its traceback.
    """
    files = [Path(frame.f_code.co_filename) for frame, _ in walk_tb(error.__traceback__)]
    innermost = files[-1] if files else Path()
    text = str(error) or type(error).__name__
    if isinstance(error, ValueError | TypeError) and innermost.parent.name == "jsonargparse":
        return parser_message(text)
    if type(error).__module__.split(".")[0] in _NETWORK:
        return f"{type(error).__name__}: {_one_line(text)}"
    if isinstance(error, OSError | ModuleNotFoundError | MisconfigurationException):
        return _one_line(text)
    raised_here = _PACKAGE in innermost.parents
    return _one_line(text) if raised_here and isinstance(error, ValueError | TypeError | RuntimeError) else None


def parser_message(message: str, options: list[str] | None = None) -> str:
    """Return an error message of jsonargparse on one line, with similar names for a misspelled one.

    Args:
        message: The message; that of a Union lists the errors of all its members over several lines.
        options: The options that the parser accepts, without their dashes.
    """
    # Dotted options of a list of callbacks are also tried on the base class, which takes none of them.
    message = re.sub(r"- Problem with given class_path '[\w.]+\.Callback':\s*Option '\S+' is not accepted", "", message)
    message = re.sub(r"(class_path '[^']+'):\s*\n\s*", r"\1: ", message)
    message = re.sub(r'(Parser key "[^"]+"):\s*\n\s*(?=Expected)', r"\1:\n - ", message)
    message = re.sub(r"(Expected an? <class '[^']+'>)\. Got value: (.*)", r"\1\nGiven value: \2", message)
    keys = re.findall(r'Parser key "([^"]+)"', message)
    key = keys[-1] if keys else ""
    if own := re.search(r"`[^`]+` must .*", message):  # of a constructor of this package
        return own[0].strip()
    return _misspelled(message, key, options or []) or _not_accepted(message, key)


def _misspelled(message: str, key: str, options: list[str]) -> str | None:
    """Return the message for an unknown argument, subcommand, option, file or class, or None for other errors."""
    text = None
    if found := re.search(r"class_path '([^']+)': (?:- )?Option '([^']+)' is not accepted", message):
        known = _arguments(found[1])
        hint = did_you_mean(found[2], known) or f" It takes {', '.join(known)}."
        text = f"{_short(found[1])} has no argument `{found[2]}`.{hint}"
    elif found := re.search(r"class_path '([^']+)': (?:- )?the following arguments are required: (.*)", message):
        text = f"{_short(found[1])} needs the argument {found[2]}."
    elif found := re.search(r"Expected an? typing\.Literal\[(.*?)\]\. Got value: (.*)", message):
        known = re.findall(r"'([^']*)'", found[1])
        text = f"`{key}` must be one of {found[1]}, got {found[2]}.{did_you_mean(found[2], known)}"
    elif found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        known = re.findall(r"[\w-]+", found[2])
        text = f"`{found[1]}` is not one of {', '.join(known)}.{did_you_mean(found[1], known)}"
    elif found := re.search(r"(?:[Uu]nrecognized arguments?: |does not accept option ')-*([\w.]+)", message):
        text = f"There is no option `{found[1]}`.{_similar_option(found[1], options)}"
    elif found := re.search(r"File does not exist: '?([^']*)'?", message):
        hint = did_you_mean(Path(found[1]).stem, recipe_names())
        text = f"`{key or 'config'}` must be an existing file or the name of a recipe, got '{found[1]}'.{hint}"
    else:
        for name in re.findall(r"(?:Expected a dot import path string: |has no attribute ')([\w.]+)", message):
            if hint := did_you_mean(name, class_names()):
                return f"`{key}` must name a class or a view policy, got '{name}'.{hint}"
    return text


def _not_accepted(message: str, key: str) -> str:
    """Return the message for a value that has the wrong type, and the reasons alone for other errors."""
    reasons = [_plain(line.strip(" -")) for line in message.splitlines() if re.match(r"\s*- ", line)]
    noise = re.compile("NoneType|not accessible|Does not validate|:$")  # and headings
    reasons = [reason for reason in dict.fromkeys(reasons) if not noise.search(reason)]
    given = re.search(r"Given value: (.*)", message)  # the innermost
    expected = [reason.removeprefix("Expected ") for reason in reasons if reason.startswith("Expected ")]
    if key and given and expected:
        value = re.sub(r"NestedArg\(key='(.+?)', val=(.*)\)", r"\2", given[1])
        expected = [re.sub(r"^an? typing\.Literal\[(.*)\]$", r"\1", reason) for reason in expected]
        hint = f" A list is written [{value}]." if "list" in expected and re.fullmatch(r"[\w.,-]+", value) else ""
        return _shortened(f"`{key}` must be {' or '.join(expected)}, got {value}.{hint}")
    return _shortened(" ".join(reasons) or _one_line(message))


def _arguments(path: str) -> list[str]:
    """Return the arguments that the command line accepts for the class or function at an import path."""
    from jsonargparse import ArgumentParser

    target: Any = locate(path)
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    return [str(name) for name in add(target)]


def _similar_option(option: str, options: list[str]) -> str:
    """Suggest options that differ in the last part of their name, or in the part before it."""
    group = option.rpartition(".")[0]
    siblings = {_short(name): name for name in options if name.rpartition(".")[0] == group}
    if near := did_you_mean(option, siblings):
        return re.sub(r"\w+(?=\?| or )", lambda match: siblings[match[0]], near)
    first, dot, rest = option.partition(".")
    return did_you_mean(first, {name.split(".")[0] for name in options}).replace("?", f"{dot}{rest}?")


def _short(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _plain(reason: str) -> str:
    """Return a reason of jsonargparse without the representations of Python types."""
    reason = re.sub(r"Expected an? <class '(?:\w+\.)*(\w+)'>", r"Expected \1", reason)
    return re.sub(r"Expected a dot import path string: .*", "Expected the import path of a class", reason)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."

"""Command line: LightningCLI with recipes and short names for the package's classes and view policies.

``lightning-contrast fit --config simclr_emoji`` (or ``python -m lightning_contrast``) runs a recipe of the package by
its name; ``--config FILE`` runs your own. Classes and view policies of the package need no import path
(``class_path: MoCo``, ``class_path: moco_v2_views``, ``--trainer.callbacks.policy moco_v2_views``).

Checkpoints are written by `AtomicCheckpointIO` unless the recipe sets ``trainer.plugins``. ``--ckpt_path last`` uses
the newest intact checkpoint of all runs in the Trainer's folder and fails if there is none. ``predict`` writes the
features to ``features.npz`` in the folder of the run. ``report CKPT ... --data DATA --output DIR`` judges checkpoints,
see `evaluation.report`. Errors of the user are printed on one line; ``--debug`` shows the traceback.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_contrast import augment, callbacks, data, methods
from lightning_contrast.cli._errors import user_message

__all__ = ["entry_point", "main"]

_HINT = 'Install the extra: pip install "lightning_contrast[cli]"'
_DEBUG = "JSONARGPARSE_DEBUG"  # makes jsonargparse raise errors; inherited by the processes of a launcher


def entry_point() -> None:
    """Run the command line and exit; the script ``lightning-contrast`` and ``python -m lightning_contrast``.

    The exit status is 0 for success, 2 for arguments that cannot be parsed and 1 for other errors. Errors that the user
    can fix (arguments, files, network) are one line on stderr, without a traceback unless ``--debug`` is given.
    """
    try:
        main()
    except Exception as error:
        message = None if "--debug" in sys.argv else user_message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message} (--debug shows the traceback)\n")
        sys.exit(1)


def main(args: list[str] | None = None, *, run: bool = True) -> Any:
    """Run the command line.

    Args:
        args: Arguments as on the command line, ``["fit", "--config", "simclr_emoji"]``; None uses ``sys.argv``.
        run: False builds Trainer, module and data without running them; ``args`` then has no subcommand.

    Returns:
        The LightningCLI, with ``trainer``, ``model`` and ``datamodule``; the report of the subcommand ``report``.

    Raises:
        SystemExit: With status 2, if the arguments cannot be parsed.
        ModuleNotFoundError: If jsonargparse is not installed; the message names the extra.
    """
    for package in (augment, callbacks, data, methods):
        for name in package.__all__:  # jsonargparse resolves short names among imported classes
            getattr(package, name)
    try:
        import jsonargparse  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"The command line needs jsonargparse. {_HINT}.", name="jsonargparse") from error
    from lightning_contrast.cli._command_line import build
    from lightning_contrast.cli.index_command import run_index
    from lightning_contrast.cli.report_command import COMMAND, run_report
    from lightning_contrast.cli.search_command import run_search
    from lightning_contrast.cli.serve_command import run_serve

    commands = {COMMAND: run_report, "index": run_index, "search": run_search, "serve": run_serve}

    given = sys.argv[1:] if args is None else args
    with _debug("--debug" in given):
        if run and given and given[0] in commands:
            return commands[given[0]](given[1:])
        return build(args, run=run)


@contextmanager
def _debug(active: bool) -> Iterator[None]:
    """Let the parser raise its errors inside the block instead of exiting."""
    if not active:
        yield
        return
    before = os.environ.get(_DEBUG)
    os.environ[_DEBUG] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DEBUG]
        else:
            os.environ[_DEBUG] = before

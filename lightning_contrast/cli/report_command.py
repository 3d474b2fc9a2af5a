"""The command ``lightning-contrast report``: judge checkpoints on a DataModule."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L

from lightning_contrast._checks import fail
from lightning_contrast.cli._command_line import Parser
from lightning_contrast.cli._names import short_names_in_yaml
from lightning_contrast.cli.commands import PROGRAM

_DESCRIPTION = (
    "Judge checkpoints, exported backbones (.pt) or timm models side by side on a DataModule, by nearest neighbors, "
    "linear probes, few labels, corruptions and more; write a page, Markdown and JSON."
)


def run_report(args: Sequence[str]) -> Any:
    """Parse the arguments of the command, make the report and print where it is.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The report.

    Raises:
        SystemExit: With status 2, if the arguments cannot be parsed.
    """
    from lightning_contrast.evaluation import report

    parser = Parser(prog=f"{PROGRAM} report", description=_DESCRIPTION)
    parser.add_argument("models", nargs="+", help="NAME=MODEL or MODEL: path of a checkpoint or name of timm")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    parser.add_argument("--output", type=str, required=True, help="folder of the report")
    parser.add_argument(
        "--parts", type=list[str] | Literal["all"] | None, help="list of parts, or all; default: those that are default"
    )
    parser.add_argument("--reference", type=str | None, default=None, help="name of the model to compare with")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--options", type=dict[str, Any], default={}, help="options of the parts")
    of_data = dict[str, L.LightningDataModule] | None
    about = "other DataModules for the part transfer: --transfer.NAME CLASS --transfer.NAME.ARGUMENT VALUE"
    parser.add_argument("--transfer", type=of_data, default=None, help=about)
    parser.add_argument("--cache", type=str | None, default=None, help="folder of the features")
    with short_names_in_yaml():
        config = parser.parse_args(list(args))
        instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # its name since jsonargparse 4.49
        built = instantiate(config)
    names = {"parts", "reference", "seed", "options", "transfer", "cache"}
    chosen = {name: built[name] for name in names}
    found = report(_named(built.models), built.data, output=built.output, **chosen)
    sys.stdout.write(f"{Path(built.output) / 'report.html'}\n")
    return found


def _named(models: Sequence[str]) -> dict[str, str]:
    """Return models by name: given as NAME=MODEL, else the stem of the file, or the name of timm."""
    named: dict[str, str] = {}
    for given in models:
        name, has_name, model = given.partition("=")
        if not has_name or Path(given).exists():  # Lightning's own names of checkpoints are epoch=9-step=190.ckpt
            name, model = _name_of(given), given
        if name in named:
            fail("models", "have different names", f"{name!r} twice", "Give NAME=MODEL")
        named[name] = model
    return named


def _name_of(model: str) -> str:
    path = Path(model)
    if path.suffix not in (".ckpt", ".pt", ".pth"):
        return model
    return path.parent.name if path.stem in ("last", "best", "checkpoint") and path.parent.name else path.stem

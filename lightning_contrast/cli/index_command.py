"""The command ``lightning-contrast index``: bring the vectors of a folder of images up to date, for ``search``."""

import sys
from collections.abc import Sequence
from typing import Any

from lightning_contrast._checks import check_at_least
from lightning_contrast.cli._command_line import Parser

_DESCRIPTION = "Embed the new and changed images of a folder, and forget those that are gone."
_MOST = 20  # lines of a list


def run_index(args: Sequence[str]) -> Any:
    """Parse the arguments of the command, update the index and print what was done.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The `IndexUpdate`.

    Raises:
        SystemExit: With status 2, if the arguments cannot be parsed.
        ValueError: If the batch size or the lowest cosine of near duplicates is out of its range.
    """
    from lightning_contrast.search import ImageIndex
    from lightning_contrast.search.near_duplicates import check_cosine

    parser = Parser(prog="lightning-contrast index", description=_DESCRIPTION)
    parser.add_argument("store", type=str, help="folder of the index")
    parser.add_argument("folder", type=str, help="folder of the images")
    parser.add_argument("--model", type=str, required=True, help="ONNX graph, folder of `export_towers`, .pt or .ckpt")
    parser.add_argument("--batch_size", type=int, default=64, help="images of a commit")
    parser.add_argument("--verify", type=bool, default=False, help="compare contents, not sizes and times")
    parser.add_argument(
        "--duplicates", type=float | None, default=None, help="list near duplicates from this cosine on"
    )
    found = parser.parse_args(list(args))
    check_at_least("batch_size", found.batch_size, 1)
    if found.duplicates is not None:
        check_cosine("duplicates", found.duplicates)
    index = ImageIndex(found.store, found.model, found.folder)
    done = index.update(batch_size=found.batch_size, verify=found.verify)
    counts = {name: len(getattr(done, name)) for name in ("added", "changed", "removed", "unreadable")}
    parts = [f"{count} {name}" for name, count in counts.items()]
    sys.stdout.write(f"{len(index)} images: {', '.join(parts)}, {done.unchanged} unchanged\n")
    for path, reason in list(done.unreadable.items())[:_MOST]:
        sys.stdout.write(f"unreadable: {path}: {reason}\n")
    if found.duplicates is not None:
        for paths, lowest in index.near_duplicates(found.duplicates):
            sys.stdout.write(f"near duplicates, cosine {lowest:.4f} or more: {', '.join(paths)}\n")
    return done

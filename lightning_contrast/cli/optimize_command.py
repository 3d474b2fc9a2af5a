"""The command ``lightning-contrast optimize``: copy a folder of images to shards for StreamingImageDataModule."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_contrast.cli.commands import LightParser


def run_optimize(args: Sequence[str]) -> Path:
    """Parse the arguments of the command, write the shards and print where they are.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The folder of the shards.

    Raises:
        SystemExit: With status 2, if the arguments cannot be parsed.
    """
    description = (
        "Copy the images of a folder, unchanged and in a random order, to litdata chunks or tar files, which "
        "`--data StreamingImageDataModule --data.train OUTPUT` reads in sequence."
    )
    parser = LightParser("optimize", description=description)
    parser.add_argument("folder", help="folder of images, or of class folders")
    parser.add_argument("output", help="folder of the shards, new or empty")
    parser.add_argument("--format", default="litdata", help="litdata (the default) or webdataset")
    parser.add_argument("--images_per_shard", type=int, default=1000, help="images of a shard; default: 1000")
    parser.add_argument("--like", help="folder of training shards, whose class numbers are used for validation images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random order")
    given = parser.parse_args(list(args))

    from lightning_contrast.data import write_shards

    written = write_shards(
        given.folder,
        given.output,
        format=given.format,
        images_per_shard=given.images_per_shard,
        like=given.like,
        seed=given.seed,
        progress=_progress if sys.stderr.isatty() else None,
    )
    sys.stdout.write(f"{written}\n")
    return written


def _progress(done: int, total: int) -> None:
    if done % 1000 == 0 or done == total:
        sys.stderr.write(f"\r{done} of {total} images" + ("\n" if done == total else ""))

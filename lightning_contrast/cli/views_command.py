"""The command ``lightning-contrast views``: show what a view policy does to your images, and judge its operations."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_contrast.cli.commands import LightParser, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_contrast.augment import ViewPolicy

_EDGE = 128  # of a tile, in pixels
_SETTINGS = {
    "brightness": "jitter[0] = {0:g}",
    "contrast": "jitter[1] = {0:g}",
    "saturation": "jitter[2] = {0:g}",
    "hue": "jitter[3] = {0:g}",
    "grayscale": "gray_p > 0 only if this is 1",
    "blur": "sigma up to {0:g} x the edge",
    "crop": "scale = ({1:g}, 1)",
    "rotation": "rotation = {0:g}",
    "flip": "flip = 0.5",
    "views": "set_strength({0:g})",
}
"""Arguments of `ViewSpec` that a strength s of an operation corresponds to; {1} is 1 - s."""


def run_views(args: Sequence[str]) -> list[Any]:
    """Write a picture of the views and, with ``--judge``, tables of the operations.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The effects that were judged, empty without ``--judge``.

    Raises:
        FileNotFoundError: If the folder is missing.
        RuntimeError: If an image cannot be read.
        ValueError: If an argument is out of range.
    """
    parser = _parser()
    given = parser.parse_args(args)
    from lightning_contrast.callbacks.reporting import write_file

    policy = _policy(parser, given.policy, given.size, given.set)
    dataset = _dataset(given.folder, given.size)
    rows = _spread(len(dataset), given.samples)
    output = Path(given.output)
    write_file(str(output.parent), output.name, _picture(policy, dataset, rows, given.seed))
    sys.stdout.write(f"{output}: {len(rows)} of {len(dataset)} images and their views by {given.policy}\n")
    return _judge(given, policy, dataset, output) if given.judge else []


def _parser() -> LightParser:
    parser = LightParser(
        "views",
        description="Show what a view policy does to the images of a folder. With --judge: per operation and strength, "
        "the share of images that are still nearest to their own original (identity), and the loss of k-NN accuracy "
        "(class, of FOLDER/CLASS/...), with proposed ranges.",
    )
    parser.add_argument("folder", help="folder of images, or of class folders")
    parser.add_argument("--policy", default="simclr_views", help="name of a policy; default: simclr_views")
    parser.add_argument("--size", type=int, default=224, help="edge of the views in pixels; default: 224")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="argument of the policy")
    parser.add_argument("--samples", type=int, default=6, help="images in the picture; default: 6")
    parser.add_argument("--seed", type=int, default=0, help="seed of the views; default: 0")
    parser.add_argument("--output", default="views.png", help="picture; tables get its name; default: views.png")
    parser.add_argument("--judge", action="store_true", help="judge operations and the policy")
    parser.add_argument("--encoder", help="checkpoint, exported backbone or timm model; default: pixels")
    parser.add_argument("--images", type=int, default=500, help="images to judge with; default: 500")
    parser.add_argument("--operations", nargs="+", help="operations to judge; default: all that fit")
    parser.add_argument("--max-class-lost", type=float, default=0.05, help="limit of the ranges; default: 0.05")
    parser.add_argument("--min-identity", type=float, default=0.5, help="limit without classes; default: 0.5")
    return parser


def _policy(parser: LightParser, name: str, size: int, options: Sequence[str]) -> "ViewPolicy":
    """Return a policy of the package by its name."""
    import yaml

    from lightning_contrast import augment
    from lightning_contrast.augment import domains

    known = {
        word: getattr(package, word)
        for package in (augment, domains)
        for word in package.__all__
        if word.endswith("_views") and "clip" not in word and word != "vjepa_views"  # these take clips
    }
    short = name.rpartition(".")[2]
    if short not in known:
        hint = did_you_mean(short, known) or f" Known: {', '.join(known)}."
        parser.error(f"`policy` must be the name of a view policy of images, got '{name}'.{hint}")
    arguments = {}
    for option in options:
        key, has_value, value = option.partition("=")
        if not has_value:
            parser.error(f"`--set` must be NAME=VALUE, got '{option}'.")
        arguments[key] = yaml.safe_load(value)
    try:
        return known[short](size, **arguments)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"{short}: {error}") from error


def _dataset(folder: str, size: int) -> Any:
    """Return the dataset of the images of a folder, as training reads them."""
    from lightning_contrast.data import ImageFolderDataModule

    data = ImageFolderDataModule(folder, size=size, num_workers=0)
    return data.predict_dataloader().dataset


def _spread(count: int, most: int) -> list[int]:
    """Return positions spread evenly over the sorted files, at most ``most``."""
    from lightning_contrast._checks import check_at_least

    check_at_least("samples", most, 1)
    number = min(count, most)
    return [position * count // number for position in range(number)]


def _picture(policy: "ViewPolicy", dataset: Any, rows: Sequence[int], seed: int) -> bytes:
    """Return a PNG file with one row per image: its central square, and the views of the whole image."""
    import torch

    from lightning_contrast.callbacks.reporting import png_bytes
    from lightning_contrast.callbacks.visualization.images import Display, Row, Tile, centered, fit_squares, grid
    from lightning_contrast.data.loading import SeededIndex
    from lightning_contrast.seeding import seeded

    display = Display()
    whole = dataset.collate([dataset[SeededIndex(row, seed)] for row in rows])[0]
    with seeded(seed, torch.device("cpu")):
        views = policy(whole)
    statistics = (policy.mean, policy.std)
    shown = [display.pixels(view, statistics if any(policy.mean) else None) for view in views]
    longest = max(max(view.shape[-2:]) for view in shown)
    edge = min(_EDGE, longest * max(1, _EDGE // longest))
    originals = torch.stack([dataset[row][0] for row in rows])
    columns = [("image", fit_squares(display.pixels(originals), edge))]
    columns += [(f"view {n}", fit_squares(centered(view, longest), edge)) for n, view in enumerate(shown, 1)]
    tiles = [Row([Tile(column[i]) for _, column in columns]) for i in range(len(rows))]
    return png_bytes(grid(tiles, [title for title, _ in columns], edge))


def _judge(given: Any, policy: "ViewPolicy", dataset: Any, output: Path) -> list[Any]:
    """Write the table of the effects as CSV and Markdown, and a picture of the operations; print the ranges."""
    import torch

    from lightning_contrast.callbacks.reporting import write_file
    from lightning_contrast.evaluation import propose, view_effects

    rows = _spread(len(dataset), given.images)
    images: Tensor = torch.stack([dataset[row][0] for row in rows])
    labels = torch.tensor([dataset.labels[row] for row in rows])
    found = view_effects(given.encoder, images, labels, changes=given.operations, policy=policy, seed=given.seed)
    limits = {"max_class_lost": given.max_class_lost, "min_identity": given.min_identity}
    ranges = propose(found, **limits)
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([found[0]._fields, *found])
    write_file(str(output.parent), f"{output.stem}_operations.png", _operations(images[0], found))
    features = "32 x 32 pixels" if given.encoder is None else f"features of {given.encoder}"
    by_class = found[0].class_lost is not None
    limit = f"class lost <= {given.max_class_lost:g}" if by_class else f"identity >= {given.min_identity:g}"
    lines = [f"{len(rows)} images of {given.folder}, central squares of {given.size} pixels, by {features}."]
    if found[0].accuracy is not None and found[0].class_lost is not None:
        before = found[0].accuracy + found[0].class_lost
        lines[0] += f" k-NN accuracy of the unchanged images: {before:.3f}."
    lines += ["", "| operation | strength | identity kept | class lost |", "|---|---|---|---|"]
    lines += [
        f"| {row.operation} | {row.strength:g} {row.unit} | {row.identity:.3f} ± {row.identity_error:.3f} | "
        f"{'unknown' if row.class_lost is None else f'{row.class_lost:+.3f} ± {row.class_lost_error:.3f}'} |"
        for row in found
    ]
    lines += ["", f"Proposed: the strongest strength up to which {limit} (± is one standard error).", ""]
    lines += ["| operation | range | setting |", "|---|---|---|"]
    for name, proposal in ranges.items():
        end = proposal.strongest
        words = "none of those judged" if end is None else f"0 .. {end:g}{' or more' if proposal.is_open else ''}"
        setting = "-" if end is None else _SETTINGS.get(name, "").format(end, 1 - end)
        lines.append(f"| {name} | {words} | {setting} |")
    if given.encoder is None:
        note = "Pixels notice moves and colors that a network may ignore: `--encoder` judges by what yours sees."
        lines += ["", note]
    text = "\n".join(lines) + "\n"
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return found


def _operations(image: "Tensor", effects: Sequence[Any]) -> bytes:
    """Return a PNG file with one image under each operation and strength."""
    from lightning_contrast.augment.images import as_float
    from lightning_contrast.callbacks.invariance.perturbations import CHANGES, changed
    from lightning_contrast.callbacks.reporting import png_bytes
    from lightning_contrast.callbacks.visualization.images import Display, Row, Tile, fit_squares, grid

    pixels = as_float(image[None])
    rows = []
    for name in dict.fromkeys(row.operation for row in effects if row.operation in CHANGES):
        strengths = [row.strength for row in effects if row.operation == name]
        shown = [Display().pixels(changed(pixels, CHANGES[name], strength)) for strength in strengths]
        tiles = [Tile(fit_squares(one, _EDGE)[0]) for one in shown]
        rows.append(Row(tiles, words=f"{name}\n" + "\n".join(f"{strength:g}" for strength in strengths)))
    columns = max((len(row.tiles) for row in rows), default=1)
    rows = rows or [Row([Tile(fit_squares(Display().pixels(pixels), _EDGE)[0])])]
    return png_bytes(grid(rows, [f"strength {number}" for number in range(1, columns + 1)], _EDGE))

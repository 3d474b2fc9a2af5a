"""Images, masks, groups and pairs of a report's DataModule, in the order of the features."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.callbacks.capture.sampling import drawn_rows
from lightning_contrast.evaluation.feature_pass.fingerprint import data_digest, digest, tensor_digest
from lightning_contrast.evaluation.report_card.context import Context, find_loaders, read_rows

DECLARED = {
    "groups": ("image_groups",),
    "unseen_groups": ("image_groups",),
    "shortcut": ("masks",),
    "cue_conflict": ("masks",),
    "bias": ("twins",),
}
"""Methods of a DataModule, each a function of the split, that parts read if there are any."""


def drawn(context: Context, places: Sequence[int], *, train: bool = False) -> tuple[Tensor, Tensor]:
    """Return images ``(n, C, H, W)`` as the loader has them, and their classes ``(n,)``.

    Args:
        context: The DataModule.
        places: Rows of the features.
        train: Of the training images, else of the test images.

    Raises:
        ValueError: If the batches have no labels, or views.
    """
    loader = context.train_loader if train else context.loader
    rows = drawn_rows(loader)
    images, labels = read_rows(loader, [rows[place] for place in places])
    if labels is None:
        fail("datamodule", "yield labels for this part", "none", "Choose parts without labels by `parts=`")
    return images, labels


def spaced(labels: Tensor | None, number: int) -> list[int]:
    """Return rows with a label at equal distances.

    Args:
        labels: Classes ``(N,)``; -1 for unlabeled rows.
        number: Rows at most.

    Raises:
        ValueError: If there are no labels.
    """
    if labels is None or not bool((labels >= 0).any()):
        fail("datamodule", "yield labels for this part", "none", "Choose parts without labels by `parts=`")
    known = cast("list[int]", (labels >= 0).nonzero().flatten().tolist())
    number = min(number, len(known))
    return [known[place * len(known) // number] for place in range(number)]


def declared(context: Context, name: str, *, train: bool = False) -> Any:
    """Return what a method of the DataModule says about a split, or None if there is no such method.

    Args:
        context: The DataModule.
        name: Name of a function of "train", "val" or "test".
        train: Of the training images, else of the test images.
    """
    method = getattr(context.datamodule, name, None)
    return method("train" if train else context.test_split) if callable(method) else None


def aligned(context: Context, values: Tensor, name: str, *, train: bool = False) -> Tensor:
    """Return values of the dataset's rows, ``(R, ...)``, in the order of the features, ``(N, ...)``.

    Args:
        context: The DataModule.
        values: One per row of the dataset.
        name: Name of the method that gave them, for messages.
        train: Of the training images, else of the test images.

    Raises:
        ValueError: If their number is another.
    """
    loader = context.train_loader if train else context.loader
    number = len(loader.dataset)
    got = len(values) if isinstance(values, Tensor) else type(values).__name__
    require(got == number, f"datamodule.{name}", f"return a tensor of {number} rows", got, "Give one per image")
    return values[torch.tensor(drawn_rows(loader))]


def transfer_loaders(context: Context, name: str) -> tuple[Any, Any]:
    """Return the training and the test loader of another DataModule, which is set up once.

    Args:
        context: The DataModules.
        name: Name of one in `transfer`.

    Raises:
        TypeError: If it is no DataModule.
        ValueError: If it has several or no loaders for a purpose.
    """
    key = f"loaders {name}"
    if key not in context.memory:
        context.memory[key] = find_loaders(context.transfer[name])
    found: tuple[Any, Any] = context.memory[key]
    return found


def missing(name: str, what: str) -> str:
    """Return the note of a part that does not apply.

    Args:
        name: Name of the method that the DataModule lacks.
        what: What it would return.
    """
    return f"Does not apply: the DataModule has no `{name}(split)`, which returns {what}."


def part_inputs(context: Context, part: str) -> list[str]:
    """Return digests of what a part reads besides features and images.

    Args:
        context: The DataModule, and those of `transfer`.
        part: Name of the part.
    """
    found = []
    for name in (*DECLARED.get(part, ()), *(context.transfer if part == "transfer" else ())):
        try:
            if part == "transfer":
                loaders = transfer_loaders(context, name)
                read = [data_digest(loader.dataset, drawn_rows(loader)) for loader in loaders]
            else:
                read = [_digests(declared(context, name, train=train)) for train in (True, False)]
            found.append(digest(name, read))
        except (ValueError, TypeError, RuntimeError, LookupError, OSError) as error:  # the part names it
            found.append(digest(name, "unreadable", str(error)))
    return found


def _digests(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, dict):
        return {name: _digests(item) for name, item in value.items()}
    return [_digests(item) for item in value] if isinstance(value, list | tuple) else None

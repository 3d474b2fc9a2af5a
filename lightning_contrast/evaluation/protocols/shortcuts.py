"""A planted shortcut: a tag or background that gives the label away in training, and is wrong or absent in the test."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.augment.images import as_float
from lightning_contrast.contracts import check_images
from lightning_contrast.evaluation.protocols.inputs import split
from lightning_contrast.evaluation.protocols.logistic import logistic_probe
from lightning_contrast.seeding import derived_seed

Shortcut = Literal["tag", "background"]


def plant_shortcut(
    images: Tensor, codes: Tensor, *, num_codes: int, kind: Shortcut = "tag", masks: Tensor | None = None
) -> Tensor:
    """Return images with a color that says a number: a square at the lower right, or the whole background.

    The colors of images of three channels have equally spaced hues; other images get equally spaced levels of gray.

    Args:
        images: ``(N, C, H, W)``, uint8 or floating in 0..1; not changed.
        codes: Numbers ``(N,)``, integers in 0..num_codes - 1.
        num_codes: Number of colors, >= 2.
        kind: "tag", a square whose edge is a quarter of the shorter side; or "background", everything outside of the
            masks.
        masks: Pixels of the object, ``(N, H, W)`` bool, for "background".

    Returns:
        Images ``(N, C, H, W)``, float32 in 0..1.

    Raises:
        ValueError: If a name or number is out of range, or shapes do not match.
        TypeError: If images are neither uint8 nor floating.

    Example:
        >>> found = plant_shortcut(torch.ones(1, 3, 8, 8), torch.tensor([0]), num_codes=3)
        >>> found[0, :, 7, 7].tolist(), found[0, :, 5, 5].tolist()  # red, unchanged
        ([1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """
    check_choice("kind", kind, ("tag", "background"))
    check_at_least("num_codes", num_codes, 2)
    pixels = as_float(check_images(images, values=True, evaluating=True)).clone()
    number, channels, height, width = pixels.shape
    fits = codes.shape == (number,) and not codes.is_floating_point()
    got = f"{tuple(codes.shape)} {codes.dtype}"
    require(fits, "codes", f"be integers of shape ({number},)", got, "Give one number per image")
    inside = number == 0 or 0 <= int(codes.min()) <= int(codes.max()) < num_codes
    require(inside, "codes", f"lie in 0..{num_codes - 1}", codes.tolist()[:8], "Increase `num_codes`")
    colors = _colors(num_codes, channels).to(pixels.device)[codes.long()].view(number, channels, 1, 1)
    if kind == "tag":
        edge = max(1, round(min(height, width) / 4))
        pixels[:, :, height - edge :, width - edge :] = colors
        return pixels
    if masks is None:
        fail("masks", "be given for a background", None, 'Give the pixels of the objects, or kind="tag"')
    fits = masks.shape == (number, height, width) and masks.dtype == torch.bool
    got = f"{tuple(masks.shape)} {masks.dtype}"
    require(fits, "masks", f"be bool of shape {(number, height, width)}", got, "True is the object")
    return torch.where(masks.to(pixels.device).unsqueeze(1), pixels, colors)


def shortcut_test(
    encode: Callable[[Tensor], Tensor],
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    kind: Shortcut = "tag",
    masks: tuple[Tensor, Tensor] | None = None,
    c: float = 0.1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fit a linear classifier to images with a color that gives the label away, and judge it where that is wrong.

    Logistic regression on standardized features, https://arxiv.org/abs/2004.07780 for the idea. A network whose
    features show the object rather than the color keeps its accuracy. Each test image is judged three times: with the
    color of its class, as in training; with that of another class of the training images, drawn at random; and as it
    is.

    Args:
        encode: Function from images ``(B, C, H, W)``, float32 in 0..1, to features ``(B, F)``.
        train: Training images ``(N, C, H, W)``, uint8 or floating in 0..1.
        train_labels: Classes ``(N,)``, integers >= 0.
        test: Test images ``(M, C, H, W)``.
        test_labels: Classes ``(M,)``, integers >= 0.
        kind: See `plant_shortcut`.
        masks: Pixels of the objects of the training and test images, for "background".
        c: Inverse of the penalty, > 0.
        seed: Seed of the swapped colors, >= 0.

    Returns:
        Whether each test image is classified correctly, ``(M,)`` bool: ``right``, with the color of its class;
        ``swapped``, with another one; ``absent``, without; ``clean``, without, by a classifier that was fitted without
        colors; and ``fooled``, whether with the swapped color it is taken for the class of that color.

    Raises:
        ValueError: As `plant_shortcut`, or if labels are missing or there is one class only.
    """
    number = 1 + int(torch.cat([train_labels, test_labels]).max())
    least = int(torch.cat([train_labels, test_labels]).min())
    require(least >= 0, "train_labels", "be >= 0", least, "Leave unlabeled images out")
    of_train, of_test = masks if masks is not None else (None, None)
    planted = plant_shortcut(train, train_labels, num_codes=max(2, number), kind=kind, masks=of_train)
    wrong = _other_classes(test_labels, train_labels, seed)
    changed = [
        plant_shortcut(test, codes, num_codes=max(2, number), kind=kind, masks=of_test)
        for codes in (test_labels, wrong)
    ]
    absent = encode(as_float(test))
    queries = torch.cat([*(encode(images) for images in changed), absent])
    given = split(encode(planted), train_labels, queries, test_labels.repeat(3))
    found = logistic_probe(*given.train, *given.test, c=c, standardize=True)
    plain = logistic_probe(encode(as_float(train)), train_labels, absent, test_labels, c=c, standardize=True)
    predicted = found.logits.argmax(1).view(3, len(test)).cpu()
    truth = test_labels.cpu()
    return {
        "right": predicted[0] == truth,
        "swapped": predicted[1] == truth,
        "absent": predicted[2] == truth,
        "clean": plain.logits.argmax(1).cpu() == truth,
        "fooled": predicted[1] == wrong.cpu(),
    }


def _other_classes(labels: Tensor, known: Tensor, seed: int) -> Tensor:
    """Draw for each label ``(M,)`` another one of the known ones, ``(M,)``."""
    classes = known.unique(sorted=True)  # type: ignore[no-untyped-call]
    require(len(classes) > 1, "train_labels", "hold two classes or more", classes.tolist(), "Use more classes")
    generator = torch.Generator().manual_seed(derived_seed(seed, 18))
    places = torch.randint(len(classes) - 1, labels.shape, generator=generator).to(labels.device)
    own = torch.searchsorted(classes, labels)
    is_known = classes[own.clamp(max=len(classes) - 1)] == labels
    found: Tensor = classes[torch.where(is_known & (places >= own), places + 1, places)]
    return found


def _colors(number: int, channels: int) -> Tensor:
    """Return colors of equally spaced hues, or grays, ``(number, channels)`` in 0..1."""
    if channels != 3:
        return torch.linspace(0, 1, number).unsqueeze(1).expand(-1, channels)
    hues = torch.arange(number) * (6 / number)
    offsets = torch.tensor([0.0, 4.0, 2.0])  # of red, green and blue
    return ((hues.unsqueeze(1) + offsets) % 6 - 3).abs().sub(1).clamp(0, 1)

"""Single changes of images at given strengths: nothing is drawn, half of the images go one way and half the other."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_choice, fail, require


class Change(NamedTuple):
    """A function of images (B, C, H, W) in 0..1 and of a strength, and the strengths that are tried."""

    apply: Callable[[Tensor, float], Tensor]
    strengths: tuple[float, ...]
    unit: str = ""
    needs_colour: bool = False


Changes: TypeAlias = Sequence[str] | Mapping[str, tuple[Callable[[Tensor, float], Tensor], Sequence[float]]] | None


def _signs(images: Tensor) -> Tensor:
    """Return +1 for every other image and -1 for the rest, (B,)."""
    return 1.0 - 2.0 * (torch.arange(len(images), device=images.device) % 2)


def _brightness(images: Tensor, strength: float) -> Tensor:
    return images * (1 + strength * _signs(images)).view(-1, 1, 1, 1)


def _contrast(images: Tensor, strength: float) -> Tensor:
    from kornia.enhance import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(images, 1 + strength * _signs(images))


def _saturation(images: Tensor, strength: float) -> Tensor:
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(images, 1 + strength * _signs(images))


def _hue(images: Tensor, strength: float) -> Tensor:
    from lightning_contrast.augment.fused.color import shift_hue_

    return shift_hue_(images.clone(), strength * _signs(images))


def _grayscale(images: Tensor, strength: float) -> Tensor:
    from kornia.color import rgb_to_grayscale

    return torch.lerp(images, rgb_to_grayscale(images).expand_as(images), strength)


def _blur(images: Tensor, strength: float) -> Tensor:
    from kornia.filters import gaussian_blur2d

    edge = min(images.shape[-2:])
    sigma = strength * edge
    radius = min(math.ceil(3 * sigma), edge - 1)  # reflection cannot pad more
    return gaussian_blur2d(images, 2 * radius + 1, (sigma, sigma))


def _crop(images: Tensor, strength: float) -> Tensor:
    height, width = images.shape[-2:]
    rows, columns = (max(1, round(edge * math.sqrt(1 - strength))) for edge in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    inner = images[..., top : top + rows, left : left + columns]
    return F.interpolate(inner, (height, width), mode="bilinear", align_corners=False)


def _shift(images: Tensor, strength: float) -> Tensor:
    from kornia.geometry.transform import translate

    way = strength * images.shape[-1] * _signs(images)
    return translate(images, torch.stack([way, torch.zeros_like(way)], dim=1), padding_mode="border")


def _rotation(images: Tensor, strength: float) -> Tensor:
    from kornia.geometry.transform import rotate

    return rotate(images, strength * _signs(images), padding_mode="border")


def _flip(images: Tensor, strength: float) -> Tensor:
    return images.flip(-1)


CHANGES = {
    "brightness": Change(_brightness, (0.2, 0.4, 0.6, 0.8), "factor 1 ± s"),
    "contrast": Change(_contrast, (0.2, 0.4, 0.6, 0.8), "factor 1 ± s"),
    "saturation": Change(_saturation, (0.25, 0.5, 0.75, 1.0), "factor 1 ± s", needs_colour=True),
    "hue": Change(_hue, (0.05, 0.1, 0.25, 0.5), "± turns", needs_colour=True),
    "grayscale": Change(_grayscale, (0.25, 0.5, 0.75, 1.0), "share of grey", needs_colour=True),
    "blur": Change(_blur, (0.01, 0.02, 0.04, 0.08), "sigma / edge"),
    "crop": Change(_crop, (0.2, 0.4, 0.6, 0.8), "area cut off"),
    "shift": Change(_shift, (0.05, 0.1, 0.2, 0.3), "± share of the width"),
    "rotation": Change(_rotation, (15.0, 45.0, 90.0, 180.0), "± degrees"),
    "flip": Change(_flip, (1.0,), "left and right"),
}


def chosen_changes(changes: Changes) -> dict[str, Change]:
    """Return changes by name.

    Args:
        changes: Names of `CHANGES`; own ones by name, each a function and its strengths; None: all of `CHANGES`.

    Raises:
        TypeError: If an own change is not a function.
        ValueError: If a name is not known, or there are no changes or strengths.
    """
    if changes is None:
        return dict(CHANGES)
    hint = 'Give names such as ["hue", "blur"], or {"mine": (function, [0.1, 0.2])}'
    require(not isinstance(changes, str) and len(changes) > 0, "changes", "be several names", changes, hint)
    if not isinstance(changes, Mapping):
        for name in changes:
            check_choice("changes", name, CHANGES)
        return {name: CHANGES[name] for name in changes}
    found = {}
    for name, own in changes.items():
        if not isinstance(own, tuple | list) or len(own) != 2 or not callable(own[0]):
            fail(f"changes[{name!r}]", "be a function and its strengths", own, hint, TypeError)
        strengths = tuple(float(strength) for strength in own[1])
        require(len(strengths) > 0, f"changes[{name!r}]", "have a strength or more", own[1], hint)
        found[name] = Change(own[0], strengths)
    return found


def fitting_changes(changes: Mapping[str, Change], channels: int) -> dict[str, Change]:
    """Return the changes that images of so many channels can go through."""
    return {name: change for name, change in changes.items() if channels == 3 or not change.needs_colour}


def changed(images: Tensor, change: Change, strength: float) -> Tensor:
    """Return images (B, C, H, W) in 0..1 that went through a change, in 0..1, of the same shape.

    Raises:
        ValueError: If a change of one's own gives another shape.
    """
    result = change.apply(images, strength).clamp(0, 1)
    if result.shape != images.shape:
        hint = "Resize to the size of the images"
        fail("changes", f"keep the shape {tuple(images.shape)}", tuple(result.shape), hint)
    return result


def similarity(plain: Tensor, other: Tensor) -> Tensor:
    """Return how much more alike an image and its changed copy are than two different images.

    Cosines are taken of features from which the mean of the plain ones is subtracted: of raw features they mean
    nothing, those of an untrained network are 0.5 and more between any two images.

    Args:
        plain: Features of N >= 2 images (N, F).
        other: Features of the same images changed, (N, F).

    Returns:
        A scalar, (own - different) / (1 - different): 1 where the change changes nothing, 0 where the copy is as far
        away as another image, below where it is further. ``own``: mean cosine of an image and its copy;
        ``different``: of an image and another one, both plain.
    """
    mean = plain.double().mean(dim=0)
    a, b = F.normalize(plain.double() - mean, dim=1), F.normalize(other.double() - mean, dim=1)
    own = (a * b).sum(dim=1).mean()
    count = len(a)
    different = (a.sum(dim=0).square().sum() - a.square().sum()) / (count * (count - 1))
    return (own - different) / (1 - different).clamp(min=1e-12)

"""Deterministic image perturbations; signed strengths are positive for even and negative for odd images."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_choice, fail, require


class Change(NamedTuple):
    """Perturbation: a function of images ``(B, C, H, W)`` in 0..1 and a strength, and the strengths to measure."""

    apply: Callable[[Tensor, float], Tensor]
    strengths: tuple[float, ...]
    unit: str = ""
    needs_color: bool = False


Changes: TypeAlias = Sequence[str] | Mapping[str, tuple[Callable[[Tensor, float], Tensor], Sequence[float]]] | None


def _signs(images: Tensor) -> Tensor:
    """Return +1 for even and -1 for odd images, ``(B,)``."""
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
    radius = min(math.ceil(3 * sigma), edge - 1)  # limit of reflection padding
    return gaussian_blur2d(images, 2 * radius + 1, (sigma, sigma))


def _crop(images: Tensor, strength: float) -> Tensor:
    height, width = images.shape[-2:]
    rows, columns = (max(1, round(edge * math.sqrt(1 - strength))) for edge in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    inner = images[..., top : top + rows, left : left + columns]
    return F.interpolate(inner, (height, width), mode="bilinear", align_corners=False)


def _shift(images: Tensor, strength: float) -> Tensor:
    from kornia.geometry.transform import translate

    offset = strength * images.shape[-1] * _signs(images)
    return translate(images, torch.stack([offset, torch.zeros_like(offset)], dim=1), padding_mode="border")


def _rotation(images: Tensor, strength: float) -> Tensor:
    from kornia.geometry.transform import rotate

    return rotate(images, strength * _signs(images), padding_mode="border")


def _flip(images: Tensor, strength: float) -> Tensor:
    return images.flip(-1)


CHANGES = {
    "brightness": Change(_brightness, (0.2, 0.4, 0.6, 0.8), "factor 1 ± s"),
    "contrast": Change(_contrast, (0.2, 0.4, 0.6, 0.8), "factor 1 ± s"),
    "saturation": Change(_saturation, (0.25, 0.5, 0.75, 1.0), "factor 1 ± s", needs_color=True),
    "hue": Change(_hue, (0.05, 0.1, 0.25, 0.5), "± turns", needs_color=True),
    "grayscale": Change(_grayscale, (0.25, 0.5, 0.75, 1.0), "share of gray", needs_color=True),
    "blur": Change(_blur, (0.01, 0.02, 0.04, 0.08), "sigma / edge"),
    "crop": Change(_crop, (0.2, 0.4, 0.6, 0.8), "cropped area"),
    "shift": Change(_shift, (0.05, 0.1, 0.2, 0.3), "± share of the width"),
    "rotation": Change(_rotation, (15.0, 45.0, 90.0, 180.0), "± degrees"),
    "flip": Change(_flip, (1.0,), "horizontal flip"),
}


def chosen_changes(changes: Changes) -> dict[str, Change]:
    """Return perturbations by name.

    Args:
        changes: Names of `CHANGES`; a dict from names to (function, strengths); or None for all of `CHANGES`.

    Raises:
        TypeError: If a value of the dict is not a function with strengths.
        ValueError: If a name is unknown, or there are no perturbations or strengths.
    """
    if changes is None:
        return dict(CHANGES)
    hint = 'Give names such as ["hue", "blur"], or {"mine": (function, [0.1, 0.2])}'
    require(not isinstance(changes, str) and len(changes) > 0, "changes", "be a sequence of names", changes, hint)
    if not isinstance(changes, Mapping):
        for name in changes:
            check_choice("changes", name, CHANGES)
        return {name: CHANGES[name] for name in changes}
    found = {}
    for name, own in changes.items():
        if not isinstance(own, tuple | list) or len(own) != 2 or not callable(own[0]):
            fail(f"changes[{name!r}]", "be (function, strengths)", own, hint, TypeError)
        strengths = tuple(float(strength) for strength in own[1])
        require(len(strengths) > 0, f"changes[{name!r}]", "have at least one strength", own[1], hint)
        found[name] = Change(own[0], strengths)
    return found


def fitting_changes(changes: Mapping[str, Change], channels: int) -> dict[str, Change]:
    """Return the perturbations that apply to images of ``channels`` channels."""
    return {name: change for name, change in changes.items() if channels == 3 or not change.needs_color}


def changed(images: Tensor, change: Change, strength: float) -> Tensor:
    """Return perturbed images, clamped to 0..1, ``(B, C, H, W)``.

    Args:
        images: Images in 0..1, ``(B, C, H, W)``.
        change: The perturbation.
        strength: Its strength.

    Raises:
        ValueError: If the function returns another shape.
    """
    result = change.apply(images, strength).clamp(0, 1)
    if result.shape != images.shape:
        hint = "Resize the result to the size of the images"
        fail("changes", f"keep the shape {tuple(images.shape)}", tuple(result.shape), hint)
    return result


def similarity(plain: Tensor, other: Tensor) -> Tensor:
    """Return the similarity of images and their perturbed copies relative to that of different images.

    Cosine similarities are computed after subtracting the mean of the plain features; without centering, those of an
    untrained network exceed 0.5 for any two images.

    Args:
        plain: Features of N >= 2 images, ``(N, F)``.
        other: Features of their perturbed copies, ``(N, F)``.

    Returns:
        A scalar, (own - different) / (1 - different): 1 if the perturbation does not change the features, 0 if the copy
        is as far away as another image, negative if it is further away. ``own``: mean cosine similarity of an image and
        its copy; ``different``: of two different images without perturbation.
    """
    mean = plain.double().mean(dim=0)
    a, b = F.normalize(plain.double() - mean, dim=1), F.normalize(other.double() - mean, dim=1)
    own = (a * b).sum(dim=1).mean()
    count = len(a)
    different = (a.sum(dim=0).square().sum() - a.square().sum()) / (count * (count - 1))
    return (own - different) / (1 - different).clamp(min=1e-12)

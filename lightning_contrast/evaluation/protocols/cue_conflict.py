"""Texture against shape: images in which the outline shows one class and the surface another."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.augment.images import as_float
from lightning_contrast.contracts import check_images
from lightning_contrast.seeding import derived_seed

_FILLED = (0.05, 0.95)  # shares of the image that an outline may cover


def cue_conflict_images(
    images: Tensor, masks: Tensor, labels: Tensor, *, count: int = 256, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Make images whose outline is an object of one class, filled with the texture of an object of another.

    The texture is the largest square patch inside the other object, of at least an eighth of the shorter side, repeated
    in mirrored tiles; the background is that of the outline's image. Differs from
    https://arxiv.org/abs/1811.12231, whose images are made by style transfer from photographs: figures compare models
    with each other, and not with published ones. Outlines that cover less than 5 % or more than 95 % of the image, and
    objects without such a patch, are left out.

    Args:
        images: ``(N, C, H, W)``, uint8 or floating in 0..1.
        masks: Pixels of the objects, ``(N, H, W)`` bool.
        labels: Classes ``(N,)``, integers; -1 for unlabeled images, which are left out.
        count: Images to make, >= 1.
        seed: Seed of the pairs, >= 0.

    Returns:
        Images ``(count, C, H, W)``, float32 in 0..1, and the classes of their shapes and textures, ``(count,)`` each.

    Raises:
        ValueError: If shapes do not match, or there are not objects of two classes.
        TypeError: If images are neither uint8 nor floating.
    """
    check_at_least("count", count, 1)
    pixels = as_float(check_images(images, values=True, evaluating=True))
    number, _, height, width = pixels.shape
    fits = masks.shape == (number, height, width) and masks.dtype == torch.bool
    got = f"{tuple(masks.shape)} {masks.dtype}"
    require(fits, "masks", f"be bool of shape {(number, height, width)}", got, "True is the object")
    fits = labels.shape == (number,) and not labels.is_floating_point()
    require(fits, "labels", f"be integers of shape ({number},)", tuple(labels.shape), "Give one class per image")
    share = masks.double().mean((1, 2))
    usable = (labels >= 0) & (share >= _FILLED[0]) & (share <= _FILLED[1])
    patches = [_largest_square(mask) if bool(known) else None for mask, known in zip(masks, labels >= 0, strict=True)]
    shapes = usable.nonzero().flatten().tolist()
    textures = [row for row, patch in enumerate(patches) if patch is not None]
    classes = {int(labels[row]) for row in textures}
    pairs = [row for row in shapes if classes - {int(labels[row])}]
    if not pairs:
        hint = "Use images whose objects cover between 5 and 95 % of them, of two classes or more"
        fail("masks", "show objects of two classes with an outline and a texture", f"{len(textures)} textures", hint)
    generator = torch.Generator().manual_seed(derived_seed(seed, 19))
    found, of_shape, of_texture = [], [], []
    for _ in range(count):
        shape = pairs[int(torch.randint(len(pairs), (), generator=generator))]
        others = [row for row in textures if labels[row] != labels[shape]]
        texture = others[int(torch.randint(len(others), (), generator=generator))]
        top, left, edge = patches[texture] or (0, 0, 1)
        patch = pixels[texture, :, top : top + edge, left : left + edge]
        found.append(torch.where(masks[shape], _tiled(patch, height, width), pixels[shape]))
        of_shape.append(labels[shape])
        of_texture.append(labels[texture])
    return torch.stack(found), torch.stack(of_shape).long(), torch.stack(of_texture).long()


def shape_decisions(predictions: Tensor, shapes: Tensor, textures: Tensor) -> dict[str, float]:
    """Return which cue decides (https://arxiv.org/abs/1811.12231): the shape, the texture or none.

    Args:
        predictions: Predicted classes ``(N,)``, integers.
        shapes: Classes of the shapes, ``(N,)``.
        textures: Classes of the textures, ``(N,)``; images whose cues agree are left out.

    Returns:
        ``shape`` and ``texture``, numbers of decisions; ``other``, of those for neither; and ``share``, that of the
        shape among decisions for either, in 0..1, NaN without any.

    Raises:
        ValueError: If shapes do not match.

    Example:
        >>> found = shape_decisions(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 0, 0]), torch.tensor([1, 1, 1, 1]))
        >>> found["shape"], found["texture"], found["other"], round(found["share"], 3)
        (1, 2, 1, 0.333)
    """
    fits = predictions.shape == shapes.shape == textures.shape and predictions.ndim == 1
    got = tuple(predictions.shape), tuple(shapes.shape), tuple(textures.shape)
    require(fits, "predictions", "have the shape (N,) of `shapes` and `textures`", got, "Give one of each per image")
    conflict = shapes != textures
    shape = int(((predictions == shapes) & conflict).sum())
    texture = int(((predictions == textures) & conflict).sum())
    either = shape + texture
    share = shape / either if either else float("nan")
    return {"shape": shape, "texture": texture, "other": int(conflict.sum()) - either, "share": share}


def _largest_square(mask: Tensor) -> tuple[int, int, int] | None:
    """Return top, left and edge of the largest square inside a mask ``(H, W)``, None if it is too small."""
    shorter = min(mask.shape)
    least = max(2, -(-shorter // 8))
    sums = F.pad(mask.long().cumsum(0).cumsum(1), (1, 0, 1, 0))  # of the pixels above and left
    low, high, place = least, shorter, None
    while low <= high:
        edge = (low + high) // 2
        filled = sums[edge:, edge:] - sums[:-edge, edge:] - sums[edge:, :-edge] + sums[:-edge, :-edge]
        corners = (filled == edge * edge).nonzero()
        if len(corners):
            row, column = corners[len(corners) // 2].tolist()
            low, place = edge + 1, (row, column, edge)
        else:
            high = edge - 1
    return place


def _tiled(patch: Tensor, height: int, width: int) -> Tensor:
    """Repeat a patch ``(C, e, e)`` in mirrored tiles to ``(C, height, width)``."""
    mirrored = torch.cat([patch, patch.flip(2)], 2)
    mirrored = torch.cat([mirrored, mirrored.flip(1)], 1)
    edge = mirrored.shape[1]
    return mirrored.repeat(1, -(-height // edge), -(-width // edge))[:, :height, :width]

"""What the methods with a student, a teacher and masked patches share beside their algorithms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import require
from lightning_contrast.nn import MaskedPatches, MaskedViT, masked_patches


def join_globals(views: Sequence[Tensor]) -> Tensor:
    """Return the two global views of a batch as one, (2B, C, h, w), view by view.

    Args:
        views: The views, global ones first, each (B, C, h, w).

    Raises:
        ValueError: If the global views differ in size.
    """
    sizes = [tuple(view.shape[-2:]) for view in views[:2]]
    mend = "Give a policy whose global views have one size; local views may have others"
    require(sizes[0] == sizes[1], "views", "begin with two global views of one size", sizes, mend)
    return torch.cat([views[0], views[1]])


def draw_masks(sampler: Callable[..., Tensor], backbone: MaskedViT, images: Tensor, **settings: Any) -> MaskedPatches:
    """Draw a mask for each image.

    Args:
        sampler: `ibot_masks` or `dinov2_masks`.
        backbone: What cuts the images into patches.
        images: Images (B, C, h, w).
        settings: Further arguments of the sampler.
    """
    return masked_patches(sampler(len(images), backbone.grid_size(images), **settings), images.device)


def pick(patches: Tensor, rows: Tensor) -> Tensor:
    """Return the masked patches (M, F) of all patches (B, N, F).

    Args:
        patches: Patches of all images.
        rows: Which to take among all B N.
    """
    return patches.flatten(0, 1).index_select(0, rows)

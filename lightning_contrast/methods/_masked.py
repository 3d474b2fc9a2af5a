"""What the methods with a student, a teacher and masked patches share beside their algorithms."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_probability, require
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.methods._distillation import DistillationModule
from lightning_contrast.nn import MaskedPatches, MaskedViT, build_masked_backbone, masked_patches
from lightning_contrast.optim import OptimizerLike


class MaskedDistillationModule(DistillationModule):
    """A `DistillationModule` whose backbone can mask patches.

    Args:
        backbone: See `build_masked_backbone`.
        defaults: See there.
        momentum: Share of the teacher that the first step keeps, in [0, 1].
        settings: Further arguments of `ContrastiveModule`.
    """

    backbone: MaskedViT
    momentum_backbone: MaskedViT
    sharded_methods: ClassVar[dict[str, Sequence[str]]] = {"backbone": ["tokens"], "momentum_backbone": ["tokens"]}

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool,
        feature_dim: int | None,
        backbone_kwargs: dict[str, Any] | None,
        defaults: Mapping[str, Any],
        momentum: float,
        optimizer: OptimizerLike,
        lr: float | None,
        weight_decay: float,
        warmup_epochs: int,
    ) -> None:
        network, feature_dim = build_masked_backbone(
            backbone,
            small_images=small_images,
            feature_dim=feature_dim,
            backbone_kwargs=backbone_kwargs,
            defaults=defaults,
        )
        super().__init__(
            network,
            small_images=False,
            feature_dim=feature_dim,
            backbone_kwargs=None,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
        )
        check_probability("momentum", momentum)
        self.momentum = momentum

    def default_callbacks(self) -> list[L.Callback]:
        """Return what moves the teacher and the centres."""
        return [MomentumUpdate(self.momentum)]


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

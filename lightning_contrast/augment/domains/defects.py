"""Synthetic defects with labels."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_choice, check_probability, require
from lightning_contrast.augment.fused.base import FusedOperation, to_device
from lightning_contrast.augment.images import as_float
from lightning_contrast.contracts import check_images
from lightning_contrast.precision import full_precision
from lightning_contrast.seeding import send

DefectKind: TypeAlias = Literal["patch", "scar", "scratch", "dent"]
"""Kind of a synthetic defect; see `FusedCutPaste`, `FusedScratch` and `FusedDent` in `augment.fused`."""


class DefectImages(NamedTuple):
    """Images with synthetic defects."""

    images: Tensor
    """Float32 in 0..1, ``(B, C, H, W)``."""
    kinds: Tensor
    """0 for an image as it was, else 1 + the place of its defect in ``kinds``; int64 ``(B,)``."""
    masks: Tensor
    """The pixels that changed, bool ``(B, 1, H, W)``."""


class SyntheticDefects(nn.Module):
    """Add one defect of a random kind to some images of a batch, and tell which and where.

    It makes labeled data out of images without defects, for the pretext task of CutPaste: a network that is trained to
    tell the kinds apart has features in which real defects lie far from normal parts. It is no view policy: an image
    with a defect is another class than the image, so in a contrastive method it belongs to the negatives. The defects
    are drawn by simple formulas, not simulated, and a mask marks every pixel that changed, a dent's shade included.

    All random numbers come from torch's global CPU generator; nothing is read from the device.

    Source: ``"patch"`` and ``"scar"`` of https://arxiv.org/abs/2104.04015, whose three-way task is
    ``SyntheticDefects(("patch", "scar"), p=2 / 3)``; there each batch has all three of each image. Scratches and dents
    are no paper's.

    Args:
        kinds: Different kinds, all equally likely.
        p: Probability of a defect per image.

    Raises:
        ValueError: If a kind is unknown or given twice, there is none, or ``p`` is out of its range.

    Example:
        >>> from lightning_contrast.augment.domains import SyntheticDefects
        >>> images, kinds, masks = SyntheticDefects(p=1.0)(torch.rand(8, 3, 32, 32))
        >>> tuple(images.shape), bool((kinds > 0).all()), bool(masks.flatten(1).any(1).all())
        ((8, 3, 32, 32), True, True)
    """

    def __init__(self, kinds: Sequence[DefectKind] = get_args(DefectKind), *, p: float = 0.5) -> None:
        super().__init__()
        from lightning_contrast.augment.fused import FusedCutPaste, FusedDent, FusedScratch

        check_probability("p", p)
        hint = 'Give different kinds, such as ("patch", "scar")'
        several = not isinstance(kinds, str) and 0 < len(kinds) == len(set(kinds))
        require(several, "kinds", "be different names", kinds, hint)
        for kind in kinds:
            check_choice("kinds", kind, get_args(DefectKind))
        made: dict[str, FusedOperation] = {"patch": FusedCutPaste(), "scar": FusedCutPaste(kind="scar")}
        made |= {"scratch": FusedScratch(), "dent": FusedDent()}
        self.kinds, self.p = tuple(kinds), p
        self._operations = [made[kind] for kind in self.kinds]

    @torch.no_grad()
    @full_precision
    def forward(self, images: Tensor) -> DefectImages:
        """Return images with defects, their kinds and masks.

        Args:
            images: ``(B, C, H, W)``, uint8 in 0..255 or float in 0..1; not modified.
        """
        check_images(images, values=False, evaluating=False)
        before = as_float(images)
        after, (batch, _, height, width) = before.clone(), before.shape
        number = torch.randint(len(self.kinds), (batch,), dtype=torch.int64, device="cpu")
        kinds = torch.where(torch.rand(batch, dtype=torch.float32, device="cpu") < self.p, number + 1, 0)
        for place, operation in enumerate(self._operations):
            rows = (kinds == place + 1).nonzero().flatten()
            if len(rows) > 0:
                there = send(rows, after.device)
                plan = to_device(operation.prepare(operation.draw(len(rows), height, width)), after.device)
                after.index_copy_(0, there, operation.compute_(after.index_select(0, there), plan))
        return DefectImages(after, send(kinds, after.device), (after != before).any(1, keepdim=True))

"""Views of manufactured parts."""

from collections.abc import Sequence
from typing import Unpack

from lightning_contrast._checks import check_not_negative, check_probability
from lightning_contrast.augment.domains.options import DomainOptions
from lightning_contrast.augment.fused.base import FusedOperation
from lightning_contrast.augment.images import Size
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec

Statistics = Sequence[float] | None
Range = tuple[float, float]


def industrial_views(
    size: Size = 256,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.5, 1.0),
    flip: float = 0.0,
    turns: bool = False,
    light: float = 0.2,
    scratches: float = 0.0,
    dents: float = 0.0,
    occlusion: float = 0.0,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of a manufactured part, in which a defect of a few pixels stays visible.

    Crop 0.5..1, jitter (0.1, 0.1, 0.1, 0.1) at 1; a gradient of the light by a factor of up to 0.82..1.22 at 0.5; no
    flip unless given, as a part has an orientation; no blur, grayscale or solarization, which hide scratches. By
    default no defects are added: where they are what is looked for, they are another class and not a view
    (`SyntheticDefects`).

    Source: colors and size of CutPaste, https://arxiv.org/abs/2104.04015. The other numbers are no paper's.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        crop: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, and of a vertical one if ``turns`` is set.
        turns: Turn by 0, 90, 180 or 270 degrees, equally likely: for parts without orientation, such as screws.
        light: Limit of the logarithm of the gradient of the light, >= 0; 0 for none.
        scratches: Probability of a scratch, for tasks in which it has no meaning, such as to tell parts apart.
        dents: Probability of a dent, for such tasks.
        occlusion: Probability that a box of 2..10 % of the view is erased; it can hide a defect.
        **options: See `DomainOptions`; with other channels than 1 and 3, ``color=False``.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from lightning_contrast.augment.fused import FusedDent, FusedScratch, FusedShading

    check_not_negative("light", light)
    check_probability("scratches", scratches)
    check_probability("dents", dents)
    check_probability("occlusion", occlusion)
    first: list[FusedOperation] = [FusedDent(dents)] if dents > 0 else []
    first += [FusedScratch(scratches)] if scratches > 0 else []
    first += [FusedShading(0.5, light, points=2)] if light > 0 else []
    spec = ViewSpec(
        size,
        crop,
        (0.1, 0.1, 0.1, 0.1),
        jitter_p=1.0,
        gray_p=0.0,
        flip=flip,
        vertical_flip=flip if turns else 0.0,
        quarter_turns=turns,
        first_operations=tuple(first),
        erase_p=occlusion,
        erase_scale=(0.02, 0.1),
    )
    return make_policy([spec, spec], mean=mean, std=std, **options)

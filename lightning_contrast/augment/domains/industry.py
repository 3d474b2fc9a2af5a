"""Views of manufactured parts."""

from collections.abc import Sequence
from typing import Unpack

from lightning_contrast.augment.domains.options import DomainOptions
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
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of a manufactured part, in which a defect of a few pixels stays visible.

    Crop 0.5..1, jitter (0.1, 0.1, 0.1, 0.1) at 1; no flip unless given, as a part has an orientation; no blur,
    grayscale or solarization, which hide scratches. No defects are pasted: they are another class and not a view.

    Source: colors and size of CutPaste, https://arxiv.org/abs/2104.04015. The crop is no paper's.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        crop: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, and of a vertical one if ``turns`` is set.
        turns: Turn by 0, 90, 180 or 270 degrees, equally likely: for parts without orientation, such as screws.
        **options: See `DomainOptions`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    spec = ViewSpec(
        size,
        crop,
        (0.1, 0.1, 0.1, 0.1),
        jitter_p=1.0,
        gray_p=0.0,
        flip=flip,
        vertical_flip=flip if turns else 0.0,
        quarter_turns=turns,
    )
    return make_policy([spec, spec], mean=mean, std=std, **options)

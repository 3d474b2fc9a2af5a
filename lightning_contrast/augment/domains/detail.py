"""Views that keep detail: of fine-grained classes, and of documents."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from lightning_contrast._checks import check_probability
from lightning_contrast.augment.domains.options import DomainOptions
from lightning_contrast.augment.fused.base import FusedOperation
from lightning_contrast.augment.images import Size
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec

Statistics = Sequence[float] | None
Range = tuple[float, float]


def fine_grained_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.2, 1.0),
    safe_crop: Range = (0.5, 1.0),
    hue: float = 0.05,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of a bird, car or product, of which the second shows at least half of the image.

    Crops 0.2..1 and 0.5..1, flip 0.5, jitter (0.4, 0.4, 0.2, 0.05) at 0.8; no grayscale or solarization, as color can
    be the label, and no blur, which removes the parts by which classes differ.

    Source: no paper's numbers. https://arxiv.org/abs/2105.05837 measures how far contrastive features lag behind
    supervised ones on fine-grained classes.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1; 448 shows more detail at four times the cost.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        crop: Range of the first crop's share of the image area.
        safe_crop: Range of the second crop's share.
        hue: Limit of the hue in turns, 0..0.5.
        **options: See `DomainOptions`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    first = ViewSpec(size, crop, (0.4, 0.4, 0.2, hue), gray_p=0.0)
    return make_policy([first, replace(first, scale=safe_crop)], mean=mean, std=std, **options)


def document_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.6, 1.0),
    rotation: float = 3.0,
    jpeg: float = 0.5,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of a scanned or photographed page, on which text stays text.

    Crop 0.6..1, no flip; rotation by up to 3 degrees at 0.5; a shadow (a gradient by a factor of up to 0.67..1.5) at
    0.5; brightness and contrast 0.2 at 0.8, grayscale 0.5; JPEG with a quality of 40..95 at 0.5; no blur, hue,
    saturation or solarization.

    Source: no paper's numbers. DiT, https://arxiv.org/abs/2203.02378, which learns from pages without labels, crops and
    resizes only. JPEG is Kornia's.

    Args:
        size: Edge of the views in pixels, or height and width such as (448, 320), >= 1. Letters need some 8 pixels of
            height in it.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        crop: Range of the crop's share of the page.
        rotation: Limit of the angle in degrees, 0..180.
        jpeg: Probability of JPEG's artifacts, for 3 channels; others have none.
        **options: See `DomainOptions`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    import kornia.augmentation as K

    from lightning_contrast.augment.fused import FusedShading, KorniaOperation

    check_probability("jpeg", jpeg)
    last: list[FusedOperation] = []
    if jpeg > 0 and options.get("channels", 3) == 3:
        last.append(KorniaOperation(K.RandomJPEG((40.0, 95.0)), jpeg))
    spec = ViewSpec(
        size,
        crop,
        (0.2, 0.2, 0.0, 0.0),
        gray_p=0.5,
        flip=0.0,
        rotation=rotation,
        rotation_p=0.5,
        first_operations=(FusedShading(0.5, 0.4, points=2),),
        last_operations=tuple(last),
    )
    return make_policy([spec, spec], mean=mean, std=std, **options)

"""Views of gray medical images: chest X-rays, slices of CT and MRI."""

from collections.abc import Sequence
from typing import Literal, Unpack

from lightning_contrast._checks import check_choice, check_not_negative
from lightning_contrast.augment.domains.options import DomainOptions
from lightning_contrast.augment.fused.base import FusedOperation
from lightning_contrast.augment.images import Size, check_size
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec

Statistics = Sequence[float] | None
Range = tuple[float, float]

CT_RANGE = (-1024.0, 3071.0)
"""Hounsfield units of 12 bits, the ``scale`` of `ct_views`."""

CT_WINDOWS = {"lung": (-600.0, 1500.0), "soft": (40.0, 400.0), "bone": (400.0, 1800.0)}
"""Center and width of the windows of `ct_views` in Hounsfield units."""


def _gray_views(
    size: Size,
    mean: Statistics,
    std: Statistics,
    crop: Range,
    flip: float,
    gamma: Range,
    window: Range,
    options: DomainOptions,
    *,
    erase: float,
    bias: float = 0.0,
) -> ViewPolicy:
    """Return the policy of two views of gray images."""
    from lightning_contrast.augment.fused import FusedDeform, FusedShading, FusedWindow

    check_size(size)
    options.setdefault("channels", 1)
    options.setdefault("color", False)
    check_not_negative("bias", bias)
    operations: list[FusedOperation] = [FusedDeform(10.0, 0.02, p=0.5)]
    operations += [FusedShading(0.5, bias, points=3)] if bias > 0 else []
    operations.append(FusedWindow(window, jitter=0.1, gamma=gamma, shift=0.1, p=0.8))
    spec = ViewSpec(
        size,
        crop,
        jitter_p=0.0,
        gray_p=0.0,
        flip=flip,
        first_operations=tuple(operations),
        erase_p=erase,
        erase_scale=(0.02, 0.1),
    )
    return make_policy([spec, spec], mean=mean, std=std, window=window, **options)


def chest_xray_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.3, 1.0),
    flip: float = 0.0,
    gamma: Range = (0.7, 1.5),
    erase: float = 0.0,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of a chest X-ray.

    Crop 0.3..1, no flip, which would move the heart to the other side; rotation by up to 10 degrees and an elastic
    deformation of 2 % of the edge at 0.5; limits of the intensities by 10 %, gamma 0.7..1.5 and a shift of 0.1 at 0.8;
    no blur, as fine lines are findings.

    Source: rotation of MoCo-CXR, https://arxiv.org/abs/2010.05352, which flips and has no crop of random size; elastic
    deformation for radiology of REMEDIS, https://arxiv.org/abs/2205.09723. The other numbers are no paper's.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: As in `moco_v1_views`, one number per channel.
        std: As in `moco_v1_views`, one number per channel.
        crop: Range of the crop's share of the image area; small findings vanish from small crops.
        flip: Probability of a horizontal flip; above 0 only if no label names a side.
        gamma: Range of the exponent of the intensities, above 0.
        erase: Probability that a box of 2..10 % of the view is masked; it can hide a finding.
        **options: See `DomainOptions`; ``channels`` is 1 by default.

    Raises:
        ValueError: If an argument is out of its range.
    """
    return _gray_views(size, mean, std, crop, flip, gamma, (0.0, 1.0), options, erase=erase)


def ct_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.3, 1.0),
    flip: float = 0.0,
    gamma: Range = (1.0, 1.0),
    window: Literal["lung", "soft", "bone"] = "soft",
    erase: float = 0.0,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of a CT slice in Hounsfield units, through a window whose limits vary.

    As `chest_xray_views`, with the window of the tissue: lung -600 / 1500, soft 40 / 400, bone 400 / 1800 (center and
    width), each moved and widened by up to 10 % at 0.8; no gamma, as Hounsfield units have a meaning. `eval_transform`
    applies the window as it is.

    Source: rotation and deformation as in `chest_xray_views` (https://arxiv.org/abs/2205.09723); the windows are those
    of radiology, the jitter is no paper's.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: As in `moco_v1_views`, one number per channel, of pixels within the window.
        std: As in `moco_v1_views`, one number per channel, of pixels within the window.
        crop: Range of the crop's share of the slice.
        flip: Probability of a horizontal flip; above 0 only if no label names a side.
        gamma: Range of the exponent of the intensities, above 0.
        window: ``"lung"``, ``"soft"`` or ``"bone"``.
        erase: As in `chest_xray_views`.
        **options: See `DomainOptions`; ``channels`` is 1 and ``scale`` (-1024, 3071) by default.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_choice("window", window, CT_WINDOWS)
    scale = options.setdefault("scale", CT_RANGE) or CT_RANGE  # None: pixels are in 0..1 already, over that range
    center, width = CT_WINDOWS[window]
    low, high = ((limit - scale[0]) / (scale[1] - scale[0]) for limit in (center - width / 2, center + width / 2))
    return _gray_views(size, mean, std, crop, flip, gamma, (low, high), options, erase=erase)


def mri_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.3, 1.0),
    flip: float = 0.0,
    gamma: Range = (0.7, 1.5),
    bias: float = 0.3,
    erase: float = 0.0,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of an MRI slice: those of `chest_xray_views`, under a bias field of the coil.

    The field is smooth, with 3 x 3 control points, and at 0.5 multiplies the slice before its intensities change.
    Intensities of MRI have no unit: clip each volume to its 1st and 99th percentile and map it to 0..1 in the dataset.

    Source: as `chest_xray_views` (https://arxiv.org/abs/2205.09723). The strength of the bias field is no paper's.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: As in `chest_xray_views`.
        std: As in `chest_xray_views`.
        crop: Range of the crop's share of the slice.
        flip: As in `chest_xray_views`.
        gamma: Range of the exponent of the intensities, above 0.
        bias: Limit of the logarithm of the bias field, >= 0; 0.3 is a factor of 0.74..1.35. 0 for none.
        erase: As in `chest_xray_views`.
        **options: See `DomainOptions`; ``channels`` is 1 by default.

    Raises:
        ValueError: If an argument is out of its range.
    """
    return _gray_views(size, mean, std, crop, flip, gamma, (0.0, 1.0), options, erase=erase, bias=bias)

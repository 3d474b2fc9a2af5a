"""Published policies with global views followed by smaller local views."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from lightning_contrast._checks import check_at_least
from lightning_contrast.augment.images import Size, check_size
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewOptions, ViewSpec

Statistics = Sequence[float] | None
Range = tuple[float, float]

_DINO_JITTER = (0.4, 0.4, 0.2, 0.1)


def local_size_of(size: Size, local_size: Size | None) -> Size:
    """Return the edge of the local views; by default 96 / 224 of the global ones, rounded to a multiple of 4.

    Args:
        size: Edge of the global views in pixels, or height and width.
        local_size: Edge of the local views as given by the user, or None.
    """
    edges = check_size(size)
    if local_size is not None:
        check_size(local_size, "local_size")
        return local_size
    height, width = (max(1, 4 * round(edge * 96 / 224 / 4)) if edge >= 4 else edge for edge in edges)
    return height if height == width else (height, width)


def swav_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    local_size: Size | None = None,
    local_views: int = 6,
    global_scale: Range = (0.14, 1.0),
    local_scale: Range = (0.05, 0.14),
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return SwAV's multi-crop: 2 global and 6 local views.

    Crops 0.14..1 at 224 and 0.05..0.14 at 96, flip 0.5, jitter (0.8, 0.8, 0.8, 0.2) at 0.8, grayscale 0.2, blur 0.5.

    Source: https://arxiv.org/abs/2006.09882 and https://github.com/facebookresearch/swav. DeepCluster v2 uses it too.
    Difference: a true Gaussian blur, which Pillow approximates with box filters.

    Args:
        size: Edge of the global views in pixels, or height and width, >= 1.
        mean: One number per channel, subtracted at the end; None leaves the views in 0..1. The paper uses ImageNet's.
        std: One number per channel, divided by at the end.
        local_size: Edge of the local views; None scales 96 at 224 in proportion, to a multiple of 4.
        local_views: Number of local views, >= 0.
        global_scale: Range of a global crop's share of the image area.
        local_scale: Range of a local crop's share of the image area.
        **options: See `ViewOptions`.
    """
    check_at_least("local_views", local_views, 0)
    large = ViewSpec(size, global_scale, (0.8, 0.8, 0.8, 0.2), blur_p=0.5)
    small = replace(large, size=local_size_of(size, local_size), scale=local_scale)
    return make_policy([large] * 2 + [small] * local_views, mean=mean, std=std, **options)


def dino_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    local_size: Size | None = None,
    local_views: int = 8,
    global_scale: Range = (0.4, 1.0),
    local_scale: Range = (0.05, 0.4),
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return DINO's multi-crop: 2 global and 8 local views.

    Crops 0.4..1 at 224 and 0.05..0.4 at 96 (bicubic), flip 0.5, jitter (0.4, 0.4, 0.2, 0.1) at 0.8, grayscale 0.2,
    blur 1 / 0.1 / 0.5 (first, second, local), solarization 0.2 on the second. Without local views the authors crop
    0.14..1; their ResNet-50 uses 0.14..1 and 0.05..0.14, their long runs 0.25..1 and 0.05..0.25 with 10 local views.

    Source: https://arxiv.org/abs/2104.14294 and https://github.com/facebookresearch/dino. iBOT uses it too.
    Difference: a true Gaussian blur, which Pillow approximates with box filters.

    Args:
        size: As in `swav_views`.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        local_size: As in `swav_views`.
        local_views: As in `swav_views`.
        global_scale: As in `swav_views`.
        local_scale: As in `swav_views`.
        **options: See `ViewOptions`.
    """
    check_at_least("local_views", local_views, 0)
    first = ViewSpec(size, global_scale, _DINO_JITTER, blur_p=1.0, bicubic=True)
    second = replace(first, blur_p=0.1, solarize_p=0.2)
    local = replace(first, size=local_size_of(size, local_size), scale=local_scale, blur_p=0.5)
    return make_policy([first, second] + [local] * local_views, mean=mean, std=std, **options)


def dinov2_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    local_size: Size | None = None,
    local_views: int = 8,
    global_scale: Range = (0.32, 1.0),
    local_scale: Range = (0.05, 0.32),
    published_blur: bool = False,
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return DINOv2's multi-crop: 2 global and 8 local views.

    Crops 0.32..1 at 224 and 0.05..0.32 at 96 (98 for patches of 14), colors as in `dino_views`, a blur kernel of 9.
    The reference implementation passes the complement of each blur probability: intended are 1 / 0.1 / 0.5 (first,
    second, local), applied, also for the released weights, are 0 / 0.9 / 0.5.

    Source: https://arxiv.org/abs/2304.07193 and https://github.com/facebookresearch/dinov2 (``augmentations.py``).
    Difference: the intended blur probabilities are the default.

    Args:
        size: As in `swav_views`.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        local_size: As in `swav_views`.
        local_views: As in `swav_views`.
        global_scale: As in `swav_views`.
        local_scale: As in `swav_views`.
        published_blur: Use the complements, as the reference implementation does.
        **options: See `ViewOptions`.
    """
    check_at_least("local_views", local_views, 0)
    blur = (0.0, 0.9, 0.5) if published_blur else (1.0, 0.1, 0.5)
    first = ViewSpec(size, global_scale, _DINO_JITTER, blur_p=blur[0], blur_kernel=9, bicubic=True)
    second = replace(first, blur_p=blur[1], solarize_p=0.2)
    local = replace(first, size=local_size_of(size, local_size), scale=local_scale, blur_p=blur[2])
    return make_policy([first, second] + [local] * local_views, mean=mean, std=std, **options)


def msn_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    local_size: Size | None = None,
    local_views: int = 10,
    global_scale: Range = (0.3, 1.0),
    local_scale: Range = (0.05, 0.3),
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return MSN's 2 random views (target and anchor) and 10 focal views.

    Crops 0.3..1 at 224 and 0.05..0.3 at 96, flip 0.5, jitter (0.4, 0.4, 0.4, 0.1) at 0.8 (strength 0.5), grayscale
    0.2, blur 0.5.

    Source: https://arxiv.org/abs/2204.07141 and https://github.com/facebookresearch/msn.
    Difference: a true Gaussian blur, which Pillow approximates with box filters.

    Args:
        size: As in `swav_views`.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        local_size: As in `swav_views`.
        local_views: As in `swav_views`.
        global_scale: As in `swav_views`.
        local_scale: As in `swav_views`.
        **options: See `ViewOptions`.
    """
    check_at_least("local_views", local_views, 0)
    random = ViewSpec(size, global_scale, (0.4, 0.4, 0.4, 0.1), blur_p=0.5)
    focal = replace(random, size=local_size_of(size, local_size), scale=local_scale)
    return make_policy([random] * 2 + [focal] * local_views, mean=mean, std=std, **options)


def lejepa_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    local_size: Size | None = None,
    global_views: int = 2,
    local_views: int = 6,
    global_scale: Range = (0.3, 1.0),
    local_scale: Range = (0.05, 0.3),
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return LeJEPA's multi-crop: 2 global and 6 local views, which differ in the crop only.

    Crops 0.3..1 at 224 and 0.05..0.3 at 96 (98 for patches of 14; bicubic), flip 0.5, jitter (0.4, 0.4, 0.2, 0.1) at
    0.8, grayscale 0.2, blur 0.5 with a kernel of 9, solarization 0.2.

    Source: https://arxiv.org/abs/2511.08544 and https://github.com/rbalestr-lab/lejepa (its README; resampling and
    kernel are those of VISReg, the only program that has the views).

    Args:
        size: As in `swav_views`.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        local_size: As in `swav_views`.
        global_views: Number of global views, >= 2.
        local_views: As in `swav_views`.
        global_scale: As in `swav_views`.
        local_scale: As in `swav_views`.
        **options: See `ViewOptions`.
    """
    check_at_least("global_views", global_views, 2)
    check_at_least("local_views", local_views, 0)
    large = ViewSpec(size, global_scale, _DINO_JITTER, blur_p=0.5, solarize_p=0.2, blur_kernel=9, bicubic=True)
    small = replace(large, size=local_size_of(size, local_size), scale=local_scale)
    return make_policy([large] * global_views + [small] * local_views, mean=mean, std=std, **options)


def visreg_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    local_size: Size | None = None,
    global_views: int = 4,
    local_views: int = 6,
    global_scale: Range = (0.3, 1.0),
    local_scale: Range = (0.05, 0.3),
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return VISReg's multi-crop: `lejepa_views` with 4 global and 6 local views.

    Source: https://arxiv.org/abs/2606.02572 and https://github.com/HaiyuWu/visreg (``multicrop.py``).
    Difference: solarization is applied with its probability of 0.2; the reference implementation halves it once more.

    Args:
        size: As in `swav_views`.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        local_size: As in `swav_views`.
        global_views: As in `lejepa_views`.
        local_views: As in `swav_views`.
        global_scale: As in `swav_views`.
        local_scale: As in `swav_views`.
        **options: See `ViewOptions`.
    """
    return lejepa_views(
        size,
        mean=mean,
        std=std,
        local_size=local_size,
        global_views=global_views,
        local_views=local_views,
        global_scale=global_scale,
        local_scale=local_scale,
        **options,
    )

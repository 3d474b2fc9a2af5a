"""Published policies with two views of one size, to which local views can be added."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack, cast

from lightning_contrast._checks import check_at_least, check_not_negative, check_probability
from lightning_contrast.augment.images import Size, check_size
from lightning_contrast.augment.multi_crop import local_size_of
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewOptions, ViewSpec, odd_tenth

Statistics = Sequence[float] | None


class TwoViewOptions(ViewOptions, total=False):
    """Keyword arguments of the policies of this module: `ViewOptions`, and local views after the two published ones.

    SimCLR, MoCo, BYOL, SimSiam, NNCLR, SupCon, Barlow Twins, VICReg, MMCR and W-MSE take local views. Their colors are
    those of the first view with a blur at 0.5 at most and no solarization, as DINO has them; no paper of these methods
    has any.

    Attributes:
        local_views: Number of local views, >= 0; 0 by default.
        local_size: Edge of the local views in pixels; None scales 96 at 224 in proportion, to a multiple of 4. At the
            size of the global views, which are told apart by it, they count as global ones.
        local_scale: Range of a local crop's share of the image area; SwAV's (0.05, 0.14) by default.
    """

    local_views: int
    local_size: Size | None
    local_scale: tuple[float, float]


_SIMCLR_JITTER = (0.8, 0.8, 0.8, 0.2)
_WEAK_JITTER = (0.4, 0.4, 0.4, 0.1)
_BYOL_JITTER = (0.4, 0.4, 0.2, 0.1)


def _with_local_views(
    first: ViewSpec, second: ViewSpec, mean: Statistics, std: Statistics, options: TwoViewOptions
) -> ViewPolicy:
    """Return the policy of two views and the local views of the options."""
    count, size = options.get("local_views", 0), local_size_of(first.size, options.get("local_size"))
    check_at_least("local_views", count, 0)
    kernel = None if first.blur_kernel is None else odd_tenth(size)
    scale = options.get("local_scale", (0.05, 0.14))
    blur = min(first.blur_p, 0.5)
    local = replace(first, size=size, scale=scale, blur_p=blur, blur_kernel=kernel, solarize_p=0.0)
    of_views = TwoViewOptions.__annotations__.keys() - ViewOptions.__annotations__.keys()
    others = cast("ViewOptions", {key: value for key, value in options.items() if key not in of_views})
    return make_policy([first, second] + [local] * count, mean=mean, std=std, **others)


def simclr_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    strength: float = 1.0,
    blur: float = 0.5,
    **options: Unpack[TwoViewOptions],
) -> ViewPolicy:
    """Return SimCLR's two views for ImageNet.

    Crop 0.08..1 (bicubic), flip 0.5, jitter (0.8, 0.8, 0.8, 0.2) x ``strength`` at 0.8, grayscale 0.2, blur. As in the
    reference implementation, the blur's kernel is a tenth of the size, made odd: 23 pixels at 224, 3 at 32.

    Source: https://arxiv.org/abs/2002.05709 and https://github.com/google-research/simclr (``data_util.py``, v2).
    Differences: crops are bounded by their share of the area only, without the reference implementation's minimum
    overlap with the image; brightness is multiplied, as in version 2 (version 1 adds it).

    Args:
        size: Edge of the views in pixels, or height and width, >= 1; may exceed that of the images.
        mean: One number per channel, subtracted at the end; None leaves the views in 0..1, as SimCLR does.
        std: One number per channel, divided by at the end.
        strength: Factor of the jitter's strengths, 0..2.5 (at which the hue reaches 0.5).
        blur: Probability of the blur.
        **options: See `TwoViewOptions`.
    """
    check_size(size)
    check_not_negative("strength", strength)
    check_probability("blur", blur)
    brightness, contrast, saturation, hue = (strength * value for value in _SIMCLR_JITTER)
    spec = ViewSpec(
        size,
        (0.08, 1.0),
        (brightness, contrast, saturation, hue),
        blur_p=blur,
        blur_kernel=odd_tenth(size),
        bicubic=True,
    )
    return _with_local_views(spec, spec, mean, std, options)


def simclr_cifar_views(
    size: Size = 32, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return SimCLR's two views for CIFAR: half the color strength, no blur.

    Crop 0.08..1 (bicubic), flip 0.5, jitter (0.4, 0.4, 0.4, 0.1) at 0.8, grayscale 0.2.

    Source: https://arxiv.org/abs/2002.05709, appendix B.9.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: As in `simclr_views`.
        std: As in `simclr_views`.
        **options: See `TwoViewOptions`.
    """
    return simclr_views(size, mean=mean, std=std, strength=0.5, blur=0.0, **options)


def moco_v1_views(
    size: Size = 224, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return the two views of NPID and MoCo v1.

    Crop 0.2..1, grayscale 0.2 before the jitter (0.4, 0.4, 0.4, 0.4) at 1, flip 0.5, no blur.

    Source: https://arxiv.org/abs/1911.05722 and https://github.com/facebookresearch/moco (``main_moco.py``).

    Args:
        size: Edge of the views in pixels, or height and width, >= 1; may exceed that of the images.
        mean: One number per channel, subtracted at the end; None leaves the views in 0..1. The paper uses ImageNet's.
        std: One number per channel, divided by at the end.
        **options: See `TwoViewOptions`.
    """
    spec = ViewSpec(size, (0.2, 1.0), (0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True)
    return _with_local_views(spec, spec, mean, std, options)


def moco_v2_views(
    size: Size = 224, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return the two views of MoCo v2.

    Crop 0.2..1, jitter (0.4, 0.4, 0.4, 0.1) at 0.8, grayscale 0.2, blur 0.5, flip 0.5.

    Source: https://arxiv.org/abs/2003.04297 and https://github.com/facebookresearch/moco (``--aug-plus``).
    Difference: a true Gaussian blur, which Pillow approximates with box filters.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`.
    """
    spec = ViewSpec(size, (0.2, 1.0), _WEAK_JITTER, blur_p=0.5)
    return _with_local_views(spec, spec, mean, std, options)


def moco_v3_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    vit: bool = False,
    **options: Unpack[TwoViewOptions],
) -> ViewPolicy:
    """Return MoCo v3's asymmetric pair of views.

    Crop 0.2..1 (ResNet) or 0.08..1 (ViT), jitter (0.4, 0.4, 0.2, 0.1) at 0.8, grayscale 0.2, blur 1 / 0.1,
    solarization 0 / 0.2, flip 0.5.

    Source: https://arxiv.org/abs/2104.02057 and https://github.com/facebookresearch/moco-v3.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        vit: Use the crop range of the ViT models.
        **options: See `TwoViewOptions`.
    """
    first = ViewSpec(size, (0.08 if vit else 0.2, 1.0), _BYOL_JITTER, blur_p=1.0)
    second = replace(first, blur_p=0.1, solarize_p=0.2)
    return _with_local_views(first, second, mean, std, options)


def byol_views(
    size: Size = 224, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return BYOL's asymmetric pair of views.

    Crop 0.08..1 (bicubic), drawn once and clipped to the image; flip 0.5; jitter (0.4, 0.4, 0.2, 0.1) at 0.8 with
    additive brightness; grayscale 0.2; blur 1 / 0.1 with a kernel of a tenth of the size; solarization 0 / 0.2.

    Source: https://arxiv.org/abs/2006.07733 and https://github.com/google-deepmind/deepmind-research (``byol``).
    Difference: with ``fused=False`` brightness is multiplied and boxes that do not fit are redrawn.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`.
    """
    check_size(size)
    first = ViewSpec(
        size,
        (0.08, 1.0),
        _BYOL_JITTER,
        blur_p=1.0,
        blur_kernel=odd_tenth(size),
        bicubic=True,
        additive_brightness=True,
        clamp=True,
    )
    second = replace(first, blur_p=0.1, solarize_p=0.2)
    return _with_local_views(first, second, mean, std, options)


def barlow_twins_views(
    size: Size = 224, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return Barlow Twins' asymmetric pair of views.

    Crop 0.08..1 (bicubic), flip 0.5, jitter (0.4, 0.4, 0.2, 0.1) at 0.8, grayscale 0.2, blur 1 / 0.1, solarization
    0 / 0.2.

    Source: https://arxiv.org/abs/2103.03230 and https://github.com/facebookresearch/barlowtwins.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`.
    """
    first = ViewSpec(size, (0.08, 1.0), _BYOL_JITTER, blur_p=1.0, bicubic=True)
    second = replace(first, blur_p=0.1, solarize_p=0.2)
    return _with_local_views(first, second, mean, std, options)


def vicreg_views(
    size: Size = 224, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return VICReg's two views, which equal those of Barlow Twins.

    Source: https://arxiv.org/abs/2105.04906 and https://github.com/facebookresearch/vicreg.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`.
    """
    return barlow_twins_views(size, mean=mean, std=std, **options)


def vicregl_views(
    size: Size = 224, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return VICRegL's views of a ResNet-50, which are VICReg's and remember their places in the image.

    Source: https://arxiv.org/abs/2210.01571 and https://github.com/facebookresearch/VICRegL. Its ConvNeXts have crops
    0.4..1 and six local views 0.08..0.4.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`; ``locations`` is True by default.
    """
    options.setdefault("locations", True)
    return vicreg_views(size, mean=mean, std=std, **options)


def simsiam_views(
    size: Size = 224, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return SimSiam's two views, which equal those of MoCo v2.

    Source: https://arxiv.org/abs/2011.10566 and https://github.com/facebookresearch/simsiam.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`.
    """
    return moco_v2_views(size, mean=mean, std=std, **options)


def align_uniform_views(
    size: Size = 64, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return the two views of alignment and uniformity on STL-10.

    Crop 0.08..1, flip 0.5, jitter (0.4, 0.4, 0.4, 0.4) at 1, grayscale 0.2, no blur.

    Source: https://arxiv.org/abs/2005.10242 and https://github.com/SsnL/align_uniform (its STL-10 example).

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`.
    """
    spec = ViewSpec(size, (0.08, 1.0), (0.4, 0.4, 0.4, 0.4), jitter_p=1.0)
    return _with_local_views(spec, spec, mean, std, options)


def supcon_views(
    size: Size = 32, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return the two views of supervised contrastive learning on CIFAR.

    Crop 0.2..1, flip 0.5, jitter (0.4, 0.4, 0.4, 0.1) at 0.8, grayscale 0.2, no blur.

    Source: https://arxiv.org/abs/2004.11362 and https://github.com/HobbitLong/SupContrast.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`.
    """
    spec = ViewSpec(size, (0.2, 1.0), _WEAK_JITTER)
    return _with_local_views(spec, spec, mean, std, options)


def wmse_views(
    size: Size = 224, *, mean: Statistics = None, std: Statistics = None, **options: Unpack[TwoViewOptions]
) -> ViewPolicy:
    """Return the two views of W-MSE.

    Crop 0.2..1 (bicubic), flip 0.5, jitter (0.4, 0.4, 0.4, 0.1) at 0.8, grayscale 0.1, no blur.

    Source: https://arxiv.org/abs/2007.06346 and https://github.com/htdt/self-supervised.
    Difference: the reference implementation crops after the color operations, whose contrast then is that of the whole
    image.

    Args:
        size: As in `moco_v1_views`.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        **options: See `TwoViewOptions`.
    """
    spec = ViewSpec(size, (0.2, 1.0), _WEAK_JITTER, gray_p=0.1, bicubic=True)
    return _with_local_views(spec, spec, mean, std, options)

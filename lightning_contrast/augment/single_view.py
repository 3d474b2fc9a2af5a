"""Published policies with a single view of each image."""

from collections.abc import Sequence
from typing import Unpack

from lightning_contrast.augment.images import Size
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewOptions, ViewSpec

Statistics = Sequence[float] | None
Range = tuple[float, float]


def ijepa_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    scale: Range = (0.3, 1.0),
    flip: float = 0.0,
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return I-JEPA's single view, a crop without further augmentation.

    Crop 0.3..1 at 224, no flip, no color operations, no blur.

    Source: https://arxiv.org/abs/2301.08243 and https://github.com/facebookresearch/ijepa.

    Args:
        size: Edge of the view in pixels, or height and width, >= 1.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        scale: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, in [0, 1].
        **options: See `ViewOptions`.
    """
    return make_policy([ViewSpec(size, scale, jitter_p=0.0, gray_p=0.0, flip=flip)], mean=mean, std=std, **options)


def mae_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    scale: Range = (0.2, 1.0),
    flip: float = 0.5,
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return MAE's single view, a crop with a flip.

    Crop 0.2..1 (bicubic) at 224, flip 0.5, no color operations, no blur. SimMIM crops 0.67..1.

    Source: https://arxiv.org/abs/2111.06377 and https://github.com/facebookresearch/mae.

    Args:
        size: Edge of the view in pixels, or height and width, >= 1.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        scale: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, in [0, 1].
        **options: See `ViewOptions`.
    """
    spec = ViewSpec(size, scale, jitter_p=0.0, gray_p=0.0, flip=flip, bicubic=True)
    return make_policy([spec], mean=mean, std=std, **options)


def simmim_views(
    size: Size = 192,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    scale: Range = (0.67, 1.0),
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return SimMIM's single view, a large crop with a flip.

    Crop 0.67..1 at 192 for Swin or 224 for ViT, flip 0.5, no color operations, no blur.

    Source: https://arxiv.org/abs/2111.09886 and https://github.com/microsoft/SimMIM.

    Args:
        size: Edge of the view in pixels, or height and width, >= 1.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        scale: Range of the crop's share of the image area.
        **options: See `ViewOptions`.
    """
    return make_policy([ViewSpec(size, scale, jitter_p=0.0, gray_p=0.0)], mean=mean, std=std, **options)


def data2vec_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    scale: Range = (0.08, 1.0),
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return data2vec's single view, which student and teacher share.

    Crop 0.08..1 (bicubic) at 224, flip 0.5, jitter (0.4, 0.4, 0.4, 0) at 1, no grayscale, no blur.

    Source: https://arxiv.org/abs/2202.03555 and https://github.com/facebookresearch/data2vec_vision.

    Args:
        size: Edge of the view in pixels, or height and width, >= 1.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        scale: Range of the crop's share of the image area.
        **options: See `ViewOptions`.
    """
    spec = ViewSpec(size, scale, (0.4, 0.4, 0.4, 0.0), jitter_p=1.0, gray_p=0.0, bicubic=True)
    return make_policy([spec], mean=mean, std=std, **options)


def image_text_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    scale: Range = (0.9, 1.0),
    flip: float = 0.0,
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return the single view of CLIP's images, a large crop.

    Crop 0.9..1 (bicubic) at 224, no flip, which would contradict captions with left and right, no color operations.

    Source: https://arxiv.org/abs/2103.00020 and https://github.com/mlfoundations/open_clip (``transform.py``). SigLIP's
    images are resized only, its range -1..1 is ``mean=std=(0.5, 0.5, 0.5)``.

    Args:
        size: Edge of the view in pixels, or height and width, >= 1.
        mean: As in `swav_views`; CLIP has (0.4815, 0.4578, 0.4082).
        std: As in `swav_views`; CLIP has (0.2686, 0.2613, 0.2758).
        scale: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, in [0, 1].
        **options: See `ViewOptions`.
    """
    spec = ViewSpec(size, scale, jitter_p=0.0, gray_p=0.0, flip=flip, bicubic=True)
    return make_policy([spec], mean=mean, std=std, **options)


def gloria_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    scale: Range = (0.7, 0.77),
    flip: float = 0.0,
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return the single view of GLoRIA's images, a crop whose aspect changes little.

    Crop 0.7..0.77 (bicubic) at 224, about the published 224 of 256 pixels, no flip, which would swap the sides that a
    report names, no color operations.

    Source: https://doi.org/10.1109/ICCV48922.2021.00391 and https://github.com/marshuang80/gloria.

    Args:
        size: Edge of the view in pixels, or height and width, >= 1.
        mean: As in `swav_views`; GLoRIA has 0.5 for each channel.
        std: As in `swav_views`; GLoRIA has 0.5 for each channel.
        scale: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, in [0, 1].
        **options: See `ViewOptions`.
    """
    return image_text_views(size, mean=mean, std=std, scale=scale, flip=flip, **options)


def cpc_views(
    size: Size = 256,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    scale: Range = (0.73, 1.0),
    flip: float = 0.5,
    **options: Unpack[ViewOptions],
) -> ViewPolicy:
    """Return the single view of CPC, which is cut into patches.

    Crop 0.73..1 at 256, flip 0.5, jitter (0.4, 0.4, 0.4, 0.2) at 0.8, grayscale 0.25, no blur. The crop is v1's 256 of
    300 pixels, the colors are lightning-bolts'; both change the whole image, which v2 would change patch by patch
    (``drop_channels`` of `CPC` does).

    Source: https://arxiv.org/abs/1807.03748 and https://github.com/Lightning-Universe/lightning-bolts.

    Args:
        size: Edge of the view in pixels, or height and width, >= 1.
        mean: As in `swav_views`.
        std: As in `swav_views`.
        scale: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, in [0, 1].
        **options: See `ViewOptions`.
    """
    view = ViewSpec(size, scale, (0.4, 0.4, 0.4, 0.2), gray_p=0.25, flip=flip)
    return make_policy([view], mean=mean, std=std, **options)

"""Views of stained tissue."""

from collections.abc import Sequence
from typing import Unpack

from lightning_contrast._checks import require
from lightning_contrast.augment.domains.options import DomainOptions
from lightning_contrast.augment.images import Size, check_size
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec

Statistics = Sequence[float] | None
Range = tuple[float, float]


def histology_views(
    size: Size = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    crop: Range = (0.4, 1.0),
    stain_scale: float = 0.1,
    stain_shift: float = 0.01,
    stain_p: float = 0.8,
    **options: Unpack[DomainOptions],
) -> ViewPolicy:
    """Return two views of a tile of stained tissue, in any orientation and with other amounts of stain.

    Crop 0.4..1, as the size of nuclei is a label; both flips 0.5 and quarter turns, as tissue has no upper side; stain
    jitter by U(0.9, 1.1) and U(-0.01, 0.01) at 0.8; brightness and contrast 0.1 at 0.5; blur 0.25 with a kernel of 3
    pixels; no hue, saturation, grayscale or solarization, which make colors that no stain has.

    Source: stain jitter of https://arxiv.org/abs/1808.05896 (Tellez et al.); vertical flips and weaker colors of
    https://arxiv.org/abs/2212.04690 (Kang et al.); brightness, contrast and blur of the baseline of
    https://arxiv.org/abs/2107.12357 (HistAuGAN). Differences: the strengths of the stain jitter, as the published ones
    belong to units of the densities that `rgb_to_hed` does not have; the crop, which no paper states so.

    Args:
        size: Edge of the views in pixels, or height and width, >= 1.
        mean: As in `moco_v1_views`.
        std: As in `moco_v1_views`.
        crop: Range of the crop's share of the tile's area.
        stain_scale: Strength of the factor of each stain, in 0..1.
        stain_shift: Largest amount of stain added or removed, >= 0; 0.01 changes a tile by 8 of 255 levels on average.
        stain_p: Probability of the stain jitter per view.
        **options: See `DomainOptions`; ``channels`` must be 3.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from lightning_contrast.augment.fused import FusedStainJitter

    check_size(size)
    channels = options.get("channels", 3)
    require(channels == 3, "channels", "be 3 for stains", channels, "Give RGB tiles")
    spec = ViewSpec(
        size,
        crop,
        (0.1, 0.1, 0.0, 0.0),
        jitter_p=0.5,
        gray_p=0.0,
        blur_p=0.25,
        blur_kernel=3,
        vertical_flip=0.5,
        quarter_turns=True,
        first_operations=(FusedStainJitter(stain_scale, stain_shift, p=stain_p),),
    )
    return make_policy([spec, spec], mean=mean, std=std, **options)

"""The hue shift of HSV without a round trip: exact, and a handful of passes over the pixels."""

import torch
from torch import Tensor

_CENTRES = (1 / 2, 1 / 3, 2 / 3)  # in turns: red is least around the first, green and blue most around the others


def shift_hue_(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of RGB images in HSV in place, value and saturation kept.

    Equals ``torchvision.transforms.functional.adjust_hue`` on float images, up to rounding. With V the maximum, m the
    minimum and C = V - m, the hue in sixths of a turn is ``1 + (g + b - r - m) / C`` with the sign of ``g - b``. With
    the shifted hue h in 0..1 turns each channel is a ramp between V and m in the distance of h from its centre,
    ``clamp(6 |h - centre| - 1, 0, 1)``: no tables of sectors and no branches.

    Args:
        images: RGB in 0..1, ``(B, 3, H, W)``; overwritten.
        turns: Shift of each image in turns, ``(B,)``, -0.5..0.5.

    Returns:
        ``images``.
    """
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    ramp = torch.empty_like(images)
    spare, difference = ramp[:, 0], ramp[:, 1]  # until the ramps are made
    value = torch.maximum(red, green)
    torch.maximum(value, blue, out=value)
    least = torch.minimum(red, green)
    torch.minimum(least, blue, out=least)
    chroma = value - least
    hue = torch.sub(green, red).add_(blue).sub_(least)
    # in turns; where chroma is 0 the hue is of no effect, but must be finite
    torch.mul(chroma, 6, out=spare).add_(torch.finfo(images.dtype).tiny)
    hue.div_(spare).add_(1 / 6)
    torch.copysign(hue, torch.sub(green, blue, out=difference), out=hue)
    hue.add_(turns[:, None, None] + 1).frac_()
    for channel, centre in enumerate(_CENTRES):
        torch.sub(hue, centre, out=ramp[:, channel])
    ramp.abs_().mul_(6).sub_(1).clamp_(0, 1)
    torch.addcmul(least, chroma, ramp[:, 0], out=red)
    torch.addcmul(value[:, None], chroma[:, None], ramp[:, 1:], value=-1, out=images[:, 1:])
    return images

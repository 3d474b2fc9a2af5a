"""The hue shift of HSV without a round trip: exact, and a handful of passes over the pixels."""

import torch
from torch import Tensor

# Channel c is V - C * clamp(2 - |wrap(n - 2 + 6 h)|, 0, 1) with n = 5, 3, 1; here (n - 2) / 6, in turns.
_OFFSETS = (3 / 6, 1 / 6, -1 / 6)


def shift_hue_(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of RGB images in HSV in place, value and saturation kept.

    Equals ``torchvision.transforms.functional.adjust_hue`` on float images, up to rounding. With V the maximum, m the
    minimum and C = V - m, the hue in sixths of a turn is ``1 + (g + b - r - m) / C`` with the sign of ``g - b``, and
    each channel of the result is a triangle wave of the hue: no tables of sectors and no branches.

    Args:
        images: RGB in 0..1, ``(B, 3, H, W)``; overwritten.
        turns: Shift of each image in turns, ``(B,)``, -0.5..0.5.

    Returns:
        ``images``.
    """
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    value = torch.maximum(red, green)
    torch.maximum(value, blue, out=value)
    least = torch.minimum(red, green)
    torch.minimum(least, blue, out=least)
    chroma = value - least
    hue = torch.sub(green, red)
    hue.add_(blue).sub_(least)
    # where chroma is 0 the hue is of no effect, but must be finite
    hue.div_(chroma.clamp(min=torch.finfo(images.dtype).eps)).add_(1)
    torch.copysign(hue, green - blue, out=hue)
    hue.mul_(1 / 6).add_(turns[:, None, None])
    wave = torch.empty_like(images)
    for channel, offset in enumerate(_OFFSETS):
        torch.add(hue, offset, out=wave[:, channel])
    wave.sub_(wave.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], chroma[:, None], wave, value=-1, out=images)

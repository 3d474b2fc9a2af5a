"""Keyword arguments shared by the policies of this package."""

from lightning_contrast.augment.images import PixelRange
from lightning_contrast.augment.view_spec import ViewOptions


class DomainOptions(ViewOptions, total=False):
    """`ViewOptions`, and the range of the pixels.

    Attributes:
        scale: The values of the images that become 0 and 1, such as ``(0, 65535)``; values outside are clipped. Needed
            for integers of more than 8 bits and for floats on another scale. None for uint8 in 0..255 or float in 0..1.
    """

    scale: PixelRange

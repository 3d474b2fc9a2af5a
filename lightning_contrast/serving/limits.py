"""Limits of what a service accepts."""

from dataclasses import dataclass, fields

from lightning_contrast._checks import check_at_least, check_positive

MAX_PIXELS = 25_000_000
"""Largest number of pixels of an image by default; its conversion to float takes 12 bytes for each."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of what a service accepts from a request.

    Args:
        max_bytes: Largest image file, in bytes.
        max_body: Largest body of a request, in bytes.
        max_pixels: Largest image, in pixels, as its header declares it and after it was resized for the model.
        max_images: Largest number of images of a request.
        max_texts: Largest number of texts of a request.
        max_characters: Longest text, in characters.
        seconds: Time for a body to arrive, and again for the answer to be computed.
        max_waiting: Images that may be decoded or wait for the model at a time, or ``max_images`` if these are more,
            and as many texts, or ``max_texts``; further requests get status 503.

    Raises:
        ValueError: If a limit is not above 0.
        TypeError: If a number is not whole.
    """

    max_bytes: int = 10 * 2**20
    max_body: int = 32 * 2**20
    max_pixels: int = MAX_PIXELS
    max_images: int = 32
    max_texts: int = 256
    max_characters: int = 2000
    seconds: float = 20.0
    max_waiting: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "seconds":
                check_at_least(field.name, getattr(self, field.name), 1)
        check_positive("seconds", self.seconds)

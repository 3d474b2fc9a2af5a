"""Random changes of the bands of multispectral images, and their index channels."""

from collections.abc import Sequence

import numpy as np
import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, check_probability, require
from lightning_contrast.augment.bands import Pairs, append_indices
from lightning_contrast.augment.fused.base import (
    Backend,
    Draw,
    FusedOperation,
    Plan,
    is_empty,
    put_,
    rows_where,
    take,
    uniform,
)


def _check_bands(images: Tensor, channels: int) -> None:
    hint = f"Give images with {channels} bands, or make the operation for those of the images"
    require(images.shape[1] == channels, "images", f"have {channels} bands", images.shape[1], hint)


class FusedBandIndex(FusedOperation, IntensityAugmentationBase2D):
    """Append index channels; see `append_indices`. Nothing is drawn.

    Args:
        indices: Pairs of bands, counted from 0.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1; result ``(B, C + I, H, W)`` for I pairs.
    """

    def __init__(self, indices: Pairs, *, backend: Backend = None, keepdim: bool = False) -> None:
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.indices, self.backend = tuple(indices), backend
        self.flags = {"indices": self.indices}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw nothing: ``row`` ``(B,)`` only counts the images."""
        return {"row": np.arange(batch)}

    def prepare(self, draw: Draw) -> Plan:
        """Return nothing: the bands are known."""
        return {}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Return images ``(B, C + I, H, W)`` of ``images`` ``(B, C, H, W)``."""
        return append_indices(images, self.indices)


class FusedBandSwap(FusedOperation, IntensityAugmentationBase2D):
    """Exchange two bands, drawn per image from the first ``channels``, with probability ``p`` per image.

    Kornia's ``RandomChannelShuffle`` permutes all of them.

    Args:
        channels: Number of bands to draw from, >= 2; further channels stay.
        p: Probability per image.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)``, C at least ``channels``.
    """

    def __init__(self, channels: int, p: float = 0.1, *, backend: Backend = None, keepdim: bool = False) -> None:
        check_at_least("channels", channels, 2)
        check_probability("p", p)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.channels, self.probability, self.backend = channels, p, backend
        self.flags = {"probability": p}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``swapped`` ``(B,)`` and ``pair`` ``(B, 2)``, two different bands."""
        numbers = uniform(batch, 1 + self.channels)
        return {"swapped": numbers[:, 0] < self.chance, "pair": numbers[:, 1:].argsort(axis=1)[:, :2]}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change and where each of their bands comes from, ``(n, channels, 1, 1)``."""
        pair = draw["pair"][draw["swapped"]]
        source = np.tile(np.arange(self.channels), (len(pair), 1))
        np.put_along_axis(source, pair, pair[:, ::-1], axis=1)
        return {"rows": rows_where(draw["swapped"]), "source": source[:, :, None, None]}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Exchange bands of rows of ``images`` ``(B, C, H, W)`` in place."""
        enough = images.shape[1] >= self.channels
        require(enough, "images", f"have {self.channels} bands", images.shape[1], "Make the operation for fewer")
        if not is_empty(plan["rows"]):
            bands = images[:, : self.channels]
            put_(bands, plan["rows"], torch.take_along_dim(take(bands, plan["rows"]), plan["source"], dim=1))
        return images


class FusedBandDropout(FusedOperation, IntensityAugmentationBase2D):
    """Replace some bands by a constant, with probability ``p`` per image.

    The number of bands is uniform in 1..``most``, but at least ``keep`` bands stay. Kornia's ``RandomChannelDropout``
    drops a fixed number and has one constant for all bands.

    Args:
        channels: Number of bands, above ``keep``.
        p: Probability per image.
        most: Largest number of bands to drop, >= 1.
        keep: Number of bands that always stay, >= 1.
        fill: Value of a dropped band, one number per band; its mean makes it 0 after the normalization. None for 0.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)``.
    """

    def __init__(
        self,
        channels: int,
        p: float = 0.5,
        *,
        most: int = 6,
        keep: int = 3,
        fill: Sequence[float] | None = None,
        backend: Backend = None,
        keepdim: bool = False,
    ) -> None:
        check_at_least("keep", keep, 1)
        check_at_least("channels", channels, keep + 1, f"Dropout keeps {keep} bands: lower `keep`, or leave it out")
        check_at_least("most", most, 1)
        check_probability("p", p)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        fill = [0.0] * channels if fill is None else list(fill)
        require(len(fill) == channels, "fill", "have one number per band", tuple(fill), f"Give {channels} numbers")
        super().__init__(p=1.0, keepdim=keepdim)
        self.channels, self.probability, self.most, self.keep = channels, p, min(most, channels - keep), keep
        self.fill, self.backend = fill, backend
        self.flags = {"probability": p, "most": most, "keep": keep}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``dropped`` ``(B, C)``, the bands to replace."""
        numbers = uniform(batch, 2 + self.channels)
        count = 1 + np.minimum(np.floor(numbers[:, 1] * self.most), self.most - 1)
        count *= numbers[:, 0] < self.chance
        rank = numbers[:, 2:].argsort(axis=1).argsort(axis=1)
        return {"dropped": rank < count[:, None]}

    def prepare(self, draw: Draw) -> Plan:
        """Return the rows to change, their bands ``(n, C, 1, 1)`` and the constants ``(1, C, 1, 1)``."""
        chosen = np.any(draw["dropped"], axis=1, keepdims=True)[:, 0]
        fill = np.array(self.fill, np.float32)[None, :, None, None]
        return {"rows": rows_where(chosen), "bands": draw["dropped"][chosen][:, :, None, None], "fill": fill}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Replace bands of rows of ``images`` ``(B, C, H, W)`` in place."""
        _check_bands(images, self.channels)
        if not is_empty(plan["rows"]):
            chosen = take(images, plan["rows"])
            put_(images, plan["rows"], torch.where(plan["bands"], plan["fill"].to(images.dtype), chosen))
        return images


class FusedBandGain(FusedOperation, IntensityAugmentationBase2D):
    """Multiply each band by its own factor from U(1 - gain, 1 + gain), drawn per image, and clip to 0..1.

    Args:
        channels: Number of bands.
        gain: Strength of the factor, in 0..1.
        backend: See `Backend`.
        keepdim: Return as many dimensions as the input has (an argument of Kornia).

    Shapes: ``(B, C, H, W)`` in 0..1.
    """

    def __init__(self, channels: int, gain: float = 0.2, *, backend: Backend = None, keepdim: bool = False) -> None:
        check_at_least("channels", channels, 1)
        check_probability("gain", gain)
        check_choice("backend", backend, (None, "cpu", "accelerator"))
        super().__init__(p=1.0, keepdim=keepdim)
        self.channels, self.gain, self.backend = channels, gain, backend
        self.flags = {"gain": gain}

    def draw(self, batch: int, height: int, width: int) -> Draw:
        """Draw ``factor`` ``(B, C)``."""
        return {"factor": 1 + np.float32(self.gain * self.share) * (2 * uniform(batch, self.channels) - 1)}

    def prepare(self, draw: Draw) -> Plan:
        """Return the factors as ``(B, C, 1, 1)``."""
        return {"factor": draw["factor"][:, :, None, None]}

    def compute_(self, images: Tensor, plan: Plan) -> Tensor:
        """Multiply ``images`` ``(B, C, H, W)`` in place."""
        _check_bands(images, self.channels)
        return images.mul_(plan["factor"].to(images.dtype)).clamp_(0, 1)

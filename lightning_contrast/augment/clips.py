"""Views of clips: temporal crops, and augmentation that is the same for all frames of a clip."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.augment.fused.base import Backend, to_device, uniform
from lightning_contrast.augment.fused.view import FusedView
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec, odd_tenth
from lightning_contrast.precision import full_precision

Statistics = Sequence[float] | None


def clip_distance(numbers: NDArray[np.floating[Any]], starts: int) -> NDArray[np.int64]:
    """Return distances between the starts of two clips, whose density falls linearly to 0, as in CVRL.

    Inverts F(k) = 2k/M - k^2/M^2 and rounds down: M (1 - sqrt(1 - u)). The mean is about M / 3.

    Args:
        numbers: u, uniform in [0, 1), any shape.
        starts: M, number of places where a clip can start, >= 1.

    Returns:
        Distances in frames, in 0..M-1, of the same shape.

    Example:
        >>> clip_distance(np.array([0.1, 0.25, 0.5, 0.75, 0.9]), 100)
        array([ 5, 13, 29, 50, 68])
    """
    check_at_least("starts", starts, 1)
    distances = np.floor(starts * (1 - np.sqrt(1 - numbers.astype(np.float64)))).astype(np.int64)
    return cast("NDArray[np.int64]", np.minimum(distances, starts - 1))


class ClipPolicy(ViewPolicy):
    """Map clips to a list of random shorter clips, on the device of the clips; made by `clip_views`.

    Args:
        images: Policy of two image views, the first and the second augmentation; of one for a single global clip.
        frames: T, frames of each clip.
        stride: Distance of the frames of a global clip.
        local_clips: J, number of local clips of consecutive frames per augmentation; 0 for none.
        consistent: Whether all frames of a clip share a draw.
    """

    def __init__(self, images: ViewPolicy, *, frames: int, stride: int, local_clips: int, consistent: bool) -> None:
        super().__init__(
            list(images.views),
            size=images.size,
            channels=images.channels,
            mean=images.mean,
            std=images.std,
            interpolation=images.interpolation,
        )
        self.frames, self.stride, self.local_clips, self.consistent = frames, stride, local_clips, consistent

    @property
    def span(self) -> int:
        """The number of frames that a clip needs: those of a global clip, or of all local clips one after another."""
        return max((self.frames - 1) * self.stride + 1, self.frames * self.stride if self.local_clips else 0)

    @torch.no_grad()
    @full_precision
    def forward(self, clips: Tensor) -> list[Tensor]:
        """Return the views of clips.

        All random numbers come from torch's global CPU generator.

        Args:
            clips: ``(B, F, C, H, W)``, uint8 in 0..255 or float in 0..1.

        Returns:
            Views ``(B, T, C, size, size)``, float32: two global clips, then the J local clips of the first augmentation
            in temporal order, then those of the second; one global clip if there is one augmentation.

        Raises:
            ValueError: If the shape is another one, or the clips have fewer frames than a view needs.
        """
        self._check(clips)
        length = clips.shape[1]
        if len(self.views) == 1:
            return [self._view(clips, self._starts(clips), self.stride, 0)]
        if self.local_clips == 0:
            numbers = uniform(len(clips), 3).astype(np.float64)
            starts = length - self.span + 1
            distance = clip_distance(numbers[:, 0], starts)  # (B,)
            first = np.floor(numbers[:, 1] * (starts - distance)).astype(np.int64)
            later = numbers[:, 2] < 0.5
            pair = first + np.where(later, distance, 0), first + np.where(later, 0, distance)
            return [self._view(clips, start, self.stride, which) for which, start in enumerate(pair)]
        start = self._starts(clips)
        views = [self._view(clips, start, self.stride, which) for which in (0, 1)]
        step = self.frames * self.stride / self.local_clips
        for which in (0, 1):
            views += [self._view(clips, start + int(j * step), 1, which) for j in range(self.local_clips)]
        return views

    @torch.no_grad()
    @full_precision
    def eval_transform(self, clips: Tensor) -> Tensor:
        """Return the middle clip with the stride of training, each frame resized, cropped and normalized.

        Args:
            clips: As for `forward`.

        Returns:
            ``(B, T, C, size, size)``, float32.
        """
        self._check(clips)
        start = np.full(len(clips), (clips.shape[1] - self.span) // 2)
        frames = self._frames(clips, start, self.stride)
        return torch.unflatten(super().eval_transform(frames), 0, (-1, self.frames))

    def _starts(self, clips: Tensor) -> NDArray[np.int64]:
        """Return the first frames ``(B,)`` of windows of `span` frames, drawn uniformly."""
        places = clips.shape[1] - self.span + 1
        return np.floor(uniform(len(clips), 1)[:, 0].astype(np.float64) * places).astype(np.int64)

    def _check(self, clips: object) -> None:
        if not isinstance(clips, Tensor) or clips.ndim != 5:
            got = tuple(clips.shape) if isinstance(clips, Tensor) else type(clips).__name__
            fail("clips", "have the shape (B, T, C, H, W)", got, "Stack the frames of each clip")
        hint = f"Load longer clips, or lower `frames` ({self.frames}) or `stride` ({self.stride})"
        require(clips.shape[1] >= self.span, "clips", f"have at least {self.span} frames", clips.shape[1], hint)

    def _frames(self, clips: Tensor, start: NDArray[np.int64], stride: int) -> Tensor:
        """Return ``frames`` frames of each clip, ``(B * T, C, H, W)``, from its start ``(B,)``."""
        batch, length = clips.shape[:2]
        rows = np.arange(batch)[:, None] * length + start[:, None] + stride * np.arange(self.frames)  # (B, T)
        index = to_device({"rows": rows.reshape(-1)}, clips.device)["rows"]
        return clips.flatten(0, 1).index_select(0, index)

    def _view(self, clips: Tensor, start: NDArray[np.int64], stride: int, which: int) -> Tensor:
        """Return one augmented clip per video, ``(B, T, C, size, size)``."""
        view = cast("FusedView", self.views[which])
        frames = self._frames(clips, start, stride)
        (made,) = view.make_views(frames, 1, frames=self.frames if self.consistent else 1)
        return torch.unflatten(made, 0, (-1, self.frames))


def clip_views(
    size: int = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    frames: int = 16,
    stride: int = 2,
    local_clips: int = 0,
    consistent: bool = True,
    specs: Sequence[ViewSpec] | None = None,
    channels: int = 3,
    color: bool = True,
    backend: Backend = None,
) -> ClipPolicy:
    """Return the views of clips of CVRL, or with ``local_clips`` those of TCLR.

    Without local clips: two clips of ``frames`` frames, ``stride`` apart, whose distance in time is drawn with a
    linearly decreasing density (`clip_distance`), in random order. Crop 0.3..1 with aspect 0.5..2, flip 0.5, jitter
    (0.8, 0.8, 0.8, 0.2) at 0.8, grayscale 0.2, blur 1 / 0.1 with a kernel of a tenth of the size, solarization 0 / 0.2.

    With J local clips: a global clip and J local clips of consecutive frames, which start at equal distances within the
    global clip's span; each is augmented twice: 2 + 2J views (TCLR has 16 frames, stride 4 and J = 4). Crop 0.36..1
    with aspect 1, jitter (0.25, 0.25, 0.25, 0.1) at 0.3, grayscale 0.175, flip 0.5.

    Sources: https://arxiv.org/abs/2008.03800 and https://github.com/tensorflow/models (``video_ssl``);
    https://arxiv.org/abs/2101.07974 and https://github.com/DAVEISHAN/TCLR. Differences: clips that are too short raise
    an error instead of being wrapped round or mirrored; of TCLR, the four color operations are drawn together instead
    of one by one, and gamma, dropped channels and erased boxes are left out.

    Args:
        size: Edge of the views in pixels, >= 1.
        mean: One number per channel, subtracted at the end; None leaves the views in 0..1.
        std: One number per channel, divided by at the end.
        frames: T, frames of each view, >= 1.
        stride: Distance in frames of the frames of a global clip, >= 1.
        local_clips: J, 0 or >= 2; at most ``stride``, so that the local clips lie within the global clip's span.
        consistent: Draw the augmentation once per clip and apply it to all of its frames, as published; False draws it
            for each frame.
        specs: The first and the second augmentation, which replace the published ones; one alone gives one global clip.
        channels: Number of channels of the frames.
        color: Apply saturation, hue and grayscale.
        backend: See `Backend`.

    Raises:
        ValueError: If a number is out of range, or ``specs`` are not two of one size (one or two without local clips).
    """
    check_at_least("size", size, 1)
    check_at_least("frames", frames, 1)
    check_at_least("stride", stride, 1)
    hint = f"Raise `stride` to {local_clips}, or use fewer local clips; TCLR has 4 of each"
    ok = local_clips == 0 or 2 <= local_clips <= stride
    require(ok, "local_clips", f"be 0 or in 2..{stride}, the stride", local_clips, hint)
    if specs is None and local_clips == 0:
        jitter = (0.8, 0.8, 0.8, 0.2)
        first = ViewSpec(size, (0.3, 1.0), jitter, blur_p=1.0, blur_kernel=odd_tenth(size), ratio=(0.5, 2.0))
        specs = [first, replace(first, blur_p=0.1, solarize_p=0.2)]
    elif specs is None:
        jitter = (0.25, 0.25, 0.25, 0.1)
        specs = [ViewSpec(size, (0.36, 1.0), jitter, jitter_p=0.3, gray_p=0.175, ratio=(1.0, 1.0))] * 2
    edges = [spec.size for spec in specs]
    fits = {*edges} == {size} and (len(edges) == 2 or (len(edges) == 1 and local_clips == 0))
    require(fits, "specs", f"be two of size {size}", edges, "Give the two augmentations of a clip")
    images = make_policy(specs, mean=mean, std=std, channels=channels, color=color, backend=backend)
    return ClipPolicy(images, frames=frames, stride=stride, local_clips=local_clips, consistent=consistent)


def cpc_clip_views(
    size: int = 64,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    frames: int = 24,
    stride: int = 1,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: float = 0.5,
    channels: int = 3,
    color: bool = True,
    backend: Backend = None,
) -> ClipPolicy:
    """Return the single view of predictive coding over time, a clip of which all frames are augmented alike.

    Crop 0.5..1, flip 0.5, jitter (0.4, 0.4, 0.4, 0.1) at 0.8, grayscale 0.2. These are our own: the paper
    (https://arxiv.org/abs/1807.03748) has sound and images.

    Args:
        size: Edge of the view in pixels, >= 1.
        mean: As in `clip_views`.
        std: As in `clip_views`.
        frames: T, frames of the view, >= 1.
        stride: Distance of these frames in the clip, >= 1; the start is drawn uniformly.
        scale: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, in [0, 1]; it swaps left and right motions.
        channels: As in `clip_views`.
        color: As in `clip_views`.
        backend: As in `clip_views`.

    Raises:
        ValueError: If a number is out of range.
    """
    spec = ViewSpec(size, scale, (0.4, 0.4, 0.4, 0.1), flip=flip)
    return clip_views(
        size,
        mean=mean,
        std=std,
        frames=frames,
        stride=stride,
        specs=[spec],
        channels=channels,
        color=color,
        backend=backend,
    )


def vjepa_views(
    size: int = 224,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    frames: int = 16,
    stride: int = 4,
    scale: tuple[float, float] = (0.3, 1.0),
    flip: float = 0.5,
    backend: Backend = None,
) -> ClipPolicy:
    """Return V-JEPA's single clip of a video, with one crop for all frames.

    Frames ``stride`` apart from a random start; crop 0.3..1 with aspect 0.75..1.35, flip 0.5, no color operations.

    Source: https://arxiv.org/abs/2404.08471 and https://github.com/facebookresearch/jepa.

    Args:
        size: Edge of the view in pixels, >= 1.
        mean: As in `clip_views`.
        std: As in `clip_views`.
        frames: T, frames of the view, >= 1.
        stride: Distance of the frames, >= 1.
        scale: Range of the crop's share of the image area.
        flip: Probability of a horizontal flip, in [0, 1]; 0 where left and right differ.
        backend: As in `clip_views`.

    Raises:
        ValueError: If a number is out of range.
    """
    check_at_least("frames", frames, 1)
    check_at_least("stride", stride, 1)
    spec = ViewSpec(size, scale, jitter_p=0.0, gray_p=0.0, flip=flip, ratio=(0.75, 1.35))
    images = make_policy([spec], mean=mean, std=std, backend=backend)
    return ClipPolicy(images, frames=frames, stride=stride, local_clips=0, consistent=True)

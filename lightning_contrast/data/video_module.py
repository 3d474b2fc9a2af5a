"""Data module for folders of video files, of which each step decodes a window."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, fail
from lightning_contrast.data._folder_images import FolderImages
from lightning_contrast.data.folder_module import ImageFolderDataModule

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def read_frames(path: str, frames: int, stride: int, seed: int | None = None) -> Tensor:
    """Decode a window of a video file with PyAV.

    The place of each frame is known from the packets, without decoding; decoding starts at the keyframe before the
    window.

    Args:
        path: The file.
        frames: T, number of frames, >= 1.
        stride: Distance of the frames in the file, >= 1.
        seed: Chooses the start of the window; None takes the middle of the video.

    Returns:
        RGB frames, uint8 ``(T, 3, H, W)``.

    Raises:
        ValueError: If the file has no video stream, or fewer frames than ``(frames - 1) * stride + 1``.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Video files are read with PyAV: pip install 'lightning_contrast[video]'.") from error

    with av.open(path) as container:
        if not container.streams.video:
            fail("videos", "have a video stream", "none", "Remove the file")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        span = (frames - 1) * stride + 1
        places = len(times) - span + 1
        if places < 1:
            hint = f"Lower `frames` ({frames}) or `stride` ({stride}), or remove the file"
            fail("videos", f"have at least {span} frames", len(times), hint)
        start = (places - 1) // 2 if seed is None else (seed >> 20) % places  # the low bits choose the square
        wanted = set(times[start : start + span : stride])
        container.seek(times[start], stream=stream, backward=True)
        found: dict[int, Any] = {}
        for frame in container.decode(stream):
            if frame.pts in wanted:
                found[frame.pts] = frame.to_ndarray(format="rgb24")
            if len(found) == frames:
                break
        if len(found) < frames:
            fail("videos", f"hold {frames} frames that can be decoded", len(found), "The file is damaged: remove it")
    return torch.from_numpy(np.stack([found[time] for time in sorted(found)])).permute(0, 3, 1, 2)


class FolderVideos(FolderImages):
    """Video files of which a window is decoded and resized on access.

    Args:
        paths: The files.
        labels: Class index of each file, -1 for none.
        size: Height and width, in pixels.
        resize: "crop", "center" or "squash".
        frames: Number of frames.
        stride: Their distance in the file.
        indices: Whether batches include the positions.
    """

    what = "video"

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        size: int,
        resize: str,
        *,
        frames: int,
        stride: int,
        indices: bool,
    ) -> None:
        reads = partial(read_frames, frames=frames, stride=stride)  # and no lambda: spawned workers pickle it
        super().__init__(paths, labels, size, resize, reads, indices=indices)

    def load(self, path: str, seed: int | None) -> Tensor:
        """Return frames ``(T, 3, H, W)`` of one file: in training at a place drawn by ``seed``, else of the middle."""
        return cast("partial[Tensor]", self.loader)(path, seed=seed)

    def checked(self, value: Any) -> Tensor:
        """Return the frames ``(T, 3, H, W)`` unchanged."""
        return value  # type: ignore[no-any-return]  # what `load` returned


class VideoFolderDataModule(ImageFolderDataModule):
    """Data module for folders of videos, decoded by PyAV (``pip install 'lightning_contrast[video]'``).

    Labels, order, resume, links and unreadable files are as in `ImageFolderDataModule`. Of each file a window of frames
    is decoded: in training at a place drawn for each file and epoch, so that runs resume exactly; in evaluation from
    the middle. `augment.clip_views` cuts its clips from this window.

    Batches are ``(clips, labels)``: uint8 ``(B, T, 3, size, size)`` and int64 ``(B,)``; ``indices=True`` adds the
    position in `paths`, int64 ``(B,)``.

    Args:
        train_dir: Folder of the training videos.
        val_dir: Folder of the validation videos, or None; its classes must be among the training classes.
        frames: T, frames of a window, >= 1.
        stride: Distance in the file of the frames of a window, >= 1.
        size: Height and width of the frames, in pixels, >= 1.
        batch_size: Videos per batch on each rank, >= 1. In training a short last batch is dropped.
        num_workers: Worker processes on each rank, >= 0.
        resize: "crop", "center" or "squash", as in `ImageFolderDataModule`; all frames of a clip are cut alike.
        on_error: "raise" or "skip", for files that cannot be decoded or have fewer frames than a window needs.
        extensions: File extensions in lower case. None: common video formats.
        seed: Seed of the order, of the windows and of the workers, >= 0.
        indices: Also yield the positions.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.

    Raises:
        ValueError: If a value is out of range; in `setup`, if a folder has no videos.
        FileNotFoundError: In `setup`, if a folder is missing.
        RuntimeError: While loading, if a file cannot be read or is too short; the message names it.
    """

    what: ClassVar[str] = "videos"

    def __init__(
        self,
        train_dir: str | Path,
        val_dir: str | Path | None = None,
        *,
        frames: int = 32,
        stride: int = 1,
        size: int = 128,
        batch_size: int = 32,
        num_workers: int = 4,
        resize: Literal["crop", "center", "squash"] = "crop",
        on_error: Literal["raise", "skip"] = "raise",
        extensions: Sequence[str] | None = None,
        seed: int = 0,
        indices: bool = False,
        pin_memory: bool = False,
    ) -> None:
        check_choice("resize", resize, ("crop", "center", "squash"))
        super().__init__(
            train_dir,
            val_dir,
            size=size,
            batch_size=batch_size,
            num_workers=num_workers,
            resize=resize,
            on_error=on_error,
            extensions=VIDEO_EXTENSIONS if extensions is None else extensions,
            seed=seed,
            indices=indices,
            pin_memory=pin_memory,
        )
        check_at_least("frames", frames, 1)
        check_at_least("stride", stride, 1)
        self.frames, self.stride = frames, stride

    def make_set(self, paths: list[str], labels: list[int]) -> FolderVideos:
        """Return the dataset of these files and their classes."""
        window = {"frames": self.frames, "stride": self.stride}
        return FolderVideos(paths, labels, self.size, self.resize, **window, indices=self.indices)

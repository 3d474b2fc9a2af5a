"""Short clips of emoji that move, turn or grow over a colored background."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice
from lightning_contrast.data.emoji_module import EmojiDataModule
from lightning_contrast.data.in_memory import SPLITS, Split
from lightning_contrast.data.loading import MemoryImages
from lightning_contrast.seeding import derived_seed

_BLOCK = 64  # drawings that are rendered at once


class MovingClips(MemoryImages):
    """Clips in memory as dict batches: ``"image"``, ``"label"``, ``"thing"``, ``"motion"`` and, if asked, ``"index"``.

    Args:
        clips: uint8, ``(N, T, C, H, W)``.
        things: Classes of the things, ``(N,)`` int64.
        motions: Classes of the motions, ``(N,)`` int64.
        label: "thing" or "motion": which of the two is ``"label"``.
        indices: Also yield the positions.
    """

    def __init__(self, clips: Tensor, things: Tensor, motions: Tensor, *, label: str, indices: bool = False) -> None:
        super().__init__(clips, motions if label == "motion" else things, indices=indices)
        self.things, self.motions = things, motions

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one clip ``(T, C, H, W)`` and its labels ``()``."""
        return {key: part[0] for key, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the clips ``(B, T, C, H, W)`` and labels ``(B,)`` of a batch."""
        rows = torch.as_tensor(indices)
        batch = {"image": self.images[rows], "label": self.labels[rows]}
        batch |= {"thing": self.things[rows], "motion": self.motions[rows]}
        return batch | ({"index": rows} if self.indices else {})


class MovingEmojiDataModule(EmojiDataModule):
    """One clip of each drawing of `EmojiDataModule`: it moves, turns, grows or shrinks over a gradient of two colors.

    Position, size, angle, speed, motion and background of a clip are a function of (seed, drawing) only, and clips are
    held in memory: 184 MB for the training split with 24 frames. Things and splits are those of `EmojiDataModule`: no
    thing of the test set occurs in training.

    Batches are dicts: ``"image"`` uint8 ``(B, T, 3, 32, 32)``, ``"thing"`` (the Unicode group) and ``"motion"`` int64
    ``(B,)``, and ``"label"``, one of the two; with ``indices=True`` also ``"index"``. Probes take either by
    ``labels="thing"`` and ``labels="motion"``.

    Example:
        >>> data = MovingEmojiDataModule(frames=8)
        >>> data.images("test").shape, data.motion_names[data.motions("test")[0]]
        (torch.Size([624, 8, 3, 32, 32]), 'up')

    Args:
        batch_size: Clips per batch on each rank, >= 1. In training a short last batch is dropped.
        frames: T, frames of a clip, >= 1.
        label: Which class is the batch's ``"label"``, "thing" or "motion".
        seed: Seed of the clips and of the training order, >= 0.
        validation_fold: See `EmojiDataModule`.
        indices: Also yield the positions.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.

    Raises:
        ValueError: If a value is out of range.
    """

    motion_names: ClassVar[tuple[str, ...]] = (
        "left",
        "right",
        "up",
        "down",
        "clockwise",
        "counterclockwise",
        "grow",
        "shrink",
    )

    def __init__(
        self,
        batch_size: int = 256,
        *,
        frames: int = 24,
        label: Literal["thing", "motion"] = "thing",
        seed: int = 0,
        validation_fold: int | None = None,
        indices: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, seed=seed, validation_fold=validation_fold, indices=indices, pin_memory=pin_memory)
        check_at_least("frames", frames, 1)
        check_choice("label", label, ("thing", "motion"))
        self.frames, self.label = frames, label
        self.num_motions = len(self.motion_names)
        if label == "motion":
            self.num_classes, self.class_names = self.num_motions, self.motion_names  # type: ignore[misc]  # per label

    def dataset(self, split: Split) -> MovingClips:
        """Return a split as a dataset; it is rendered at the first call.

        Args:
            split: "train", "val" or "test".
        """
        check_choice("split", split, SPLITS)
        if split not in self._splits:
            clips, things, motions = self._render(split)
            self._splits[split] = MovingClips(clips, things, motions, label=self.label, indices=self.indices)
        return self._splits[split]  # type: ignore[return-value]  # only these are put there

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the clips of a split, uint8 ``(N, T, 3, 32, 32)``, and their labels ``(N,)`` int64."""
        found = self.dataset(split)
        return found.images, found.labels

    def motions(self, split: Split = "train") -> Tensor:
        """Return the motions of the clips of a split, int64 ``(N,)``, as indices into `motion_names`."""
        return self.dataset(split).motions

    def _render(self, split: Split) -> tuple[Tensor, Tensor, Tensor]:
        """Return clips ``(N, T, 3, 32, 32)``, things ``(N,)`` and motions ``(N,)`` of a split."""
        rows = self.things(split)
        groups = [EmojiDataModule.class_names.index(self.groups[row]) for row in rows.tolist()]
        numbers = torch.stack([_draw(self.seed, artist, row) for artist in (0, 1) for row in rows.tolist()])
        motions = (numbers[:, 0] * len(self.motion_names)).long()
        rgba = np.concatenate([self._file[artist][rows.numpy()] for artist in ("noto", "fluent")])
        drawings = torch.from_numpy(rgba.astype(np.float32)).permute(0, 3, 1, 2) / 255  # (N, 4, 32, 32)
        blocks = (torch.split(part, _BLOCK) for part in (drawings, numbers, motions))
        clips = torch.cat([_clips(*block, frames=self.frames) for block in zip(*blocks, strict=True)])
        return clips, torch.tensor(groups).repeat(2), motions


def _draw(seed: int, artist: int, row: int) -> Tensor:
    """Return the random numbers of a clip, ``(14,)`` in [0, 1)."""
    return torch.rand(14, generator=torch.Generator().manual_seed(derived_seed(seed, artist, row)))


def _clips(drawings: Tensor, numbers: Tensor, motions: Tensor, *, frames: int) -> Tensor:
    """Render clips ``(n, T, 3, H, W)`` uint8 of drawings ``(n, 4, H, W)`` in 0..1.

    Lengths are in half edges of the frame, whose center is 0 and whose y axis points down; time runs from -1/2 to 1/2.
    """
    count, _, height, width = drawings.shape
    time = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)  # (T,)
    u = numbers[:, 1:, None]  # (n, 13, 1)

    def moves(positive: int, negative: int) -> Tensor:
        return ((motions == positive).float() - (motions == negative).float())[:, None]  # (n, 1)

    center = [0.5 * u[:, i] - 0.25 for i in (0, 1)]  # (n, 1) each
    path = 0.7 + 0.5 * u[:, 2]
    x = center[0] + moves(1, 0) * path * time  # (n, T): right, left
    y = center[1] + moves(3, 2) * path * time  # down, up
    angle = 0.6 * (u[:, 3] - 0.5) + moves(4, 5) * math.pi * (0.6 + 0.6 * u[:, 2]) * time
    scale = (0.45 + 0.15 * u[:, 4]) * torch.exp(moves(6, 7) * (0.7 + 0.3 * u[:, 2]) * time)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # Inverse map, from a place in the frame to one in the drawing.
    matrix = torch.stack([cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y], -1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [count * frames, 1, height, width], align_corners=False)
    alpha = drawings[:, 3:]
    layers = torch.cat([drawings[:, :3] * alpha, alpha], 1)[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    moved = torch.unflatten(F.grid_sample(layers, grid, align_corners=False), 0, (count, frames))
    direction = 2 * math.pi * u[:, 5, :, None]  # (n, 1, 1)
    down, right = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    share = 0.5 + 0.35 * (direction.cos() * right + direction.sin() * down)  # (n, H, W)
    first, second = numbers[:, 7:10, None, None], numbers[:, 10:13, None, None]
    background = first + (second - first) * share[:, None]  # (n, 3, H, W)
    frames_rgb = moved[:, :, :3] + (1 - moved[:, :, 3:]) * background[:, None]
    pixels: Tensor = (frames_rgb * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8)

"""Scenes composed of two emoji, with captions that name both things and how they lie: "cat face left of sun"."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, require
from lightning_contrast.data.emoji_module import EmojiDataModule
from lightning_contrast.data.in_memory import SPLITS, InMemoryDataModule, Split
from lightning_contrast.data.loading import MemoryImages
from lightning_contrast.seeding import derived_seed

_THING = 32  # pixels of a drawing's edge


class EmojiScenesDataModule(InMemoryDataModule):
    """Scenes of two emoji on a white ground, with captions such as "cat face left of sun".

    Two different things, each drawn by either artist at 32 x 32 pixels, lie beside or above each other without overlap,
    at random places. Things have names of one or two words, and the things of a split are those of `EmojiDataModule`:
    no thing of the test set occurs in training. A scene is a function of (split, index) only. Two tests use them:
    whether a model tells a scene's caption from the one with the things swapped (`swapped_captions`), and whether what
    it finds for a word lies on that thing (`masks`).

    Batches are dicts: ``"image"`` uint8 ``(B, 3, pixels, pixels)``, ``"text"`` a list of B str, ``"label"`` int64
    ``(B,)``, the relation, and with ``indices=True`` ``"index"`` int64 ``(B,)``, the position in the split.

    Example:
        >>> data = EmojiScenesDataModule(scenes=4, test_scenes=2)
        >>> data.captions("train")[0], data.swapped_captions("train")[0]
        ('laptop above houses', 'houses above laptop')
        >>> data.images("train").shape, data.masks("train").shape
        (torch.Size([4, 3, 80, 80]), torch.Size([4, 2, 80, 80]))

    Args:
        batch_size: Scenes per batch on each rank, >= 1. In training a short last batch is dropped.
        scenes: Number of training scenes, >= 1; each takes 19 kB of memory at 80 pixels.
        test_scenes: Number of scenes of the validation and of the test split, >= 1.
        pixels: Edge of a scene, >= 64.
        seed: Seed of the training order, >= 0.
        validation_fold: See `EmojiDataModule`.
        indices: Also yield the positions.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.

    Raises:
        TypeError: If a number of scenes or pixels is not a whole number.
        ValueError: If a value is out of range.
    """

    num_classes: ClassVar[int] = 4
    relations: ClassVar[tuple[str, ...]] = ("left of", "right of", "above", "below")

    def __init__(
        self,
        batch_size: int = 64,
        *,
        scenes: int = 4096,
        test_scenes: int = 512,
        pixels: int = 80,
        seed: int = 0,
        validation_fold: int | None = None,
        indices: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, seed=seed, indices=indices, pin_memory=pin_memory)
        check_at_least("scenes", scenes, 1)
        check_at_least("test_scenes", test_scenes, 1)
        check_at_least("pixels", pixels, 2 * _THING, "Two drawings of 32 pixels lie beside each other")
        self.scenes, self.test_scenes, self.pixels = scenes, test_scenes, pixels
        self.emoji = EmojiDataModule(validation_fold=validation_fold)
        self._drawn: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def _drawings(self) -> tuple[Tensor, Tensor]:
        """Return all drawings, (2, 1558, 3, 32, 32) int32 colors and (2, 1558, 1, 32, 32) int32 alpha in 0..255."""
        parts = torch.stack([torch.from_numpy(self.emoji._file[key]) for key in ("noto", "fluent")])
        parts = parts.permute(0, 1, 4, 2, 3).int()
        return parts[:, :, :3], parts[:, :, 3:]

    def pairs(self, split: Split = "train") -> Tensor:
        """Return the rows of the first and the second named thing in ``emoji.names``, int64 ``(N, 2)``."""
        return self._draw(split)[0][:, :2]

    def captions(self, split: Split = "train") -> list[str]:
        """Return the captions of the N scenes of a split: "<first> <relation> <second>"."""
        return self._texts(split, swap=False)

    def swapped_captions(self, split: Split = "train") -> list[str]:
        """Return the captions with both things in each other's place, which are wrong for N of N scenes."""
        return self._texts(split, swap=True)

    def masks(self, split: Split = "train") -> Tensor:
        """Return where the first and the second named thing are drawn, bool ``(N, 2, pixels, pixels)``."""
        return self._draw(split)[2]

    def class_masks(self, split: Split = "train") -> Tensor:
        """Return the class of each pixel, int64 ``(N, pixels, pixels)``: 0 is the ground, 1 to 9 the Unicode groups.

        A pixel belongs to a thing where its drawing is not transparent.
        """
        groups = torch.tensor([self.emoji.class_names.index(group) for group in self.emoji.groups])
        classes = 1 + groups[self.pairs(split)]  # (N, 2)
        return (self.masks(split) * classes[:, :, None, None]).sum(1)  # the things do not overlap

    def boxes(self, split: Split = "train") -> Tensor:
        """Return the smallest boxes around both things, ``(N, 2, 4)`` float: left, top, right, bottom in pixels."""
        masks = self.masks(split)
        ends = []
        for line in (masks.any(2), masks.any(3)):  # by column and by row
            first = line.int().argmax(2)
            ends += [first, line.shape[2] - line.flip(2).int().argmax(2)]
        left, right, top, bottom = ends
        return torch.stack([left, top, right, bottom], 2).float()

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the images of a split ``(N, 3, pixels, pixels)`` uint8, and the relations ``(N,)`` int64."""
        drawn, images, _ = self._draw(split)
        return images, drawn[:, 2]

    def dataset(self, split: Split) -> MemoryImages:
        """Return a split as a dataset of dicts; it is drawn at the first call.

        Args:
            split: "train", "val" or "test".
        """
        check_choice("split", split, SPLITS)
        if split not in self._splits:
            self._splits[split] = _Scenes(*self.read(split), self.captions(split), indices=self.indices)
        return self._splits[split]

    def _texts(self, split: Split, *, swap: bool) -> list[str]:
        names = [name.replace("-", " ") for name in self.emoji.names]
        rows = self._draw(split)[0].tolist()
        order = (1, 0) if swap else (0, 1)
        return [f"{names[row[order[0]]]} {self.relations[row[2]]} {names[row[order[1]]]}" for row in rows]

    def _draw(self, split: Split) -> tuple[Tensor, Tensor, Tensor]:
        """Return (first, second, relation) of the scenes (N, 3), images (N, 3, P, P) uint8 and masks (N, 2, P, P)."""
        if split not in self._drawn:
            count = self.scenes if split == "train" else self.test_scenes
            things = [row for row in self.emoji.things(split).tolist() if self.emoji.names[row].count("-") < 2]
            generator = torch.Generator().manual_seed(derived_seed(0x5CE2E5, SPLITS.index(split)))
            drawn, images, masks = [], [], []
            for _ in range(count):
                scene, image, mask = self._scene(things, generator)
                drawn.append(scene)
                images.append(image)
                masks.append(mask)
            self._drawn[split] = torch.tensor(drawn), torch.stack(images), torch.stack(masks)
        return self._drawn[split]

    def _scene(self, things: list[int], generator: torch.Generator) -> tuple[list[int], Tensor, Tensor]:
        """Draw one scene: its things and relation, its image (3, P, P) and the masks of both things (2, P, P)."""

        def below(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        first = below(len(things))
        second = (first + 1 + below(len(things) - 1)) % len(things)  # another thing
        rows, relation = (things[first], things[second]), below(4)
        free = self.pixels - _THING
        near = below(free - _THING + 1)  # start of the left or upper thing
        far = near + _THING + below(free - near - _THING + 1)
        along = (near, far) if relation in (0, 2) else (far, near)  # of the first and the second named thing
        across = (below(free + 1), below(free + 1))
        image = torch.full((3, self.pixels, self.pixels), 255, dtype=torch.int32)
        mask = torch.zeros(2, self.pixels, self.pixels, dtype=torch.bool)
        for place in range(2):
            top, left = (across[place], along[place]) if relation < 2 else (along[place], across[place])
            artist = below(2)
            color, alpha = (part[artist, rows[place]] for part in self._drawings)
            box = (slice(None), slice(top, top + _THING), slice(left, left + _THING))
            image[box] = (color * alpha + image[box] * (255 - alpha) + 127) // 255  # rounded to nearest
            mask[(place, *box[1:])] = alpha[0] > 0
        return [*rows, relation], image.to(torch.uint8), mask


class _Scenes(MemoryImages):
    """Scenes as dicts with their captions.

    Args:
        images: uint8 ``(N, 3, P, P)``.
        labels: Relations, int64 ``(N,)``.
        texts: N captions.
        indices: Also yield the position of each scene, ``(B,)`` int64.
    """

    def __init__(self, images: Tensor, labels: Tensor, texts: list[str], *, indices: bool) -> None:
        super().__init__(images, labels, indices=indices)
        require(len(texts) == len(images), "texts", f"be {len(images)}", len(texts), "Give one caption per scene")
        self.texts = texts

    def __getitem__(self, index: int) -> Any:
        """Return one scene as a dict of an image (3, P, P), a str and a label ()."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Any) -> Any:
        """Return the scenes of a batch as a dict, see `EmojiScenesDataModule`."""
        rows = torch.as_tensor(indices)
        batch = {"image": self.images[rows], "text": [self.texts[row] for row in indices], "label": self.labels[rows]}
        return batch | {"index": rows} if self.indices else batch

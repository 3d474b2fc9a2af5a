"""A small dataset of real images bundled with the package: emoji by two artists, with captions and 9 classes."""

from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import check_choice, check_templates, fail, require
from lightning_contrast.data.captions import CaptionedImages
from lightning_contrast.data.in_memory import InMemoryDataModule, Split
from lightning_contrast.data.loading import MemoryImages
from lightning_contrast.data.structured_batches import StructuredBatches

_COLORS = {"white": (255, 255, 255), "black": (0, 0, 0)}
_ARTISTS = ("noto", "fluent")
_TEST_FOLD, _FOLDS = 0, 5


class EmojiDataModule(InMemoryDataModule):
    """1,558 emoji, each drawn by two artists at 32 x 32: 2,492 training and 624 test images in 9 classes.

    Noto Emoji by Google (Apache License 2.0) and Fluent Emoji by Microsoft (MIT License); both
    licenses are stored with the data. The split is by emoji: those whose row number is a multiple of 5 form the test
    set, with both drawings. In training each drawing is a separate image; methods do not know which drawings match.

    Images of a split are ordered: all of its emoji by Noto, then the same emoji by Fluent. Batches are
    ``(images, labels)``: uint8 ``(B, 3, 32, 32)`` and int64 ``(B,)``, the Unicode group; ``indices=True`` adds the
    position in the split, int64 ``(B,)``. ``captions=True`` yields dicts for image-text methods instead: "image",
    "text" (a list of B strings), "label", "index" and "artist" (0 is Noto, 1 Fluent). `val_dataloader` yields
    the test set, unless ``validation_fold`` holds out a part of the training set: tune with a fold, and report results
    on the test set without one.

    Example:
        >>> data = EmojiDataModule()
        >>> data.images("train").shape, data.class_names[data.labels("train")[0]]
        (torch.Size([2492, 3, 32, 32]), 'Activities')
        >>> noto, fluent = data.artists("test")  # row i of both is the same emoji
        >>> noto.shape, data.captions("test")[0]
        (torch.Size([312, 3, 32, 32]), '1st place medal')

    Args:
        batch_size: Images per batch on each rank, >= 1. In training a short last batch is dropped.
        seed: Seed of the training order, which is a function of (seed, epoch), >= 0.
        background: Background color: "white", "black" or (red, green, blue), each in 0..255.
        validation_fold: 1 to 4 validates on the training emoji whose row number modulo 5 is this number, and trains on
            the others (934 or 935 emoji). None trains on the whole training set and validates on the test set.
        indices: Also yield the positions.
        captions: Yield dicts with the captions.
        templates: Sentences with ``{}`` for the caption, such as "a drawing of {}". In training one is drawn per image
            and epoch; evaluation uses the first. Needs ``captions=True``.
        artist: Train on the drawings of one artist, "noto" or "fluent": one drawing and one caption per thing. None
            trains on both. The other splits keep both artists.
        pin_memory: Copy batches to page-locked memory, for faster transfer to an accelerator.
        batches: Near neighbors in each training batch, see `StructuredBatches`; None shuffles all images.

    Raises:
        ValueError: If a value is out of range.
    """

    num_classes: ClassVar[int] = 9
    twin_names: ClassVar[tuple[str, str]] = ("men", "women")
    class_names: ClassVar[tuple[str, ...]] = (
        "Activities",
        "Animals & Nature",
        "Flags",
        "Food & Drink",
        "Objects",
        "People & Body",
        "Smileys & Emotion",
        "Symbols",
        "Travel & Places",
    )

    def __init__(
        self,
        batch_size: int = 256,
        *,
        seed: int = 0,
        background: str | tuple[int, int, int] = "white",
        validation_fold: int | None = None,
        indices: bool = False,
        captions: bool = False,
        templates: Sequence[str] = ("{}",),
        artist: Literal["noto", "fluent"] | None = None,
        pin_memory: bool = False,
        batches: StructuredBatches | None = None,
    ) -> None:
        super().__init__(batch_size, seed=seed, indices=indices, pin_memory=pin_memory, batches=batches)
        self.background = _color(background)
        self.templates = check_templates(templates)
        plain = captions or self.templates == ("{}",)
        require(plain, "templates", "be left out without captions", self.templates, "Set `captions=True`")
        check_choice("artist", artist, (None, *_ARTISTS))
        self.artist, self._with_captions = artist, captions
        folds = range(1, _FOLDS)
        ok = validation_fold is None or (type(validation_fold) is int and validation_fold in folds)
        hint = "Fold 0 is the test set; None validates on it"
        require(ok, "validation_fold", f"be None or one of {[*folds]}", validation_fold, hint)
        self.validation_fold = validation_fold

    @cached_property
    def _file(self) -> dict[str, NDArray[np.generic]]:
        path = resources.files("lightning_contrast.data") / "emoji" / "emoji32.npz"
        with path.open("rb") as stream, np.load(stream) as arrays:
            return {key: arrays[key] for key in ("noto", "fluent", "names", "groups")}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The Unicode name of each of the 1,558 emoji, words joined by ``-``."""
        return tuple(str(name) for name in self._file["names"])

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The Unicode group (class) of each of the 1,558 emoji."""
        return tuple(str(group) for group in self._file["groups"])

    def things(self, split: Split = "train") -> Tensor:
        """Return the row numbers of the emoji of a split in 0..1557, ascending, int64 ``(T,)``.

        Args:
            split: "train", "val" or "test".
        """
        rows = torch.arange(len(self.names))
        fold, validation = rows % _FOLDS, self.validation_fold
        if split == "train":
            return rows[(fold != _TEST_FOLD) & (fold != (-1 if validation is None else validation))]
        return rows[fold == (validation if split == "val" and validation is not None else _TEST_FOLD)]

    def artists(self, split: Split = "test") -> tuple[Tensor, Tensor]:
        """Return the images by Noto and by Fluent, uint8 ``(T, 3, 32, 32)`` each; row i of both is the same emoji.

        Args:
            split: "train", "val" or "test"; both artists of "train" also if the run trains on one.
        """
        one = split == "train" and self.artist is not None
        noto, fluent = (self._draw(split)[0] if one else self.images(split)).chunk(2)
        return noto, fluent

    def twins(self, split: Split = "train") -> tuple[Tensor, Tensor]:
        """Return which images of a split show one person as a man and as a woman, such as man-artist and woman-artist.

        Args:
            split: "train", "val" or "test".

        Returns:
            The positions in `images` of the men, int64 ``(P,)``, and of the women, ``(P,)``: row i of both is the same
            person by the same artist. Persons of whom the split has only one are left out.
        """
        rows = self.things(split).tolist()
        places = {self.names[row]: place for place, row in enumerate(rows)}
        found = [(place, places.get(f"wo{name}")) for name, place in places.items() if name.startswith("man-")]
        men, women = torch.tensor([pair for pair in found if pair[1] is not None]).T
        artists = len(self.captions(split)) // len(rows)  # 2, or 1 in a run on one artist
        starts = len(rows) * torch.arange(artists)[:, None]
        return (starts + men).flatten(), (starts + women).flatten()

    def masks(self, split: Split = "train") -> Tensor:
        """Return the pixels of each drawing of an alpha >= 128, bool ``(N, 32, 32)``, in the order of `images`.

        Args:
            split: "train", "val" or "test".
        """
        rows = self.things(split).numpy()
        one = split == "train" and self.artist is not None
        drawings = [self._file[artist][rows] for artist in _ARTISTS if not one or artist == self.artist]
        return torch.from_numpy(np.concatenate(drawings)[..., 3] >= 128)

    def image_groups(self, split: Split = "train") -> dict[str, Tensor]:
        """Return the groups of the images of a split by name, for `evaluation.unseen_groups`: "artist", int64 ``(N,)``.

        Args:
            split: "train", "val" or "test"; 0 is Noto, 1 Fluent.
        """
        things = len(self.things(split))
        if split == "train" and self.artist is not None:
            return {"artist": torch.full((things,), _ARTISTS.index(self.artist))}
        return {"artist": torch.arange(2 * things) // things}

    def captions(self, split: Split = "train") -> list[str]:
        """Return the caption of each image of a split, in the order of `images`: the name, words separated by spaces.

        Args:
            split: "train", "val" or "test".
        """
        names = [self.names[row].replace("-", " ") for row in self.things(split).tolist()]
        return names if split == "train" and self.artist is not None else names * 2

    def make_dataset(self, split: Split) -> MemoryImages:
        """Read a split, with its captions if the batches have them.

        Args:
            split: "train", "val" or "test".
        """
        if not self._with_captions:
            return super().make_dataset(split)
        images, labels = self.read(split)
        return CaptionedImages(images, labels, self.captions(split), self.templates, self.image_groups(split))

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the images of a split on the background, ``(2T, 3, 32, 32)`` uint8, and its labels ``(2T,)`` int64.

        Args:
            split: "train", "val" or "test"; the training set of one artist has T rows.
        """
        images, labels = self._draw(split)
        if split != "train" or self.artist is None:
            return images, labels
        place = _ARTISTS.index(self.artist)
        return images.chunk(2)[place], labels.chunk(2)[place]

    def _draw(self, split: Split) -> tuple[Tensor, Tensor]:
        rows = self.things(split).numpy()
        drawings = np.concatenate([self._file["noto"][rows], self._file["fluent"][rows]]).astype(np.int32)
        color, alpha = drawings[..., :3], drawings[..., 3:]
        blended = (color * alpha + np.array(self.background) * (255 - alpha) + 127) // 255  # rounded to nearest
        images = torch.from_numpy(blended.astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor([self.class_names.index(self.groups[row]) for row in rows])
        return images, labels.repeat(2)


def _color(background: str | tuple[int, int, int]) -> tuple[int, int, int]:
    rule, hint = "be 'white', 'black' or (red, green, blue) in 0..255", "Give a name or three ints"
    if isinstance(background, str):
        if background not in _COLORS:
            fail("background", rule, background, hint)
        return _COLORS[background]
    values = tuple(background) if isinstance(background, tuple | list) else ()
    ok = len(values) == 3 and all(type(value) is int and 0 <= value <= 255 for value in values)
    require(ok, "background", rule, background, hint)
    red, green, blue = values
    return red, green, blue

"""Images in memory with a caption each."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_contrast._checks import check_caption, check_templates, require
from lightning_contrast.contracts import IMAGE_KEY, INDEX_KEY, LABEL_KEY, TEXT_KEY
from lightning_contrast.data.loading import MemoryImages


class CaptionedImages(MemoryImages):
    """Images, labels and captions held in memory, read a batch at a time.

    Args:
        images: uint8 images, ``(N, C, H, W)``.
        labels: Class indices, ``(N,)`` int64; -1 for none.
        captions: One caption per image, none of them empty.
        templates: Sentences with ``{}`` for the caption. The training order draws one per image and epoch; everything
            else uses the first.
        columns: Further entries of a batch by name, one row for each image, ``(N, ...)``.

    Raises:
        ValueError: If a caption is empty, the number of captions or of rows of a column is not N, or a template has no
            ``{}``.
        TypeError: If a caption is not a string.
    """

    takes_seeds = True
    """The training order gives `SeededIndex`es, which draw the template."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        captions: Sequence[str],
        templates: Sequence[str] = ("{}",),
        columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(images, labels, indices=True)
        self.columns = dict(columns or {})
        sizes = {"captions": len(captions)} | {name: len(column) for name, column in self.columns.items()}
        for name, size in sizes.items():
            rule = f"have one for each of the {len(images)} images"
            require(size == len(images), name, rule, size, "Give one row per image")
        for position, caption in enumerate(captions):
            check_caption(caption, f"caption {position}")
        self.captions, self.templates = list(captions), check_templates(templates)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one image ``(C, H, W)``, its text, its label ``()``, its position ``()`` and its columns."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the images ``(B, C, H, W)``, B texts, labels ``(B,)``, positions ``(B,)`` and columns of a batch."""
        images, labels, rows = super().__getitems__(indices)
        texts = [self._sentence(index).replace("{}", self.captions[int(index)]) for index in indices]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return columns | {IMAGE_KEY: images, TEXT_KEY: texts, LABEL_KEY: labels, INDEX_KEY: rows}

    def _sentence(self, index: int) -> str:
        return self.templates[getattr(index, "seed", 0) % len(self.templates)]

"""Pairs of two items of one group, made from any labeled dataset."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_contrast._checks import check_not_negative, fail, require
from lightning_contrast.contracts import IMAGE_KEY, INDEX_KEY, LABEL_KEY
from lightning_contrast.data._position import RemembersPosition
from lightning_contrast.data.loading import (
    MemoryImages,
    ResumableLoader,
    SeededIndex,
    as_is,
    check_loading,
    make_loader,
)

Key: TypeAlias = str | int | Callable[[Any], Any] | Sequence[Any] | Tensor
"""Where the group of an item is: a key or position in it, a function of it, or a value for each item of the set."""


class GroupPairs(RemembersPosition, L.LightningDataModule):
    """Train on pairs of two different items of one group, such as two images of a patient or two dates of a place.

    Each epoch visits every item once, in an order that is a function of (seed, epoch), and draws its partner from the
    other items of its group by (seed, epoch, item), so a resumed run continues exactly. Batches are
    ``([a, b], labels, groups)``: the items ``(B, ...)`` as the dataset yields them, the label of a (-1 without labels),
    int64 ``(B,)``, and the number of the group, int64 ``(B,)``, which stands where other loaders have the index: with
    ``mask_same="index"`` pairs of one group are not negatives of each other. Of a dataset of dicts, batches are
    dicts: ``[a, b]`` as "image", "label", the group as "index", and the other entries of the items a. Items whose group
    is None or below 0, and those without a partner, are left out of the training, with one warning that counts them.
    Evaluation loaders are those of ``source``, if it is a data module.

    Example:
        >>> emoji = EmojiDataModule()
        >>> things = torch.arange(1246).repeat(2)  # rows i and i + 1246 show the same emoji, by two artists
        >>> pairs = GroupPairs(emoji, key=things, role=torch.arange(2492) // 1246, batch_size=64)
        >>> (noto, fluent), labels, groups = next(iter(pairs.train_dataloader()))
        >>> noto.shape, groups.shape
        (torch.Size([64, 3, 32, 32]), torch.Size([64]))

    Args:
        source: A data module with ``dataset("train")``, such as those of this package, or a map-style dataset. Its
            items are ``(item, label, ...)`` tuples or dicts with ``"image"`` and ``"label"``.
        key: Where the group of an item is: "label" (its class), another key of dict items, a position in tuple items, a
            function of the item, or a sequence with one value per item of the set. Values are compared with ``==``
            after a tensor with one element is read; a key or function is read once for all items at the first loader.
        role: In the same forms, a value that says which item of a pair comes first: items of the smaller of exactly two
            values are always a, the others b, and each epoch visits the items a. None: any item can be a.
        batch_size: Pairs per batch on each rank, >= 1. A short last batch is dropped.
        seed: Seed of order and partners, >= 0.
        num_workers: Worker processes of the training loader, >= 0.

    Raises:
        TypeError: If ``source`` has no training dataset, or an item not the expected parts.
        ValueError: If a number is out of range; at the first loader if no group has two items, the number of values
            differs from that of the items, or ``role`` has not two values.
    """

    def __init__(
        self,
        source: L.LightningDataModule | Dataset[Any],
        *,
        key: Key = LABEL_KEY,
        role: Key | None = None,
        batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_loading(batch_size, seed)
        check_not_negative("num_workers", num_workers)
        readable = callable(getattr(source, "dataset", None)) or hasattr(source, "__getitem__")
        if not readable:
            hint = 'Give a data module with `dataset("train")`, or a map-style dataset'
            fail("source", "hold a training dataset", type(source).__name__, hint, TypeError)
        self.source, self.key, self.role = source, key, role
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._pairs: _PairDataset | None = None

    def prepare_data(self) -> None:
        """Prepare the data of a source that is a data module."""
        if isinstance(self.source, L.LightningDataModule):
            self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the data of a source that is a data module.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all.
        """
        if isinstance(self.source, L.LightningDataModule):
            self.source.trainer = self.trainer
            self.source.setup(cast("str", stage))

    def pairs(self) -> "Dataset[Any]":
        """Return the dataset of pairs; it reads the groups at the first call.

        Raises:
            ValueError: If no group has two items.
        """
        if self._pairs is None:
            dataset: Any = getattr(self.source, "dataset", None)
            items = dataset("train") if callable(dataset) else self.source
            self._pairs = _PairDataset(items, *_partners(items, self.key, self.role), self.seed)
        return self._pairs

    def train_dataloader(self) -> ResumableLoader:
        """Return batches of pairs, with exact resume within an epoch."""
        pairs = cast("_PairDataset", self.pairs())
        loader = make_loader(
            pairs,
            self.batch_size,
            trainer=self.trainer,
            train=True,
            seed=self.seed,
            collate_fn=as_is if pairs.in_memory else default_collate,
            num_workers=self.num_workers,
        )
        return self._remember(loader)

    def val_dataloader(self) -> "DataLoader[Any] | list[Any]":
        """Return the source's validation loader; none for a bare dataset."""
        return self.source.val_dataloader() if isinstance(self.source, L.LightningDataModule) else []

    def test_dataloader(self) -> "DataLoader[Any] | list[Any]":
        """Return the source's test loader; none for a bare dataset."""
        return self.source.test_dataloader() if isinstance(self.source, L.LightningDataModule) else []

    def predict_dataloader(self) -> "DataLoader[Any] | list[Any]":
        """Return the source's loader for prediction; none for a bare dataset."""
        return self.source.predict_dataloader() if isinstance(self.source, L.LightningDataModule) else []


class _PairDataset(Dataset[Any]):
    """Pairs of two items of a group; the partner is drawn by the seed of the index."""

    takes_seeds = True

    def __init__(self, items: Any, first: Tensor, groups: Tensor, members: list[Tensor], seed: int) -> None:
        self.items, self.first, self.groups, self.members, self.seed = items, first, groups, members, seed
        self.in_memory = isinstance(items, MemoryImages)

    def __len__(self) -> int:
        return len(self.first)

    def _partner(self, index: int) -> int:
        """Return the row of the partner of the item at an index of this dataset."""
        row, members = self.first[index], self.members[int(self.groups[index])]
        others = members[members != row]
        generator = torch.Generator().manual_seed(getattr(index, "seed", self.seed))
        return int(others[torch.randint(len(others), (), generator=generator)])

    def __getitem__(self, index: int) -> Any:
        """Return ``([a, b], label, group)`` of one pair, or a dict of them."""
        one, other = self.items[int(self.first[index])], self.items[self._partner(index)]
        label = _label(one)
        return _pair(one, [_item(one), _item(other)], -1 if label is None else int(label), int(self.groups[index]))

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the pairs of a batch: of images in memory as one batch, else a list to collate."""
        if not self.in_memory:
            return [self[index] for index in indices]
        rows = [SeededIndex(int(self.first[index]), getattr(index, "seed", self.seed)) for index in indices]
        partners = torch.tensor([self._partner(index) for index in indices])
        first = self.items.__getitems__(rows)
        views = [_item(first), self.items.images[partners]]
        return _pair(first, views, self.items.labels[torch.tensor(rows)], self.groups[list(indices)])


def _pair(record: Any, views: list[Any], label: Any, group: Any) -> Any:
    """Return a pair, or a batch of pairs, in the layout of a record, or a batch, of items a."""
    if isinstance(record, Mapping):
        return {**record, IMAGE_KEY: views, LABEL_KEY: label, INDEX_KEY: group}
    return views, label, group


def _item(record: Any) -> Any:
    if isinstance(record, Mapping) and IMAGE_KEY in record:
        return record[IMAGE_KEY]
    if isinstance(record, list | tuple) and record:
        return record[0]
    hint = 'Yield (item, label) or a dict with "image" from the dataset'
    fail("source", "yield items with labels", type(record).__name__, hint, TypeError)


def _label(record: Any) -> Any:
    if isinstance(record, Mapping):
        return record.get(LABEL_KEY)
    return record[1] if len(record) > 1 and isinstance(record[1], int | Tensor) else None


def _values(items: Any, key: Key, name: str) -> list[Any]:
    """Return one value per item: tensors with one element as numbers."""
    total = len(items)
    if not isinstance(key, str | int) and not callable(key):
        values = list(key)
        hint = "Give one value for each item of the training set, in its order"
        require(len(values) == total, name, f"have {total} values, one per item", len(values), hint)
    elif isinstance(items, MemoryImages) and key in (LABEL_KEY, 1):
        values = items.labels.tolist()
    else:
        values = [_value(items[row], key, name) for row in range(total)]
    return [value.item() if isinstance(value, Tensor) else value for value in values]


def _value(record: Any, key: Any, name: str) -> Any:
    if callable(key):
        return key(record)
    place = 1 if key == LABEL_KEY and not isinstance(record, Mapping) else key
    try:
        return record[place]
    except (KeyError, IndexError, TypeError):
        got = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        hint = "Name a key of dict items, a position in tuples, or give a function or one value per item"
        fail(name, f"lead to a value of each item ({key!r} does not)", got, hint, TypeError)


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, int | float) and value < 0)


def _partners(items: Any, key: Key, role: Key | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the rows that are a, their group numbers, and the candidates for b of each group."""
    values = _values(items, key, "key")
    roles = [None] * len(values) if role is None else _values(items, role, "role")
    kinds = sorted(set(roles)) if role is not None else [None, None]
    require(len(kinds) == 2, "role", "have two different values", kinds[:9], "One value for a, a larger one for b")
    firsts: dict[Any, list[int]] = {}
    seconds: dict[Any, list[int]] = {}
    for row, (value, kind) in enumerate(zip(values, roles, strict=True)):
        if _is_known(value):
            for found, wanted in ((firsts, kinds[0]), (seconds, kinds[1])):
                found.setdefault(value, [])
                if kind == wanted:
                    found[value].append(row)
    complete = [v for v in firsts if firsts[v] and set(seconds[v]) - (set(firsts[v]) if len(firsts[v]) == 1 else set())]
    used = {row for value in complete for row in (*firsts[value], *seconds[value])}
    hint = "Give a `key` that is equal for items that belong together"
    require(len(complete) > 0, "key", "give at least one group of two items", f"{len(firsts)} groups", hint)
    if len(used) < len(values):
        left_out = len(values) - len(used)
        warnings.warn(f"GroupPairs leaves out {left_out} of {len(values)} items, which have no partner.", stacklevel=3)
    rows = [(row, number) for number, value in enumerate(complete) for row in firsts[value]]
    rows.sort()
    first, groups = torch.tensor(rows).unbind(1)
    return first.contiguous(), groups.contiguous(), [torch.tensor(seconds[value]) for value in complete]

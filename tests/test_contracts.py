"""The batch contract: every container, views told from labels, and clear errors."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lightning_contrast.contracts import batch_indices, is_views, replace_images, require_views, split_batch

IMAGES = torch.rand(4, 3, 8, 8)
LABELS = torch.arange(4)
VIEWS = [torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)]


class Pair(NamedTuple):
    image: object
    label: torch.Tensor


@dataclasses.dataclass
class Record:
    image: object
    label: torch.Tensor
    index: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class PluralRecord:
    images: object
    labels: torch.Tensor


CONTAINERS = {
    "tuple": (IMAGES, LABELS),
    "list": [IMAGES, LABELS],
    "named tuple": Pair(IMAGES, LABELS),
    "dict": {"image": IMAGES, "label": LABELS},
    "dataclass": Record(IMAGES, LABELS),
    "plural dataclass": PluralRecord(IMAGES, LABELS),
}


@pytest.mark.parametrize("batch", CONTAINERS.values(), ids=CONTAINERS)
def test_split(batch):
    images, labels = split_batch(batch)
    assert images is IMAGES
    assert labels is LABELS


@pytest.mark.parametrize("batch", CONTAINERS.values(), ids=CONTAINERS)
def test_replace_keeps_the_container_and_leaves_the_old_one_alone(batch):
    changed = replace_images(batch, VIEWS)
    assert type(changed) is type(batch)
    assert split_batch(batch)[0] is IMAGES
    views, labels = split_batch(changed)
    assert all(a is b for a, b in zip(views, VIEWS, strict=True))
    assert labels is LABELS


def test_bare_tensor():
    assert split_batch(IMAGES) == (IMAGES, None)
    assert replace_images(IMAGES, VIEWS) is VIEWS


@pytest.mark.parametrize("kind", [list, tuple])
def test_bare_views(kind):
    views, labels = split_batch(kind(VIEWS))
    assert isinstance(views, list)
    assert labels is None
    assert len(views) == 2


def test_bare_views_may_differ_in_size():
    views, labels = split_batch([torch.rand(4, 3, 8, 8), torch.rand(4, 3, 4, 4)])
    assert labels is None
    assert len(views) == 2


def test_single_image_tensor_in_a_list_is_images_without_labels():
    images, labels = split_batch([IMAGES])
    assert images is IMAGES
    assert labels is None


@pytest.mark.parametrize("kind", [list, tuple])
def test_collated_views_with_labels(kind):
    views, labels = split_batch([kind(VIEWS), LABELS])
    assert isinstance(views, list)
    assert labels is LABELS


def test_images_and_masks_of_other_channels_are_not_views():
    masks = torch.rand(4, 1, 8, 8)
    images, labels = split_batch((IMAGES, masks))
    assert images is IMAGES
    assert labels is masks


def test_uint8_pairs_are_not_views():
    images = (IMAGES * 255).byte()
    assert split_batch((images, images))[0] is images


@pytest.mark.parametrize(
    "batch", [{"x": IMAGES, "y": IMAGES}, {"x": IMAGES[0]}, {"image": "a.png"}, "images", 3, [], [3, IMAGES]]
)
def test_no_images(batch):
    with pytest.raises(TypeError, match=r"`batch` must .* got .*collate"):
        split_batch(batch)


@pytest.mark.parametrize(
    ("batch", "source"),
    [
        ({"pixel_values": IMAGES, "labels": LABELS}, None),
        ({"pixel_values": IMAGES, "depth": IMAGES / 2}, "pixel_values"),
        ([LABELS, IMAGES], 1),
        ((LABELS, IMAGES), -1),
        ({"nested": {"pixels": (LABELS, IMAGES)}}, lambda batch: batch["nested"]["pixels"][1]),
    ],
)
def test_images_in_another_place_are_found_and_replaced(batch, source):
    assert split_batch(batch, source)[0] is IMAGES
    views = [IMAGES + 1, IMAGES + 2]
    replaced = replace_images(batch, views, source)
    assert type(replaced) is type(batch)
    found = split_batch(replaced, source)[0]
    assert len(found) == 2
    assert all(one is other for one, other in zip(found, views, strict=True))
    assert split_batch(batch, source)[0] is IMAGES
    assert set(map(id, tree_leaves(batch))) - {id(IMAGES)} <= set(map(id, tree_leaves(replaced)))


@pytest.mark.parametrize(("batch", "source"), [({"a": IMAGES}, "b"), ([IMAGES], 1), (IMAGES[0, 0, 0], "a")])
def test_a_place_without_images_is_named(batch, source):
    with pytest.raises(TypeError, match=f"`images` must lead to images of the batch .{source!r} does not., got"):
        split_batch(batch, source)


def test_a_function_that_makes_new_images_cannot_say_where_they_go():
    with pytest.raises(ValueError, match="`images` must be a function that returns a part of the batch, got 'Tensor'"):
        replace_images({"a": IMAGES}, IMAGES, lambda batch: batch["a"] * 2)


@pytest.mark.parametrize("shape", [(4, 3, 5, 8, 8), (4, 3, 16), (4, 7)])
def test_views_of_any_shape(shape):
    views = [torch.rand(shape), torch.rand(shape)]
    assert all(one is other for one, other in zip(split_batch((views, LABELS))[0], views, strict=True))
    assert len(require_views((views, LABELS), 2)) == 2
    images, labels = split_batch((torch.rand(4, 3), torch.rand(4, 3)))  # a table and soft labels, not two views
    assert (images.shape, labels.shape) == ((4, 3), (4, 3))


def test_indices():
    index = torch.tensor([5, 6, 7, 8])
    assert batch_indices((IMAGES, LABELS, index)) is index
    assert batch_indices({"image": IMAGES, "index": index}) is index
    assert batch_indices(Record(IMAGES, LABELS, index)) is index
    assert batch_indices((IMAGES, LABELS)) is None
    assert batch_indices(IMAGES) is None
    assert batch_indices([*VIEWS, VIEWS[0]]) is None


def test_is_views():
    assert is_views(VIEWS)
    assert not is_views(IMAGES)
    assert not is_views([])
    assert not is_views([LABELS])


def test_require_views_returns_them():
    views = require_views((VIEWS, LABELS), 2)
    assert [view is other for view, other in zip(views, VIEWS, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IMAGES, LABELS), "ViewAugmentation"),
        (([VIEWS[0]], LABELS), r"must hold 2 views, got 1"),
        (([*VIEWS, VIEWS[0]], LABELS), r"must hold 2 views, got 3"),
        (([VIEWS[0], VIEWS[1][:3]], LABELS), r"equal batch sizes, got \[4, 3\]"),
        (([VIEWS[0][:1], VIEWS[1][:1]], LABELS), r"batch of at least 2, got 1"),
    ],
)
def test_require_views_says_what_is_wrong(batch, message):
    with pytest.raises(ValueError, match=message):
        require_views(batch, 2)

"""Composed scenes: captions say what is where, the things of the splits are apart, batches hold their captions."""

import pytest
import torch

from lightning_contrast.data import EmojiDataModule, EmojiScenesDataModule


@pytest.fixture(scope="module")
def data():
    return EmojiScenesDataModule(8, scenes=64, test_scenes=32, indices=True)


def centers(masks):
    """Return the middle of the box of each mask (N, 2, P, P): rows and columns, (N, 2) each."""
    place = torch.arange(masks.shape[-1])

    def middle(hit):
        first = torch.where(hit, place, masks.shape[-1]).amin(-1)
        return (first + torch.where(hit, place, -1).amax(-1)) / 2

    return middle(masks.any(3)), middle(masks.any(2))


def test_captions_say_where_the_things_are(data):
    rows, columns = centers(data.masks("train"))
    names = [name.replace("-", " ") for name in data.emoji.names]
    seen = set()
    for i, (caption, swapped) in enumerate(zip(data.captions(), data.swapped_captions(), strict=True)):
        first, second = (names[row] for row in data.pairs()[i])
        relation = data.relations[data.labels()[i]]
        assert first != second
        assert caption == f"{first} {relation} {second}"
        assert swapped == f"{second} {relation} {first}"
        dx, dy = float(columns[i, 0] - columns[i, 1]), float(rows[i, 0] - rows[i, 1])
        assert {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[relation]
        seen.add(relation)
    assert seen == set(data.relations)
    assert not data.masks("train").all(1).any(), "things overlap"


def test_images_show_the_drawings(data):
    images, masks = data.images("test"), data.masks("test")
    assert images.dtype == torch.uint8
    assert images.shape == (32, 3, 80, 80)
    assert (images.permute(0, 2, 3, 1)[~masks.any(1)] == 255).all()
    file, i = data.emoji._file, 3
    thing = int(data.pairs("test")[i, 0])
    top, left = (int(torch.nonzero(masks[i, 0].any(1 - axis))[0]) for axis in (0, 1))

    def shows(artist):
        drawing = torch.from_numpy(file[artist][thing])
        opaque = drawing[..., 3] == 255
        start = [int(torch.nonzero((drawing[..., 3] > 0).any(1 - axis))[0]) for axis in (0, 1)]
        y, x = top - start[0], left - start[1]
        part = images[i, :, y : y + 32, x : x + 32].permute(1, 2, 0)
        return part.shape == drawing[..., :3].shape and torch.equal(part[opaque], drawing[..., :3][opaque])

    assert shows("noto") or shows("fluent")


def test_no_test_thing_in_training_and_scenes_are_always_the_same(data):
    emoji = EmojiDataModule()
    assert set(data.pairs("train").flatten().tolist()) <= set(emoji.things("train").tolist())
    assert set(data.pairs("test").flatten().tolist()) <= set(emoji.things("test").tolist())
    again = EmojiScenesDataModule(8, scenes=80, test_scenes=32, seed=5)
    assert torch.equal(again.images("train")[:64], data.images("train"))
    assert again.captions("test") == data.captions("test")
    fold = EmojiScenesDataModule(8, scenes=64, test_scenes=32, validation_fold=2)
    assert {row % 5 for row in fold.pairs("val").flatten().tolist()} == {2}
    assert not {row % 5 for row in fold.pairs("train").flatten().tolist()} & {0, 2}


def test_batches_hold_their_captions(data):
    data.setup("fit")
    for batch in data.train_dataloader():
        rows = batch["index"].tolist()
        assert batch["text"] == [data.captions()[row] for row in rows]
        assert torch.equal(batch["image"], data.images()[batch["index"]])
        assert torch.equal(batch["label"], data.labels()[batch["index"]])
    one = data.dataset("train")[5]
    assert one["text"] == data.captions()[5]
    assert one["image"].shape == (3, 80, 80)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixels": 63}, r"`pixels` must be >= 64, got 63"),
        ({"scenes": 0}, r"`scenes` must be >= 1, got 0"),
        ({"validation_fold": 0}, r"`validation_fold` must be None or one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmojiScenesDataModule(**arguments)

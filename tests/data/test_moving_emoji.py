"""Moving emoji: clips by (seed, drawing), what each motion does, and batches."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_contrast.data import EmojiDataModule, MovingEmojiDataModule
from lightning_contrast.data.moving_emoji import _clips


@pytest.fixture(scope="module")
def data():
    return MovingEmojiDataModule(16, frames=4, indices=True)


def test_things_and_splits_are_those_of_the_emoji(data):
    still = EmojiDataModule()
    clips = data.images("test")
    assert (clips.shape, clips.dtype) == ((624, 4, 3, 32, 32), torch.uint8)
    assert torch.equal(data.labels("test"), still.labels("test"))
    assert data.things("train").tolist() == still.things("train").tolist()
    assert torch.bincount(data.motions("test"), minlength=8).min() > 40


@pytest.mark.slow
def test_a_clip_is_a_function_of_seed_and_drawing(data):
    again = MovingEmojiDataModule(8, frames=4).images("test")
    assert torch.equal(data.images("test"), again)
    other = MovingEmojiDataModule(16, frames=4, seed=1)
    assert (data.motions("test") == other.motions("test")).float().mean() < 0.3
    fold = MovingEmojiDataModule(16, frames=4, validation_fold=1)  # another place in the split, the same drawing
    place = fold.things("train").tolist().index(2)
    assert torch.equal(fold.images("train")[place], MovingEmojiDataModule(16, frames=4).images("train")[1])
    assert data.things("train")[1] == 2


def test_batches_are_dicts(data):
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"image", "label", "thing", "motion", "index"}
    assert batch["image"].shape == (16, 4, 3, 32, 32)
    assert torch.equal(batch["label"], batch["thing"])
    assert torch.equal(batch["motion"], data.motions("val")[:16])
    assert batch["index"].tolist() == list(range(16))
    one = data.dataset("val")[3]
    assert torch.equal(one["image"], batch["image"][3])
    assert isinstance(data.predict_dataloader(), DataLoader)


def test_the_label_is_chosen():
    data = MovingEmojiDataModule(16, frames=2, label="motion")
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch["label"], batch["motion"])
    assert (data.num_classes, data.class_names) == (8, data.motion_names)
    assert EmojiDataModule.num_classes == 9
    for arguments in ({"label": "color"}, {"frames": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            MovingEmojiDataModule(**arguments)


def _moments(motion):
    """Return center (x, y), area and the direction of a mark, per frame, of a white square with a red mark on it."""
    drawing = torch.zeros(1, 4, 32, 32)
    drawing[:, :, 4:28, 4:28] = 1
    drawing[:, 1:3, 12:20, 20:28] = 0  # the mark: at the right of the square
    numbers = torch.full((1, 14), 0.5)
    numbers[:, 7:] = 0  # a black background
    (clip,) = _clips(drawing, numbers, torch.tensor([motion]), frames=5).double() / 255
    places = torch.arange(32.0, dtype=torch.float64)

    def center(weight):
        total = weight.sum((1, 2))
        return torch.stack([(weight.sum(1) * places).sum(1), (weight.sum(2) * places).sum(1)], 1) / total[:, None]

    whole, mark = clip[:, 0], clip[:, 0] - clip[:, 1]
    offset = center(mark) - center(whole)
    return center(whole), whole.sum((1, 2)), torch.atan2(offset[:, 1], offset[:, 0])


@pytest.mark.parametrize("name", MovingEmojiDataModule.motion_names)
def test_each_motion_does_what_its_name_says(name):
    place, area, angle = _moments(MovingEmojiDataModule.motion_names.index(name))
    moved = place[1:] - place[:-1]
    turned = torch.atan2((angle[1:] - angle[:-1]).sin(), (angle[1:] - angle[:-1]).cos())
    signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(name, (0, 0))
    for axis, sign in enumerate(signs):
        assert (moved[:, axis] * sign > 1).all() if sign else (moved[:, axis].abs() < 0.5).all()
    growth = area[1:] / area[:-1]
    assert {"grow": (growth > 1.2).all(), "shrink": (growth < 0.85).all()}.get(name, ((growth - 1).abs() < 0.1).all())
    turn = {"clockwise": 1, "counterclockwise": -1}.get(name, 0)  # y points down
    assert (turned * turn > 0.3).all() if turn else (turned.abs() < 0.1).all()

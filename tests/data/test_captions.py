"""Captions of the bundled set: their batches, templates, one artist, and bad input."""

import pytest
import torch

from lightning_contrast.data import EmojiDataModule
from lightning_contrast.data.captions import CaptionedImages


@pytest.mark.slow
def test_batches_hold_images_texts_labels_and_positions_that_belong_together():
    data = EmojiDataModule(16, captions=True)
    for loader, split in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        batch = next(iter(loader))
        assert set(batch) == {"image", "text", "label", "index", "artist"}
        rows = batch["index"]
        assert torch.equal(batch["image"], data.images(split)[rows])
        assert torch.equal(batch["label"], data.labels(split)[rows])
        for place, drawings in enumerate(data.artists(split)):
            own = batch["artist"] == place
            assert torch.equal(batch["image"][own], drawings[rows[own] - place * len(drawings)])
        assert batch["text"] == [data.captions(split)[row] for row in rows.tolist()]
        assert rows.shape == (16,)
    assert "kissing cat" in data.captions("train")


@pytest.mark.slow
def test_one_artist_trains_on_one_drawing_per_thing():
    both = EmojiDataModule()
    for place, artist in enumerate(("noto", "fluent")):
        data = EmojiDataModule(artist=artist, captions=True)
        assert torch.equal(data.images("train"), both.artists("train")[place])
        assert len(data.captions("train")) == len(data.labels("train")) == len(set(data.captions("train"))) == 1246
        assert torch.equal(data.images("test"), both.images("test"))
        assert set(next(iter(data.train_dataloader()))["artist"].tolist()) == {place}
        assert all(torch.equal(*pair) for pair in zip(data.artists("train"), both.artists("train"), strict=True))


def test_templates_are_drawn_by_epoch_and_image_and_are_the_first_in_evaluation():
    data = EmojiDataModule(64, captions=True, templates=("{}", "a drawing of {}"))
    loader, texts = data.train_dataloader(), []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        texts.append({row: text for b in loader for row, text in zip(b["index"].tolist(), b["text"], strict=True)})
    captions = data.captions("train")
    assert texts[0] == texts[2]
    common = texts[0].keys() & texts[1].keys()
    assert 0.3 < sum(texts[0][row] != texts[1][row] for row in common) / len(common) < 0.7
    assert all(text in (captions[row], f"a drawing of {captions[row]}") for row, text in texts[0].items())
    assert next(iter(data.val_dataloader()))["text"] == data.captions("val")[:64]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"`templates` must have \{\} once in each sentence, got 'a drawing'"):
        EmojiDataModule(captions=True, templates=["a drawing"])
    with pytest.raises(TypeError, match="`templates` must be a list of strings"):
        EmojiDataModule(captions=True, templates="{}")
    with pytest.raises(ValueError, match="`templates` must be left out without captions"):
        EmojiDataModule(templates=["a {}"])
    with pytest.raises(ValueError, match="`artist` must be one of"):
        EmojiDataModule(artist="apple")
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="`caption 1` must not be empty, got ' '"):
        CaptionedImages(images, labels, ["cat", " "])
    with pytest.raises(TypeError, match="`caption 0` must be a string, got 'float'"):
        CaptionedImages(images, labels, [float("nan"), "cat"])
    with pytest.raises(ValueError, match="`artist` must have one for each of the 2 images, got 3"):
        CaptionedImages(images, labels, ["cat", "dog"], columns={"artist": torch.zeros(3)})
    with pytest.raises(ValueError, match="`captions` must have one for each of the 2 images, got 1"):
        CaptionedImages(images, labels, ["cat"])

"""Which files of a folder are images of the set, and how they are turned."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lightning_contrast.data import ImageFolderDataModule


def _write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)
    return path


def _paths(folder, *more, **kwargs):
    data = ImageFolderDataModule(folder, *more, size=8, batch_size=1, num_workers=0, **kwargs)
    data.setup()
    return [os.path.relpath(path, folder) for path in data.paths()]


@pytest.mark.parametrize("classes", [True, False])
def test_hidden_files_and_folders_are_left_out_at_every_depth(tmp_path, classes):
    root = tmp_path / ".cache" / "images"  # hidden folders above do not matter
    inside = root / "cat" if classes else root
    _write(inside / "0.png")
    for hidden in (root / ".ipynb_checkpoints", inside / ".ipynb_checkpoints", inside / ".a" / "deep"):
        _write(hidden / "0-checkpoint.png")
    _write(inside / "._0.png")
    if classes:
        _write(inside / "deep" / ".trash" / "1.png")
        _write(inside / "deep" / "2.png")
        assert _paths(root) == ["cat/0.png", "cat/deep/2.png"]
    else:
        assert _paths(root) == ["0.png"]


def test_an_image_counts_once_whatever_links_lead_to_it(tmp_path):
    cat = tmp_path / "cat"
    _write(cat / "a.png")
    _write(cat / "sub" / "b.png")
    os.symlink(cat / "a.png", cat / "link.png")
    os.link(cat / "a.png", cat / "hard.png")
    os.symlink(cat / "sub", cat / "sub_again")
    os.symlink(tmp_path, cat / "sub" / "above")  # a circle
    _write(tmp_path.parent / f"{tmp_path.name}_outside" / "c.png")
    os.symlink(tmp_path.parent / f"{tmp_path.name}_outside", cat / "outside")
    assert _paths(tmp_path) == ["cat/a.png", "cat/outside/c.png", "cat/sub/b.png"]


def test_an_image_in_two_classes_is_refused(tmp_path):
    _write(tmp_path / "cat" / "a.png")
    _write(tmp_path / "dog" / "b.png")
    os.symlink(tmp_path / "cat" / "a.png", tmp_path / "dog" / "a.png")
    with pytest.raises(
        ValueError, match=r"`train_dir` must hold each image in one class, got \[.*cat/a.png.*dog/a.png"
    ):
        _paths(tmp_path)


def test_a_validation_image_that_is_a_training_image_is_reported(tmp_path):
    _write(tmp_path / "train" / "cat" / "a.png")
    _write(tmp_path / "val" / "cat" / "b.png")
    os.symlink(tmp_path / "train" / "cat" / "a.png", tmp_path / "val" / "cat" / "a.png")
    with pytest.warns(UserWarning, match="1 validation images are training images too"):
        _paths(tmp_path / "train", tmp_path / "val")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation, kind):
    """Read as a viewer shows it, or with ``exif=False`` as it is stored."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8], pixels[8:, :8] = 255, 128  # no turn leaves it as it is
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a" / f"photo.{kind}"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 100, "lossless": True} if kind != "tif" else {}))

    def read(**kwargs):
        data = ImageFolderDataModule(tmp_path, size=16, batch_size=1, num_workers=0, **kwargs)
        return next(iter(data.train_dataloader()))[0][0].int()

    shown = torch.from_numpy(np.array(ImageOps.exif_transpose(Image.open(path)))).permute(2, 0, 1).int()
    stored = torch.from_numpy(pixels).permute(2, 0, 1).int()
    assert (read() - shown).abs().max() < 12
    if kind != "tif":  # which Pillow turns
        assert (read(exif=False) - stored).abs().max() < 12

"""A corrupt image in a folder: named, or skipped by choice and counted; and a worker that dies."""

import os
import signal

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_contrast.data import ImageFolderDataModule
from lightning_contrast.data._folder_images import FolderImages, read_rgb

BAD = ("cat/1.png", "dog/6.png")  # in the order of the sorted list: 1 and 6
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def folder(tmp_path):
    """Nine training and four validation images whose red value is their place; two of the nine and one of four bad."""
    for split, count in (("train", 9), ("val", 4)):
        for place in range(count):
            path = tmp_path / split / ("cat" if place < 5 else "dog") / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), (place, 50, 100), dtype=np.uint8)).save(path)
    whole = (tmp_path / "train" / BAD[0]).read_bytes()
    (tmp_path / "train" / BAD[0]).write_bytes(whole[: len(whole) // 2])  # cut off
    (tmp_path / "train" / BAD[1]).write_text("no image at all")
    (tmp_path / "val" / "cat" / "2.png").write_bytes(b"")
    return tmp_path


def make(folder, **kwargs):
    settings = {"size": 8, "batch_size": 3, "num_workers": 0, "indices": True} | kwargs
    return ImageFolderDataModule(folder / "train", folder / "val", **settings)


class Mean(L.LightningModule):
    """Notes which images it saw."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        images, labels, indices = batch
        assert images[:, 0, 0, 0].tolist() == indices.tolist()
        assert labels.tolist() == [int(index >= 5) for index in indices]
        self.seen.append(indices.tolist())
        return self.layer(images[:, 0, 0, :1].float()).mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch[2].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(data, **kwargs):
    module = Mean()
    settings = QUIET | {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0} | kwargs
    L.Trainer(**settings).fit(module, datamodule=data)
    return module


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_the_run_ends_with_the_path(folder):
    with pytest.raises(RuntimeError, match=r"Cannot read the image .*(cat/1|dog/6)\.png: .*Repair or remove the file"):
        fit(make(folder))


@pytest.mark.filterwarnings("ignore:Cannot read the image")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_skipped_images_are_replaced_in_training_left_out_in_validation_and_counted(folder):
    data = make(folder, on_error="skip")
    with pytest.warns(UserWarning, match="Images were skipped") as warned:
        module = fit(data)
    order = list(data.train_dataloader().sampler)
    told = [str(warning.message) for warning in warned]
    after = {1: 2, 6: 7}
    assert [row for rows in module.seen for row in rows] == [after.get(row, row) for row in order]
    assert module.validated == [0, 1, 3]
    assert [path.split("/", -1)[-2:] for path in data.skipped] == [["cat", "1.png"], ["dog", "6.png"], ["cat", "2.png"]]
    first = [text for text in told if text.startswith("Cannot read the image")]
    assert len(first) == 2  # one of each folder, with the reason
    assert any("cannot identify" in text for text in first)
    assert "train: 2 of 9 images could not be read" in told[-1]
    assert "val: 1 of 4 images could not be read" in told[-1]
    assert "cat/1.png" in told[-1]
    data.teardown("fit")  # nothing new: nothing is told again


@pytest.mark.filterwarnings("ignore:Cannot read the image")  # told in the workers
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*fork\\(\\)")
def test_workers_count_for_all(folder):
    data = make(folder, on_error="skip", num_workers=2)
    with pytest.warns(UserWarning, match=r"train: 2 of 9 images could not be read"):
        fit(data, limit_val_batches=0)
    assert len(data.skipped) == 2


def test_a_prediction_has_a_row_for_each_path(folder):
    with pytest.raises(RuntimeError, match=r"Cannot read the image .*val/cat/2\.png"):
        list(make(folder, on_error="skip").predict_dataloader())


def test_a_loader_that_gives_no_image_is_not_a_corrupt_file(folder):
    data = make(folder, on_error="skip", loader=lambda path: torch.zeros(2, 2, 2, 2))
    with pytest.raises(RuntimeError, match=r"Cannot read the image .*`loader` must be an image"):
        next(iter(data.train_dataloader()))


@pytest.mark.filterwarnings("ignore:Cannot read the image")
def test_a_folder_without_a_readable_image_ends_the_run(folder):
    def unreadable(path):
        raise OSError("the disk is gone")

    data = make(folder, on_error="skip", loader=unreadable, extensions=(".png",))
    with pytest.raises(RuntimeError, match=r"None of 9 consecutive images can be read, the last one is .*\.png"):
        next(iter(data.train_dataloader()))
    with pytest.raises(RuntimeError, match=r"None of 3 images of a batch can be read\. 3 of 4 images"):
        next(iter(data.val_dataloader()))


def test_files_in_a_row_are_tried_up_to_a_hundred():
    tried = []

    def unreadable(path):
        tried.append(path)
        raise OSError("gone")

    images = FolderImages([f"{i}" for i in range(300)], [0] * 300, 4, "crop", unreadable).reading("replace")
    with (
        pytest.warns(UserWarning, match="image 250: gone"),
        pytest.raises(RuntimeError, match="None of 100 consecutive images"),
    ):
        images[250]
    assert tried == [str(i % 300) for i in range(250, 350)]
    assert images.listed() == "100 of 300 images could not be read: 0, 1, 2 and 97 more."


def test_the_rule_is_checked(folder):
    with pytest.raises(ValueError, match=r"`on_error` must be one of 'raise', 'skip', got 'ignore'"):
        make(folder, on_error="ignore")


def _dies(path):
    if path.endswith("3.png"):
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does to a process that needs too much memory
    return read_rgb(path)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*fork\\(\\)")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Cannot read the image", "ignore:Images were skipped")  # one may come first
def test_a_worker_that_dies_ends_the_run_with_its_cause(folder):
    data = make(folder, on_error="skip", num_workers=1, loader=_dies, extensions=(".png",))
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*(killed by signal: Killed|exited unexpectedly)"):
        fit(data, limit_val_batches=0)

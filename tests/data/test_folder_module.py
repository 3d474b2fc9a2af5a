"""Folders of images: labels, sizes, what cannot be read, workers and resume."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torchvision.transforms import v2

from lightning_contrast import augment
from lightning_contrast.data import ImageFolderDataModule
from tests.launch import run_processes


def _write(path, value, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes with five and four images; the red value of an image is its place in the sorted list."""
    for place in range(9):
        _write(tmp_path / "train" / ("cat" if place < 5 else "dog") / "deep" / f"{place}.png", (place, 50, 100))
    for place in range(3):
        _write(tmp_path / "val" / "dog" / f"{place}.JPG", (place, 50, 100))
    return tmp_path


def _data(folder, **kwargs):
    settings = {"size": 6, "batch_size": 2, "num_workers": 0, "resize": "crop"} | kwargs
    return ImageFolderDataModule(folder / "train", folder / "val", **settings)


def test_class_folders_give_labels(folder):
    data = _data(folder, indices=True)
    data.setup()
    data.setup("fit")
    assert data.class_names == ("cat", "dog")
    assert data.num_classes == 2
    assert [path.rsplit("/", 1)[1] for path in data.paths("train")] == [f"{i}.png" for i in range(9)]
    seen = []
    for images, labels, indices in data.train_dataloader():
        assert (images.shape, images.dtype) == ((2, 3, 6, 6), torch.uint8)
        assert (labels.dtype, indices.dtype) == (torch.int64, torch.int64)
        assert images[:, 0].flatten(1).unique(dim=1).flatten().tolist() == indices.tolist()
        assert labels.tolist() == [int(i >= 5) for i in indices]
        seen += indices.tolist()
    assert len(seen) == len(set(seen)) == 8  # the short last batch is left out
    validation = list(data.val_dataloader())
    assert [len(batch[0]) for batch in validation] == [2, 1]
    assert torch.cat([batch[1] for batch in validation]).tolist() == [1, 1, 1]
    assert len(next(iter(_data(folder).train_dataloader()))) == 2


def test_a_flat_folder_has_no_labels(tmp_path):
    for place in range(4):
        _write(tmp_path / f"{place}.png", place)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    data = ImageFolderDataModule(tmp_path, size=4, batch_size=2, num_workers=0)
    _, labels = next(iter(data.train_dataloader()))
    assert labels.tolist() == [-1, -1]
    assert data.num_classes == 0
    assert len(data.paths()) == 4
    assert torch.cat([batch[0][:, 0, 0, 0] for batch in data.predict_dataloader()]).tolist() == [0, 1, 2, 3]


def test_crop_and_squash(tmp_path):
    """An image 24 x 8 in three bands of 8: the center crop is the middle band, the squash has all three."""
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16], pixels[:, 16:] = 100, 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    center = ImageFolderDataModule(tmp_path, size=8, batch_size=1, num_workers=0, resize="center")
    assert (next(iter(center.train_dataloader()))[0] == 100).all()
    squash = ImageFolderDataModule(tmp_path, size=12, batch_size=1, num_workers=0, resize="squash")
    image = next(iter(squash.train_dataloader()))[0][0, 0]
    assert image.shape == (12, 12)
    assert image[:, [1, 6, 10]].unique(dim=0).tolist() == [[0, 100, 200]]


def _ramps(folder, count=30):
    """Write images whose value is the column (landscape) or the row (portrait), 24 pixels long and 8 wide."""
    for place in range(count):
        ramp = np.arange(24, dtype=np.uint8)[None].repeat(8, axis=0)
        path = folder / "a" / f"{place:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp.T.copy() if place % 2 else ramp).save(path)


def _starts(loader, epoch):
    """Return the place at which the square of each image was cut, in the order of the files."""
    loader.sampler.set_epoch(epoch)
    images, _, positions = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert images.shape[1:] == (3, 8, 8)
    return images[:, 0].flatten(1).amin(1)[positions.argsort()].tolist()


def test_training_squares_come_from_the_whole_image(tmp_path):
    train, val = tmp_path / "train", tmp_path / "val"
    for folder in (train, val):
        _ramps(folder)
    settings = {"size": 8, "batch_size": 5, "indices": True, "num_workers": 0, "resize": "crop"}
    data, other = (ImageFolderDataModule(train, val, seed=seed, **settings) for seed in (0, 1))
    starts = [_starts(data.train_dataloader(), epoch) for epoch in range(20)]
    share = torch.tensor(starts).flatten().bincount(minlength=17) / 600
    assert share.numel() == 17
    assert share.tolist() == pytest.approx([1 / 17] * 17, abs=0.05)
    assert all(len(set(column)) > 5 for column in zip(*starts, strict=True))  # every image, over the epochs
    assert _starts(data.train_dataloader(), 3) == starts[3]
    assert _starts(other.train_dataloader(), 3) != starts[3]
    for batch in (*data.val_dataloader(), *data.predict_dataloader()):
        assert (batch[0][:, 0].flatten(1).amin(1) == 8).all()  # the center
    assert data.train_dataloader().dataset[0][0].min() == 8  # as a feature bank reads it


@pytest.mark.slow
def test_places_of_crops_do_not_depend_on_workers_and_resume(tmp_path):
    _ramps(tmp_path)
    settings = {"size": 8, "batch_size": 5, "indices": True, "resize": "crop"}
    alone, workers = (ImageFolderDataModule(tmp_path, num_workers=n, **settings) for n in (0, 2))
    assert _starts(workers.train_dataloader(), 2) == _starts(alone.train_dataloader(), 2)
    whole, resumed = alone.train_dataloader(), alone.train_dataloader()
    whole.sampler.set_epoch(1)
    batches = list(whole)
    resumed.load_state_dict(whole.state_dict() | {"position": 2})
    for left, right in zip(batches[2:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.slow
def test_views_show_the_sides(tmp_path):
    """Of a 500 x 375 photograph with red margins, a quarter of the area."""
    photo = Image.new("RGB", (500, 375), (0, 0, 255))
    for left in (0, 440):
        photo.paste((255, 0, 0), (left, 0, left + 60, 375))
    for place in range(16):
        photo.save(tmp_path / f"{place}.png")
    torch.manual_seed(0)
    policy = augment.make_policy([augment.ViewSpec(32, (0.08, 1.0), jitter_p=0.0, gray_p=0.0)])
    whole = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(32, (0.08, 1.0)), v2.ToDtype(torch.float32, scale=True)])
    theirs = torch.stack([whole(photo) for _ in range(160)])

    def shown(resize):
        loader = ImageFolderDataModule(
            tmp_path, size=64, batch_size=16, num_workers=0, resize=resize
        ).train_dataloader()
        views = []
        for epoch in range(10):
            loader.sampler.set_epoch(epoch)
            views += policy(next(iter(loader))[0])
        return _red(torch.cat(views))

    assert _red(theirs) > 0.5
    assert shown("center") < 0.05
    assert shown("crop") > 0.45 * _red(theirs)  # the views of a step share a square, so that they see one side at most
    assert shown("squash") > 0.9 * _red(theirs)
    assert shown("whole") == pytest.approx(_red(theirs), abs=0.13)  # of 160 views each: three standard errors are 0.16


def _red(views):
    return (((views[:, 0] > 0.5).flatten(1).float().mean(1)) > 0.01).float().mean().item()


def test_shrinking_is_antialiased(tmp_path):
    """White columns in the middle of each 8: without antialiasing only they would be read, and all would be white."""
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, 3::8] = stripes[:, 4::8] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    image = next(iter(ImageFolderDataModule(tmp_path, size=8, batch_size=1, num_workers=0).train_dataloader()))[0]
    assert image.shape == (1, 3, 8, 8)  # grey files come as RGB
    assert ((image >= 50) & (image <= 75)).all()  # a quarter of the area is white


def test_a_corrupt_image_names_its_file(folder):
    broken = folder / "train" / "cat" / "deep" / "2.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:600])  # half of it
    with pytest.raises(RuntimeError, match=r"Cannot read the image .*cat/deep/2\.png.* Repair or remove the file"):
        list(_data(folder, batch_size=9).train_dataloader())
    broken.write_text("this is no image")
    with pytest.raises(RuntimeError, match=r"Cannot read the image .*cat/deep/2\.png"):
        list(_data(folder, batch_size=9).train_dataloader())


@pytest.mark.slow
def test_a_corrupt_image_names_its_file_from_a_worker_too(folder):
    (folder / "train" / "cat" / "deep" / "2.png").write_text("this is no image")
    with pytest.raises(RuntimeError, match=r"Cannot read the image .*cat/deep/2\.png"):
        list(_data(folder, batch_size=9, num_workers=1).train_dataloader())


def test_sixteen_bit_images_need_a_loader(tmp_path):
    values = np.array([[0, 65535], [32768, 256]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    kwargs = {"size": 2, "batch_size": 1, "num_workers": 0}
    with pytest.raises(RuntimeError, match=r"a\.png: it has more than 8 bits .* give a `loader`"):
        next(iter(ImageFolderDataModule(tmp_path, **kwargs).train_dataloader()))

    def read(path):
        return np.asarray(Image.open(path)).astype(np.uint16)

    image = next(iter(ImageFolderDataModule(tmp_path, loader=read, **kwargs).train_dataloader()))[0]
    assert image.dtype == torch.float32
    assert image.flatten().tolist() == pytest.approx([0, 1, 32768 / 65535, 256 / 65535])


def test_many_bands(tmp_path):
    bands = {}
    for place in range(3):
        bands[place] = np.random.default_rng(place).random((7, 5, 5)).astype(np.float32)
        np.save(tmp_path / f"{place}.npy", bands[place])
    data = ImageFolderDataModule(tmp_path, size=5, batch_size=3, num_workers=0, loader=np.load, indices=True)
    images, _, indices = next(iter(data.train_dataloader()))
    assert images.shape == (3, 7, 5, 5)
    for image, place in zip(images, indices.tolist(), strict=True):
        assert np.allclose(image.numpy(), bands[place])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((3, 4, 4), 2.0), r"`loader` must return floats in 0\.\.1, got \(2\.0, 2\.0\)"),
        (np.full((3, 4, 4), np.nan), r"`loader` must return floats in 0\.\.1"),
        (np.zeros((3, 4, 4), dtype=np.int32), r"`loader` must return uint8, uint16 or floats, got torch.int32"),
        (np.zeros(4), r"`loader` must be an image \(C, H, W\) or \(H, W\), got \(4,\)"),
        (np.zeros((3, 0, 4)), r"`loader` must be an image"),
    ],
)
def test_what_a_loader_may_not_return(tmp_path, value, message):
    _write(tmp_path / "a.png", 3)
    data = ImageFolderDataModule(tmp_path, size=4, batch_size=1, num_workers=0, loader=lambda path: value)
    with pytest.raises(RuntimeError, match=rf"a\.png: {message}"):
        next(iter(data.train_dataloader()))


def test_images_of_unlike_channels_are_named(tmp_path):
    _write(tmp_path / "a.png", 3)
    _write(tmp_path / "b.png", 3)

    def read(path):
        return np.zeros((3 if path.endswith("a.png") else 4, 4, 4), dtype=np.uint8)

    data = ImageFolderDataModule(tmp_path, size=4, batch_size=2, num_workers=0, loader=read)
    with pytest.raises(ValueError, match=r"same channels and type, got .*[ab]\.png and .*[ab]\.png\. Give a `loader`"):
        next(iter(data.train_dataloader()))


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        assert batch[0][:, 0, 0, 0].tolist() == batch[2].tolist()
        self.seen.append((self.current_epoch, batch[2].tolist()))
        return self.layer(batch[0][:, 0, 0, :1].float()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.layer(batch[0][:, 0, 0, :1].float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resume_in_mid_epoch(folder, workers):
    """With workers, prefetching must not start before the epoch of the resumed run is known."""
    data = {"batch_size": 2, "num_workers": workers, "indices": True}

    def fit(name, path=None, **kwargs):
        model, callback = Recorder(), ModelCheckpoint(folder / name, every_n_train_steps=6, save_top_k=-1)
        trainer = L.Trainer(**QUIET, callbacks=[callback], default_root_dir=folder, **kwargs)
        trainer.fit(model, datamodule=_data(folder, **data), ckpt_path=path)
        return model.seen, callback.best_model_path

    whole, _ = fit("whole", max_epochs=3)
    first, path = fit("first", max_steps=6)
    second, _ = fit("second", path=path, max_epochs=3)
    assert [epoch for epoch, _ in whole] == [0] * 4 + [1] * 4 + [2] * 4
    assert first + second == whole


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_run_without_validation_and_a_prediction(folder):
    model = Recorder()
    trainer = L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False)
    trainer.fit(
        model, datamodule=ImageFolderDataModule(folder / "train", size=6, batch_size=2, num_workers=0, indices=True)
    )
    assert len(model.seen) == 4
    model.forward = lambda batch: batch[2]
    predictions = trainer.predict(model, datamodule=_data(folder, indices=True))
    assert torch.cat(predictions).tolist() == [0, 1, 2]


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_two_ranks_share_each_epoch(folder):
    def fit(rank):
        model = Recorder()
        trainer = L.Trainer(**QUIET, strategy="ddp", devices=2, max_epochs=2, enable_checkpointing=False)
        trainer.fit(model, datamodule=_data(folder, indices=True))
        return model.seen

    ranks = run_processes(fit, 2, init=False)
    for epoch in range(2):
        rows = [row for seen in ranks for e, batch in seen if e == epoch for row in batch]
        assert len(rows) == len(set(rows)) == 8


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_prediction_on_two_ranks_has_each_path_once_and_in_order(folder):
    def predict(rank):
        model = Recorder()
        model.forward = lambda batch: batch[0][:, 0, 0, 0]
        trainer = L.Trainer(**QUIET, strategy="ddp", devices=2)
        data = ImageFolderDataModule(folder / "train", size=6, batch_size=2, num_workers=0)
        return torch.cat(trainer.predict(model, datamodule=data)).tolist()

    assert run_processes(predict, 2, init=False) == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


def _random_image(path):
    return torch.randint(0, 256, (1, 4, 4), dtype=torch.uint8)


@pytest.mark.slow
def test_workers_are_seeded_by_seed_and_epoch(folder):
    def images(seed, epoch):
        loader = _data(folder, loader=_random_image, num_workers=1, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch[0] for batch in loader])

    assert torch.equal(images(0, 1), images(0, 1))
    assert not torch.equal(images(0, 1), images(0, 2))
    assert not torch.equal(images(0, 1), images(1, 1))


def test_missing_and_empty_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`train_dir` must be an existing folder, got '.*nowhere'"):
        ImageFolderDataModule(tmp_path / "nowhere").setup()
    with pytest.raises(FileNotFoundError, match=r"`val_dir` must be an existing folder"):
        ImageFolderDataModule(folder / "train", tmp_path / "nowhere").setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`train_dir` must hold images, or class folders .*extensions are .*\.jpg"):
        ImageFolderDataModule(tmp_path / "empty").setup()
    (folder / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"`train_dir` must hold images in every class folder, got '.*eel'"):
        _data(folder).setup()


def test_loose_images_next_to_class_folders_are_an_error(folder):
    _write(folder / "train" / "loose.png", 1)
    with pytest.raises(ValueError, match=r"`train_dir` must hold class folders or images, not both.*loose\.png"):
        _data(folder).setup()


def test_classes_of_validation_must_be_known(folder):
    _write(folder / "val" / "emu" / "1.png", 1)
    with pytest.raises(ValueError, match=r"`val_dir` must have no class that `train_dir` lacks, got \['emu'\]"):
        _data(folder).setup()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` must be >= 1, got 0"),
        ({"size": 0}, r"`size` must be >= 1, got 0"),
        ({"num_workers": -1}, r"`num_workers` must be >= 0, got -1"),
        ({"resize": "pad"}, r"`resize` must be one of 'whole', 'crop', 'center', 'squash', got 'pad'"),
        ({"seed": -1}, r"`seed` must be >= 0, got -1"),
    ],
)
def test_bad_arguments(folder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _data(folder, **kwargs)
    with pytest.raises(ValueError, match=r"`batch_size` must be at most 9, .* got 10"):
        _data(folder, batch_size=10).train_dataloader()
    with pytest.raises(ValueError, match=r"`split` must be one of 'train', 'val', got 'test'"):
        _data(folder).paths("test")

"""Images in shards: the same batches as from the folder, each image once, exact resume, broken records by name."""

import contextlib
import gc
import io
import json
import os
import shutil
import tarfile
import types
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from lightning_contrast.augment import WholeImages
from lightning_contrast.callbacks import StepSeed
from lightning_contrast.cli.optimize_command import run_optimize
from lightning_contrast.data import ImageFolderDataModule, StreamingImageDataModule, decoding, write_shards
from lightning_contrast.data.decoding import decode, decoded_on, encoded, encoded_batch, upright
from lightning_contrast.data.shard_order import ShardOrder
from lightning_contrast.testing import assert_resume_exact
from tests.launch import run_processes

FORMATS = ("litdata", "webdataset")
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}
MOVED = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*validation images are training images too"),
    pytest.mark.filterwarnings("ignore:unclosed file <_io.FileIO name='.*chunk-"),  # litdata leaves it to Python
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # in litdata's decoder
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]


def _picture(place, shape=(30, 40)):
    """Return a smooth image that JPEG keeps, with a red value that is its place."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.stack([np.full(shape, 4 * place), rows * 6, columns * 5], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images in three classes, of several formats, modes, shapes and orientations."""
    root = tmp_path_factory.mktemp("images")
    for place in range(48):
        image, options = Image.fromarray(_picture(place, (24 + place % 7, 36 - place % 5))), {}
        ending = ("png", "jpg", "jpg", "bmp", "webp", "jpg")[place % 6]
        if ending == "jpg":
            exif = Image.Exif()
            exif[0x0112] = place % 8 + 1
            options = {"exif": exif, "quality": 95}
            image = image.convert("L") if place % 12 == 1 else image.convert("CMYK") if place % 12 == 2 else image
        path = root / "abc"[place % 3] / f"{place:02}.{ending}"
        path.parent.mkdir(exist_ok=True)
        image.save(path, **options)
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """The images in shards of six, in both formats."""
    root = tmp_path_factory.mktemp("shards")
    for name in FORMATS:
        write_shards(folder, root / name, format=name, images_per_shard=6)
    return root


def _data(train, val=None, **kwargs):
    return StreamingImageDataModule(
        train, val, **({"size": 16, "batch_size": 4, "num_workers": 0, "indices": True} | kwargs)
    )


def _epoch(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [batch[2].tolist() for batch in loader]


def _flat(batches):
    return [position for batch in batches for position in batch]


class Recorder(L.LightningModule):
    """Notes epoch and positions of each training batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        images, _, positions = batch
        self.seen.append((self.current_epoch, positions.tolist()))
        return self.layer(torch.as_tensor(images)[:, 0, 0, :1].float() / 255).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("resize", ["whole", "squash"])
@pytest.mark.parametrize("name", FORMATS)
def test_batches_equal_those_of_the_folder(name, resize, folder, shards):
    whole = ImageFolderDataModule(folder, folder, size=16, batch_size=48, num_workers=0, resize=resize)
    images, labels = next(iter(whole.val_dataloader()))
    data = _data(shards / name, shards / name, resize=resize, num_workers=1)
    found = [torch.cat(part) for part in zip(*data.val_dataloader(), strict=True)]
    # the shards hold the files in a random order; the red value of PNG, BMP and JPEG finds them again
    order = [whole.paths().index(path) for path in _sources(folder, data)]
    assert found[0].dtype == torch.uint8
    assert sorted(order) == list(range(48)) != order
    assert torch.equal(found[0], images[order])
    assert torch.equal(found[1], labels[order])
    assert found[2].tolist() == list(range(48))
    assert data.num_classes == 3


def _sources(folder, data):
    """Return the files of the folder whose content is that of the records."""
    contents = {path.read_bytes(): str(path) for path in folder.rglob("*.*")}
    records = data._sets["val"].shards
    return [contents[bytes(records.read(position)[0])] for position in range(len(records))]


@pytest.mark.parametrize("name", FORMATS)
def test_training_batches_are_whole_images_of_the_folder(name, folder, shards):
    data = _data(shards / name, shards / name)
    images, labels, positions = next(iter(data.train_dataloader()))
    assert isinstance(images, WholeImages)
    sources = _sources(folder, data)
    for image, size, label, position in zip(images.pixels, images.sizes, labels, positions, strict=True):
        pixels = decode(Path(sources[position]).read_bytes())
        assert size.tolist() == list(pixels.shape[1:])
        assert label == "abc".index(Path(sources[position]).parent.name)
        assert (image[0].float().mean() - pixels[0].float().mean()).abs() < 1


@pytest.mark.parametrize(
    ("sizes", "replicas", "workers", "batch_size", "mix"),
    [([7] * 12, 3, 2, 2, 2), ([5, 1, 9, 3, 30, 2], 2, 3, 4, 4), ([3, 4], 1, 1, 7, 1), ([2] * 50, 4, 5, 5, 3)],
)
def test_an_order_has_each_image_once_and_few_shards_per_worker(sizes, replicas, workers, batch_size, mix):
    order = ShardOrder(sizes, replicas=replicas, workers=workers, batch_size=batch_size, mix_shards=mix)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    epochs = [order.order(seed=1, epoch=epoch).tolist() for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(sum(sizes)))
        share, pairs = sum(sizes) // replicas, 0  # of a worker and a shard that it reads
        for rank in range(replicas):
            own = rows[: share * replicas][rank::replicas]
            batches = [own[start : start + batch_size] for start in range(0, share - batch_size + 1, batch_size)]
            for worker in range(workers):
                read = [shard_of[row] for batch in batches[worker::workers] for row in batch]
                spans = [[place for place, found in enumerate(read) if found == shard] for shard in set(read)]
                open_at_once = [sum(span[0] <= place <= span[-1] for span in spans) for place in range(len(read))]
                assert max(open_at_once, default=0) <= mix
                pairs += len(spans)
        assert pairs <= len(sizes) + replicas * workers - 1  # each cut of the sequence divides at most one shard
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.order(seed=1, epoch=0).tolist() == epochs[0]
    assert order.order(seed=2, epoch=0).tolist() != epochs[0]


def test_few_shards_are_mixed_evenly():
    order = ShardOrder([100] * 8, replicas=1, workers=1, batch_size=100, mix_shards=4).order(seed=0, epoch=0)
    counts = torch.bincount(order[:100] // 100, minlength=8)
    assert (counts > 0).sum() == 4
    assert counts.max() < 50


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.slow
def test_an_epoch_has_each_image_once_for_any_number_of_workers(name, shards):
    for workers in (0, 2):
        data = _data(shards / name, num_workers=workers)
        first, second = _epoch(data), _epoch(data, 1)
        assert sorted(_flat(first)) == sorted(_flat(second)) == list(range(48))
        assert first != second
        assert first == _epoch(_data(shards / name, num_workers=workers))
        assert first != _epoch(_data(shards / name, num_workers=workers, seed=1))


@pytest.mark.dist
@pytest.mark.parametrize("name", FORMATS)
def test_two_ranks_with_two_workers_have_each_image_once(name, shards):
    def fit(rank):
        model = Recorder()
        trainer = L.Trainer(**QUIET, strategy="ddp", devices=2, max_epochs=2)
        trainer.fit(model, datamodule=_data(shards / name, shards / name, num_workers=2, batch_size=3))
        return model.seen

    ranks = run_processes(fit, 2, init=False)
    orders = []
    for epoch in range(2):
        rows = [[row for e, batch in seen if e == epoch for row in batch] for seen in ranks]
        assert [len(own) for own in rows] == [24, 24]
        assert sorted(rows[0] + rows[1]) == list(range(48))
        orders.append(rows)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.slow
def test_a_run_resumes_exactly_within_an_epoch(name, shards):
    assert_resume_exact(
        Recorder,
        lambda: _data(shards / name, shards / name, num_workers=2),
        lambda: [StepSeed(0)],
        stop="mid-epoch",
        enable_progress_bar=False,
    )


@pytest.mark.slow
def test_a_probe_that_reads_the_training_images_does_not_move_the_run(shards):
    def seen(callbacks):
        model = Recorder()
        trainer = L.Trainer(**QUIET, max_epochs=3, callbacks=callbacks)
        trainer.fit(model, datamodule=_data(shards / "litdata", shards / "webdataset", resize="center"))
        return model.seen

    class Bank(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            assert sum(len(batch[0]) for batch in trainer.train_dataloader) == 48

    plain = seen([])
    assert seen([Bank()]) == plain
    assert len({tuple(_flat(rows for epoch, rows in plain if epoch == number)) for number in range(3)}) == 3


def test_a_resume_does_not_read_the_images_before_it(shards, monkeypatch):
    data = _data(shards / "litdata")
    loader = data.train_dataloader()
    whole = [batch[2].tolist() for batch in loader]
    state = loader.state_dict() | {"position": 9}
    again = data.train_dataloader()
    read = []
    records, fetch = data._sets["train"].shards, type(data._sets["train"].shards).read
    monkeypatch.setattr(type(records), "read", lambda self, position: (read.append(position), fetch(self, position))[1])
    again.load_state_dict(state)
    assert [batch[2].tolist() for batch in again] == whole[9:]
    assert len(read) == 12


@pytest.mark.parametrize(
    ("change", "name"),
    [({"num_workers": 1}, "workers"), ({"mix_shards": 2}, "mix_shards"), ({"batch_size": 3}, "batch_size")],
)
def test_a_resume_with_another_order_is_refused_by_name(change, name, shards):
    loader = _data(shards / "litdata", num_workers=2).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    other = _data(shards / "litdata", **({"num_workers": 2} | change)).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=rf"same data layout, got .*'{name}'.*instead of"):
        next(iter(other))


def test_a_resume_with_other_shards_is_refused(shards, folder, tmp_path):
    write_shards(folder, tmp_path / "other", images_per_shard=8)
    loader = _data(shards / "litdata").train_dataloader()
    next(iter(loader))
    other = _data(tmp_path / "other").train_dataloader()
    other.load_state_dict(loader.state_dict() | {"position": 1})
    with pytest.raises(ValueError, match=r"same data layout, got .*'shards'"):
        next(iter(other))


@pytest.fixture(params=FORMATS)
def broken(request, folder, tmp_path):
    """Shards of 48 images of which one is cut off."""
    for path in folder.rglob("*.*"):
        target = tmp_path / "images" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        target.write_bytes(content[: len(content) // 2] if path.name == "07.jpg" else content)
    return write_shards(tmp_path / "images", tmp_path / "shards", format=request.param, images_per_shard=6)


def test_a_broken_record_is_named(broken):
    data = _data(broken)
    with pytest.raises(
        RuntimeError, match=r"Cannot read the image .*(chunk-0-\d\.bin, record \d|\.tar, file \d+\.jpg)"
    ):
        _epoch(data)


@pytest.mark.filterwarnings("ignore:Cannot read the image")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_a_broken_record_is_skipped_and_counted(broken, workers):
    data = _data(broken, broken, on_error="skip", num_workers=workers)
    with pytest.warns(UserWarning, match=r"Images were skipped. train: 1 of 48 images could not be read: .*val: 1 of"):
        L.Trainer(**QUIET, max_epochs=1).fit(Recorder(), datamodule=data)
    assert len(data.skipped) == 2
    assert data.skipped[0] == data.skipped[1]
    (bad,) = data._sets["train"].unreadable.nonzero().flatten().tolist()
    assert bad not in _flat(_epoch(data))
    assert sum(len(batch[0]) for batch in data.val_dataloader()) == 47


@pytest.mark.parametrize("workers", [0, 2])
def test_an_address_is_copied_to_the_cache(shards, tmp_path, workers):
    address, cache = f"local:{shards / 'litdata'}", tmp_path / "cache"  # litdata copies from it as from s3://
    data = _data(address, cache_dir=cache, num_workers=workers)
    local = _data(shards / "litdata", num_workers=workers)
    for batch, other in zip(data.train_dataloader(), local.train_dataloader(), strict=True):
        assert torch.equal(batch[0].pixels, other[0].pixels)
        assert torch.equal(batch[1], other[1])
    copied = {path.name: path.stat().st_mtime_ns for path in cache.rglob("chunk-*.bin")}
    assert len(copied) == 8
    assert len(_epoch(_data(address, cache_dir=cache))) == 12
    assert copied == {path.name: path.stat().st_mtime_ns for path in cache.rglob("chunk-*.bin")}
    assert data.num_classes == 3


def _bytes_of(folder):
    total = 0
    for path in folder.rglob("chunk-*.bin"):
        with contextlib.suppress(FileNotFoundError):  # removed by a worker in the meantime
            total += path.stat().st_size
    return total


@pytest.mark.parametrize(("workers", "mix"), [(0, 2), (2, 1)])
def test_a_set_larger_than_the_cache_is_read_within_it(shards, tmp_path, workers, mix):
    address, cache = f"local:{shards / 'litdata'}", tmp_path / "cache"
    largest = max(path.stat().st_size for path in (shards / "litdata").glob("*.bin"))
    options = {"num_workers": workers, "cache_dir": cache, "mix_shards": mix}
    size = (mix + 1) * max(workers, 1) * largest / 1e9
    data = _data(address, cache_gb=size, **options)
    loader = data.train_dataloader()
    assert not data._sets["train"].shards.copies.shared
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        seen, most = [], 0
        for batch in loader:
            seen += batch[2].tolist()
            most = max(most, _bytes_of(cache))
        assert sorted(seen) == list(range(48))
        assert 0 < most <= size * 1e9
    with pytest.raises(ValueError, match="`cache_gb` must be at least"):
        _data(address, cache_gb=size * 0.99, **options).train_dataloader()
    (cache / next(cache.iterdir()).name / "process-999999999-x").mkdir()  # of a killed process
    data = _data(address, cache_gb=size, **options)
    data.setup()
    assert not list(cache.rglob("process-999999999-x"))
    if workers:
        assert not list(cache.rglob("chunk-*.bin"))  # the workers have ended


@pytest.mark.slow
def test_decoding_where_the_batch_is_used_gives_the_same_batches(shards):
    class Batches(Recorder):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.seen.append(batch)

    def seen(decode):
        model = Batches()
        data = _data(shards / "litdata", shards / "webdataset", decode=decode, num_workers=1, batch_size=8)
        L.Trainer(**QUIET, max_epochs=1).fit(model, datamodule=data)
        return [batch for batch in model.seen if not isinstance(batch, tuple)]

    batches = list(zip(seen("workers"), seen("device"), strict=True))
    assert len(batches) == 12
    for batch, other in batches:
        assert all(torch.equal(part, same) for part, same in zip(batch, other, strict=True))


def _jpeg(pixels, orientation=1):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_upright(orientation):
    data = _jpeg(_picture(3), orientation)
    stored = decode(data, exif=False)
    assert torch.equal(upright(stored, encoded(data, exif=True, seed=None).orientation), decode(data))
    assert (orientation in (5, 6, 7, 8)) == (decode(data).shape == (3, 40, 30))


@MOVED
def test_jpegs_of_a_gpu_are_decoded_in_one_call_and_a_damaged_one_is_named(monkeypatch):
    """Without a GPU: nvJPEG is replaced by the decoder of the host, which ignores the orientation as nvJPEG does."""
    calls = []

    def decoder(files, device):
        calls.append(len(files))
        return [decode_jpeg(file, mode=ImageReadMode.RGB) for file in files]

    monkeypatch.setattr(decoding, "_by_nvjpeg", decoder)
    files = [_jpeg(_picture(place), place + 1) for place in range(8)]
    gpu = types.SimpleNamespace(type="cuda")

    def run(files):
        batch = encoded_batch([encoded(file, exif=True, seed=None) for file in files], list("abcdefgh"), [])
        options = {"size": 20, "training": "squash", "evaluation": "squash", "exif": True}
        return [decoded_on(device, batch, **options)[0] for device in (gpu, torch.device("cpu"))]

    found, expected = run(files)
    assert torch.equal(found, expected)
    assert calls == [8]
    files[5] = files[5][:-40]
    with pytest.raises(RuntimeError, match="Cannot decode the image f: "):
        run(files)


@MOVED
@pytest.mark.parametrize("value", ["pair", "pil", "tensor"])
def test_records_of_others_are_read(value, tmp_path):
    from litdata.streaming import Cache

    cache = Cache(str(tmp_path), chunk_size=4)
    for place in range(8):
        image = Image.open(io.BytesIO(_jpeg(_picture(place))))
        record = {"pair": (_jpeg(_picture(place)), place % 2), "pil": {"picture": image, "class": place % 2}}
        record["tensor"] = {"picture": torch.from_numpy(_picture(place)).permute(2, 0, 1).contiguous()}
        cache[place] = record[value]
    cache.done()
    cache.merge(1)
    keys = {"image_key": "picture", "label_key": "class"}
    data = _data(tmp_path, tmp_path, resize="center", batch_size=8, **keys)
    images, labels, _ = next(iter(data.val_dataloader()))
    assert labels.tolist() == ([-1] * 8 if value == "tensor" else [0, 1] * 4)
    assert (images[:, 0].float().mean(dim=(1, 2)) - 4 * torch.arange(8)).abs().max() < 2
    assert data.num_classes == 0


@pytest.mark.parametrize("name", FORMATS)
def test_labels_are_optional(name, folder, shards, tmp_path):
    write_shards(folder / "a", tmp_path / "shards", format=name, images_per_shard=6)
    assert next(iter(_data(tmp_path / "shards").train_dataloader()))[1].tolist() == [-1] * 4
    assert next(iter(_data(shards / name, labels=False).train_dataloader()))[1].tolist() == [-1] * 4
    with pytest.raises(ValueError, match="`train` must have labels, since `labels=True`"):
        _data(tmp_path / "shards", labels=True).setup()


def test_validation_shards_take_the_numbers_of_the_training_classes(folder, shards, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("b", "c"):
        (tmp_path / "images" / name).symlink_to(folder / name)
    write_shards(tmp_path / "images", tmp_path / "alone", images_per_shard=8)
    with pytest.raises(ValueError, match=r"`val` must have the classes of `train`, in its order, got \['a'\]"):
        _data(shards / "litdata", tmp_path / "alone").setup()
    written = run_optimize(
        [str(tmp_path / "images"), str(tmp_path / "val"), "--like", str(shards / "litdata"), "--format", "webdataset"]
    )
    data = _data(shards / "litdata", written)
    assert {label for batch in data.val_dataloader() for label in batch[1].tolist()} == {1, 2}
    with pytest.raises(ValueError, match=r"`folder` must have only classes of .*, got \['a'\]"):
        write_shards(folder, tmp_path / "more", like=tmp_path / "alone")


def test_writing_is_a_function_of_the_seed(folder, shards, tmp_path):
    for seed in (0, 1):
        write_shards(folder, tmp_path / str(seed), format="webdataset", images_per_shard=6, seed=seed)
    tars = [
        [path.read_bytes() for path in sorted(root.glob("*.tar"))] for root in (shards / "webdataset", tmp_path / "0")
    ]
    assert tars[0] == tars[1]
    assert tars[0] != [path.read_bytes() for path in sorted((tmp_path / "1").glob("*.tar"))]
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        write_shards(folder, tmp_path / "0")


def _tar(path, **files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _mixed(root, shards):
    (root / "index.json").write_text("{}")
    _tar(root / "a.tar", a_jpg=b"")


def _emptied(root, shards):
    index = json.loads((shards / "litdata" / "index.json").read_text())
    (root / "index.json").write_text(json.dumps(index | {"chunks": []}))


def _cut(root, shards):
    for path in (shards / "litdata").iterdir():
        content = path.read_bytes()
        (root / path.name).write_bytes(content[:-9] if path.name == "chunk-0-3.bin" else content)


BAD_FOLDERS = {
    "nothing": (lambda root, shards: None, "`train` must hold shards .*lightning-contrast optimize FOLDER OUTPUT"),
    "both formats": (_mixed, "`train` must hold shards of one format"),
    "no chunks": (_emptied, "`train` must hold images, got '.*with empty shards'"),
    "no index": (lambda root, shards: (root / "index.json").write_text("{"), "`train` must hold a valid index.json"),
    "cut chunk": (_cut, r"`train` must hold the \d+ bytes of chunk-0-3.bin, got \d+"),
    "empty tar": (lambda root, shards: _tar(root / "a.tar"), "`train` must hold samples in every shard, got '.*a.tar'"),
    "no tar": (lambda root, shards: (root / "a.tar").write_text("x" * 999), "`train` must be readable tar files"),
    "text only": (lambda root, shards: _tar(root / "a.tar", a_txt=b"x"), "a.tar` must have an image in each sample"),
    "bad class": (
        lambda root, shards: _tar(root / "a.tar", a_jpg=b"", a_cls=b"cat"),
        "must hold the number of a class",
    ),
    "some labels": (
        lambda root, shards: _tar(root / "a.tar", a_jpg=b"", a_cls=b"1", b_jpg=b""),
        "`train` must have labels in all samples or in none",
    ),
    "twice": (lambda root, shards: _tar(root / "a.tar", a_jpg=b"", a_JPG=b""), "a.tar` must have each file once"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_shards_are_refused(case, shards, tmp_path):
    make, message = BAD_FOLDERS[case]
    make(tmp_path, shards)
    with pytest.raises(ValueError, match=message):
        _data(tmp_path).setup()


class Harmful:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore")  # of litdata's writer
def test_shards_with_pickled_objects_are_refused_before_one_is_read(tmp_path):
    from litdata.streaming.writer import BinaryWriter

    made = tmp_path / "made"
    writer = BinaryWriter(str(tmp_path / "shards"), chunk_size=4, compression=None)
    for place in range(4):
        writer[place] = {"image": Harmful(str(made))}
    writer.done()
    writer.merge()
    shutil.rmtree(made, ignore_errors=True)  # the writer copies its records
    with pytest.raises(ValueError, match=r"`train` must hold records without pickled objects, got \['pickle'\]"):
        _data(tmp_path / "shards").setup()
    assert not made.exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": "no/folder"}, FileNotFoundError, "`train` must be an existing folder"),
        ({"train": "no/{0..2}.tar"}, FileNotFoundError, "`train` must name existing tar files, got .*no/0.tar"),
        ({"train": ["a.tar", "b"]}, ValueError, "`train` must be tar files or one folder"),
        ({"train": []}, ValueError, "`train` must name a folder or tar files"),
        ({"train": "a.tar.gz"}, ValueError, "`train` must be uncompressed tar files"),
        ({"train": "https://a.b/c.tar"}, ValueError, "`train` must be local tar files"),
        ({"image_key": "picture"}, ValueError, "`train` must have the key 'picture' in its records, got .*'image'"),
        ({"decode": "gpu"}, ValueError, "`decode` must be one of 'workers', 'device'"),
        ({"decode": "device", "on_error": "skip"}, ValueError, '`on_error` must be "raise" with'),
        ({"mix_shards": 0}, ValueError, "`mix_shards` must be >= 1"),
        ({"cache_dir": "x"}, ValueError, "`cache_dir` must be left out without an address"),
        ({"cache_gb": 1}, ValueError, "`cache_gb` must be left out without an address"),
        ({"train": "local:no", "cache_gb": 0}, ValueError, "`cache_gb` must be > 0"),
        ({"train": "local:no"}, ValueError, "`cache_dir` must be given for an address"),
        ({"size": 0}, ValueError, "`size` must be >= 1"),
        ({"batch_size": 49}, ValueError, "`batch_size` must be at most 48"),
    ],
)
def test_bad_arguments_are_refused(change, error, message, shards):
    with pytest.raises(error, match=message):
        _data(**({"train": shards / "litdata"} | change)).train_dataloader()


def test_a_missing_library_is_named_with_its_extra(shards, monkeypatch):
    for name, library in (("litdata", "litdata"), ("webdataset", "webdataset.shardlists")):
        monkeypatch.setitem(__import__("sys").modules, library, None)
        source = shards / name if name == "litdata" else str(shards / name / "shard-{000000..000003}.tar")
        with pytest.raises(ModuleNotFoundError, match=rf"need {name}: pip install 'lightning_contrast\[stream\]'"):
            _data(source).setup()


def _open_files():
    """Paths behind the descriptors of this process."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            yield os.readlink(f"/proc/self/fd/{descriptor}")


@pytest.mark.slow
def test_shards_are_closed_with_their_module(folder, tmp_path):
    write_shards(folder, tmp_path / "tars", format="webdataset", images_per_shard=3)
    opened = []
    for _ in range(2):
        module = StreamingImageDataModule(tmp_path / "tars", size=8, batch_size=2, num_workers=0)
        module.setup("fit")
        for batch in module.train_dataloader():
            assert len(batch[0]) == 2
        del module, batch
        gc.collect()
        opened.append([link for link in _open_files() if str(tmp_path) in link])
    assert opened == [[], []]

"""Public sets, read from small archives in their own formats on disk."""

import bz2
import gzip

import numpy as np
import pytest
import torch

from lightning_contrast.data import ImageDataModule
from tests.archives import write_cifar

RNG = np.random.default_rng(0)


def _idx(root, packed, rows=(8, 5)):
    """Write the four files of MNIST's format."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, prefix, count in (("train", "train", rows[0]), ("test", "t10k", rows[1])):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, count, dtype=np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content, name = header + array.tobytes(), f"{prefix}-{kind}-idx{array.ndim}-ubyte"
            if packed:
                (root / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (root / name).write_bytes(content)
        written[part] = images[:, None], labels.tolist()
    return written


def _stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    written = {}
    for part, count in (("train", 4), ("test", 3), ("unlabeled", 5)):
        images = RNG.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        labels = RNG.integers(1, 11, count, dtype=np.uint8)
        (folder / f"{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())  # columns first on disk
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes(labels.tobytes())
        written[part] = images, (labels.astype(int) - 1).tolist() if part != "unlabeled" else [-1] * count
    (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))
    (folder / "fold_indices.txt").write_text("0 1\n")
    return written


@pytest.fixture
def no_md5(monkeypatch):
    """Our archives are whole, but their checksums are not those of the published ones."""
    from torchvision.datasets import cifar, stl10, svhn, usps

    for module in (cifar, stl10, svhn, usps):
        if hasattr(module, "check_integrity"):
            monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: True)


def _same(data, split, expected):
    images, labels = expected
    assert data.images(split).dtype == torch.uint8
    assert (data.images(split).numpy() == images).all()
    assert data.images(split).shape == images.shape
    assert data.labels(split).tolist() == labels


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, no_md5, name):
    written = write_cifar(tmp_path, name, RNG)
    data = ImageDataModule(name, tmp_path, batch_size=2, indices=True)
    data.prepare_data()
    data.setup()
    _same(data, "train", written["train"])
    _same(data, "test", written["test"])
    _same(data, "val", written["test"])
    assert data.num_classes == int(name[5:])
    images, labels, indices = next(iter(data.train_dataloader()))
    assert (images.numpy() == written["train"][0][indices]).all()
    assert labels.tolist() == [written["train"][1][i] for i in indices]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", ["", "{name}/raw"])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_mnist_and_its_likes(tmp_path, name, inside, packed):
    written = _idx(tmp_path / inside.format(name=name), packed)
    data = ImageDataModule(name, tmp_path, batch_size=3)
    for split in ("train", "test"):
        _same(data, split, written[split])
    colored = ImageDataModule(name, tmp_path, batch_size=3, channels=3)
    for split in ("train", "test"):
        _same(colored, split, (np.repeat(written[split][0], 3, axis=1), written[split][1]))
    assert next(iter(colored.train_dataloader()))[0].shape == (3, 3, 28, 28)
    assert colored.images("train").untyped_storage().nbytes() == 8 * 28 * 28  # repeated without a copy


def test_torchvision_reads_the_same_files_alike(tmp_path):
    from torchvision.datasets import MNIST

    _idx(tmp_path / "MNIST/raw", packed=False)
    theirs, ours = MNIST(str(tmp_path), train=True), ImageDataModule("MNIST", tmp_path, batch_size=1)
    assert torch.equal(theirs.data[:, None], ours.images("train"))
    assert torch.equal(theirs.targets, ours.labels("train"))


def test_stl10_and_its_unlabeled_images(tmp_path, no_md5):
    written = _stl10(tmp_path)
    _same(ImageDataModule("STL10", tmp_path, batch_size=1), "train", written["train"])
    data = ImageDataModule("STL10", tmp_path, batch_size=2, train_split="unlabeled")
    _same(data, "train", written["unlabeled"])
    _same(data, "test", written["test"])
    both = ImageDataModule("STL10", tmp_path, batch_size=2, train_split="train+unlabeled")
    (images, labels), (more, none) = written["train"], written["unlabeled"]
    _same(both, "train", (np.concatenate([images, more]), labels + none))


def test_svhn(tmp_path, no_md5):
    savemat = pytest.importorskip("scipy.io").savemat
    written = {}
    for part in ("train", "extra", "test"):
        images, labels = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8), np.array([[1], [10], [3], [9], [10]])
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels})
        written[part] = images, [1, 0, 3, 9, 0]  # on disk, 10 stands for the digit 0
    for part in ("train", "extra"):
        data = ImageDataModule("SVHN", tmp_path, batch_size=2, train_split=part)
        _same(data, "train", written[part])
        _same(data, "test", written["test"])


def test_usps(tmp_path, no_md5):
    written = {}
    for part, name in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        images, labels = RNG.integers(0, 256, (4, 1, 16, 16), dtype=np.uint8), [0, 9, 4, 2]
        lines = [
            f"{label + 1} " + " ".join(f"{i + 1}:{value / 127.5 - 1:.6f}" for i, value in enumerate(image.ravel()))
            for image, label in zip(images, labels, strict=True)
        ]
        (tmp_path / name).write_bytes(bz2.compress("\n".join(lines).encode()))
        written[part] = images, labels
    data = ImageDataModule("USPS", tmp_path, batch_size=2)
    for part in ("train", "test"):
        assert (abs(data.images(part).numpy().astype(int) - written[part][0]) <= 1).all()  # torchvision cuts fractions
        assert data.labels(part).tolist() == written[part][1]
        assert data.images(part).shape == (4, 1, 16, 16)


def test_validation_images_come_from_the_training_images(tmp_path):
    written = _idx(tmp_path, packed=True, rows=(40, 5))
    parts = {}
    for seed in (0, 1):
        data = ImageDataModule("MNIST", tmp_path, batch_size=2, validation_size=10, seed=seed)
        parts[seed] = {split: data.images(split).flatten(1).tolist() for split in ("train", "val", "test")}
        assert (len(data.images("val")), len(data.images("train"))) == (10, 30)
        labels = {tuple(image.flatten()): label for image, label in zip(*written["train"], strict=True)}
        for split in ("train", "val"):
            assert [labels[tuple(i.flatten().tolist())] for i in data.images(split)] == data.labels(split).tolist()
    assert parts[0] == parts[1]  # settings are compared on the same images, whatever the seed
    assert sorted(parts[0]["train"] + parts[0]["val"]) == sorted(written["train"][0].reshape(40, -1).tolist())
    assert parts[0]["test"] == written["test"][0].reshape(5, -1).tolist()
    with pytest.raises(ValueError, match=r"`validation_size` must be < 40, the training images, got 40"):
        ImageDataModule("MNIST", tmp_path, batch_size=2, validation_size=40).images("train")


def test_download_is_torchvisions_and_happens_in_prepare_data(tmp_path, monkeypatch):
    from torchvision import datasets

    calls = []

    class CIFAR10:
        def __init__(self, root, train, download):
            calls.append((root, train, download))
            self.data, self.targets = np.zeros((4, 32, 32, 3), dtype=np.uint8), [0] * 4

    monkeypatch.setattr(datasets, "CIFAR10", CIFAR10)
    data = ImageDataModule("CIFAR10", tmp_path, batch_size=2, download=True)
    data.prepare_data()
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, True)]
    data.setup()
    data.setup("fit")
    assert calls[2:] == [(str(tmp_path), True, False), (str(tmp_path), False, False)]  # read once, downloading nothing
    calls.clear()
    ImageDataModule("CIFAR10", tmp_path, batch_size=2).prepare_data()
    assert calls == []


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("CIFAR10", "cifar-10-batches-py/"),
        ("MNIST", "MNIST/raw/"),
        ("FashionMNIST", "/usr/share/datasets/fashion-mnist"),
        ("STL10", "stl10_binary/"),
        ("USPS", "usps.bz2"),
    ],
)
def test_missing_data_says_what_to_do(tmp_path, name, files):
    data = ImageDataModule(name, tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=rf"`root` must hold all of {name}.*got '.*nowhere'\. Set `download=True`"
    ) as info:
        data.setup("fit")
    assert files in str(info.value)


def test_broken_idx_files_are_named(tmp_path):
    _idx(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"Cannot unpack .*train-images-idx3-ubyte\.gz"):
        ImageDataModule("MNIST", tmp_path).images("train")
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match=r"`root` must hold complete files .*train-images-idx3-ubyte\.gz"):
        ImageDataModule("MNIST", tmp_path).images("train")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"dataset": "CIFAR11"},
            r"`dataset` must be one of 'CIFAR10', 'CIFAR100', .*'USPS', got 'CIFAR11'. Did you mean",
        ),
        ({"batch_size": 0}, r"`batch_size` must be >= 1, got 0"),
        ({"channels": 1}, r"`channels` must be None or 3 for CIFAR10, got 1"),
        ({"dataset": "MNIST", "channels": 2}, r"`channels` must be None, 1 or 3 for MNIST, got 2"),
        ({"train_split": "unlabeled"}, r"`train_split` must be one of 'train', got 'unlabeled'"),
        ({"validation_size": -1}, r"`validation_size` must be >= 0, got -1"),
        (
            {"dataset": "STL10", "train_split": "unlabeled", "validation_size": 5},
            r"`validation_size` must be 0 if `train_split` is 'unlabeled', got 5",
        ),
    ],
)
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**({"dataset": "CIFAR10", "root": tmp_path} | kwargs))

"""Small archives of public sets in their own formats, made up, to be read by the real readers."""

import pickle
import tarfile

import numpy as np

CIFAR_FOLDERS = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}


def write_cifar(root, name, rng, rows=6):
    """Write the folder of CIFAR's archive with some rows per file; return images and labels of both parts."""
    from torchvision import datasets

    folder = root / CIFAR_FOLDERS[name]
    folder.mkdir()
    key, classes = ("labels", 10) if name == "CIFAR10" else ("fine_labels", 100)
    written = {}
    for part, files in (("train", getattr(datasets, name).train_list), ("test", getattr(datasets, name).test_list)):
        images, labels = [], []
        for file, _ in files:
            data = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
            numbers = rng.integers(0, classes, rows).tolist()
            (folder / file).write_bytes(pickle.dumps({"data": data, key: numbers}))
            images.append(data)
            labels += numbers
        written[part] = np.concatenate(images).reshape(-1, 3, 32, 32), labels
    meta = getattr(datasets, name).meta
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [str(n) for n in range(classes)]}))
    return written


def pack_cifar10(root, rng, rows=6):
    """Write CIFAR-10's archive as it is downloaded, a ``.tar.gz`` whose folder is not unpacked."""
    written = write_cifar(root, "CIFAR10", rng, rows)
    folder = root / CIFAR_FOLDERS["CIFAR10"]
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return written

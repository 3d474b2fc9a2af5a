"""Images per second of a training epoch: shards against a folder, and lightly's dataset of the same files."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lightly.data import LightlyDataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, PILToTensor, Resize

from benchmarks.common import alternate, report
from lightning_contrast.data import ImageFolderDataModule, StreamingImageDataModule, write_shards

IMAGES, BATCH, SIZE = 512, 64, 224


def photographs(folder: Path) -> None:
    """Write JPEGs of a photograph's size and detail, 500 x 375, in four classes."""
    draws = np.random.default_rng(0)
    for place in range(IMAGES):
        coarse = Image.fromarray(draws.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noise = draws.normal(0, 8, (375, 500, 3))
        path = folder / f"class{place % 4}" / f"{place:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(path, quality=85)


def epoch(loader: Callable[[], Iterable[Any]]) -> Callable[[], None]:
    """Return a function that reads an epoch, which has `IMAGES` images, with the start of its workers."""

    def read() -> None:
        found = sum(len(batch[0]) for batch in loader())
        assert found == IMAGES, found

    return read


def measure(root: Path, workers: int, repeats: int) -> dict[str, object]:
    options: dict[str, Any] = {"size": SIZE, "batch_size": BATCH, "num_workers": workers}
    folder = ImageFolderDataModule(root / "images", **options)
    chunks = StreamingImageDataModule(root / "litdata", **options)
    tars = StreamingImageDataModule(root / "webdataset", **options)
    squares = Compose([Resize((SIZE, SIZE)), PILToTensor()])
    lightly = LightlyDataset(str(root / "images"), transform=squares)
    peer = DataLoader(lightly, BATCH, shuffle=True, drop_last=True, num_workers=workers)
    for data in (folder, chunks, tars):
        data.setup()
    times = alternate(
        {
            "folder": epoch(folder.train_dataloader),
            "litdata": epoch(chunks.train_dataloader),
            "webdataset": epoch(tars.train_dataloader),
            "lightly": epoch(lambda: peer),
        },
        repeats=repeats,
    )
    rates = {name: IMAGES / found["median_s"] for name, found in times.items()}
    slowest = {name: IMAGES / found["max_s"] for name, found in times.items()}
    return (
        {"workers": workers}
        | {f"{name} images/s": rate for name, rate in rates.items()}
        | {f"{name} slowest": rate for name, rate in slowest.items()}
        | {"litdata / lightly": rates["litdata"] / rates["lightly"]}
    )


def main(repeats: int = 3) -> None:
    notes = (
        f"Images/s of an epoch of {IMAGES} generated JPEGs of 500 x 375 pixels, read, decoded and resized to {SIZE} x "
        f"{SIZE} uint8 in batches of {BATCH}: `ImageFolderDataModule`, `StreamingImageDataModule` over litdata's "
        "chunks and over tar shards, and `lightly.data.LightlyDataset` with torchvision's `Resize` in a DataLoader. "
        "All run in turn; median of the rounds, and the slowest one. With workers, their start is included. The files "
        "lie in the page cache: what shards save on slow or remote disks, one sequential read instead of one per "
        "image, is not in these figures."
    )
    with tempfile.TemporaryDirectory(prefix="streaming-") as name:
        root = Path(name)
        photographs(root / "images")
        for form in ("litdata", "webdataset"):
            write_shards(root / "images", root / form, format=form, images_per_shard=64)
        report("streaming", [measure(root, workers, repeats) for workers in (0, 2)], notes)


if __name__ == "__main__":
    main()

"""Images per second turned into two views: fused and stock operations, lightly and torchvision, at 32 and 224 pixels.

The count is that of the input images, the same for every candidate. Run as
``python -m benchmarks.views [--repeats N] [--threads N]``.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.common import alternate, report
from lightning_contrast import augment

# name of the setting: edge of the images, edge of the views, images per call, images for the per-image peers (0: none)
SETTINGS = {
    "CIFAR, 32 px": (32, 32, 256, 256),
    "SimCLR, 32 px": (32, 32, 256, 256),
    "SimCLR, 32 px, float": (32, 32, 256, 0),
    "SimCLR, 32 px, 32 images": (32, 32, 32, 0),
    "SimCLR, 32 px, 32 images, float": (32, 32, 32, 0),
    "SimCLR, 224 px": (256, 224, 32, 16),
    "SimCLR, 224 px, float": (256, 224, 32, 0),
}


class PairsOfPil(Dataset[list[Tensor]]):
    """Images in memory that lightly's transform turns into two views."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], list[Tensor]], rounds: int) -> None:
        """Convert ``images`` ``(N, 3, H, W)``, uint8; each appears ``rounds`` times per epoch."""
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform, self.rounds = transform, rounds

    def __len__(self) -> int:
        return len(self.images) * self.rounds

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index % len(self.images)])


def reference_of_torchvision(size: int, strength: float, blur: float, kernel: int) -> v2.Transform:
    """Return SimCLR's view in torchvision v2, which draws once per call: for one image, or for a whole batch."""
    blurs = [v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur)] if blur and kernel > 1 else []
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], 0.8),
            v2.RandomGrayscale(0.2),
            *blurs,
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def candidates(name: str, workers: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return the number of images per call and the call of every candidate of a setting."""
    edge, size, many, few = SETTINGS[name]
    strength, blur = (0.5, 0.0) if name.startswith("CIFAR") else (1.0, 0.5)
    integers = torch.randint(0, 256, (many, 3, edge, edge), dtype=torch.uint8)
    images = integers / 255 if name.endswith("float") else integers
    fused, stock = (augment.simclr_views(size, strength=strength, blur=blur, fused=fused) for fused in (True, False))
    view = reference_of_torchvision(size, strength, blur, size // 10 // 2 * 2 + 1)
    found: dict[str, tuple[int, Callable[[], object]]] = {
        "ours, fused": (many, lambda: fused(images)),
        "ours, stock Kornia": (many, lambda: stock(images)),
        "torchvision v2, one draw per batch": (many, lambda: (view(images), view(images))),
    }
    if few == 0:
        return found
    transform = SimCLRTransform(input_size=size, cj_strength=strength, gaussian_blur=blur, normalize=None)
    pairs = PairsOfPil(images[:few], transform, 1)
    # persistent workers: their start is not measured
    epoch = PairsOfPil(images[:few], transform, 4)
    loader = DataLoader(epoch, batch_size=few // 2, num_workers=workers, persistent_workers=True)
    return found | {
        "lightly, 1 process": (few, lambda: [pairs[i] for i in range(few)]),
        f"lightly, {workers} workers": (4 * few, lambda: sum(1 for _ in loader)),
        "torchvision v2, per image": (few, lambda: [(view(image), view(image)) for image in images[:few]]),
    }


def main() -> None:
    """Measure all settings and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, and workers of lightly's loader")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in SETTINGS:
        calls = candidates(name, arguments.threads)
        times = alternate({key: call for key, (_, call) in calls.items()}, repeats=arguments.repeats)
        speeds = {key: calls[key][0] / seconds["median_s"] for key, seconds in times.items()}
        fastest = {key: calls[key][0] / seconds["min_s"] for key, seconds in times.items()}
        for key, speed in speeds.items():
            row = {"views": name, "by": key, "images/s": round(speed, 1)}
            row["fused is faster by"] = round(speeds["ours, fused"] / speed, 2)
            row["fused is faster by, minimum"] = round(fastest["ours, fused"] / fastest[key], 2)
            rows.append(row)
    notes = (
        "Images per second turned into two views, medians of alternating rounds, uint8 input in memory unless noted; "
        "the last column compares the fastest rounds. One draw per batch does not give valid views; it is shown as the "
        "limit of batched kernels."
    )
    report("views", rows, notes)


if __name__ == "__main__":
    main()

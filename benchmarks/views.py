"""Views per second: fused and stock operations of ours beside lightly and torchvision, at 32 and at 224 pixels.

Counted are the input images for which both views were made, the same for every candidate. Run as
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

# name of the setting: edge of the images, edge of the views, images in a call, images for the per-image peers
SETTINGS = {
    "CIFAR, 32 px": (32, 32, 256, 256),
    "SimCLR, 32 px": (32, 32, 256, 256),
    "SimCLR, 224 px": (256, 224, 32, 16),
}


class PairsOfPil(Dataset[list[Tensor]]):
    """Pictures in memory that lightly's transform turns into two views."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], list[Tensor]], rounds: int) -> None:
        """Keep the pictures; ``rounds`` is how often each appears in an epoch."""
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform, self.rounds = transform, rounds

    def __len__(self) -> int:
        return len(self.pictures) * self.rounds

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.pictures[index % len(self.pictures)])


def reference_of_torchvision(size: int, strength: float, blur: float, kernel: int) -> v2.Transform:
    """Return SimCLR's view of torchvision v2: per image, or with one draw for a batch."""
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
    """Return what to call for a setting, and how many images each call turns into views."""
    edge, size, many, few = SETTINGS[name]
    strength, blur = (0.5, 0.0) if name.startswith("CIFAR") else (1.0, 0.5)
    images = torch.randint(0, 256, (many, 3, edge, edge), dtype=torch.uint8)
    fused, stock = (augment.simclr_views(size, strength=strength, blur=blur, fused=fused) for fused in (True, False))
    transform = SimCLRTransform(input_size=size, cj_strength=strength, gaussian_blur=blur, normalize=None)
    pairs = PairsOfPil(images[:few], transform, 1)
    # the workers live through all rounds: their start is not what is measured
    epoch = PairsOfPil(images[:few], transform, 4)
    loader = DataLoader(epoch, batch_size=few // 2, num_workers=workers, persistent_workers=True)
    view = reference_of_torchvision(size, strength, blur, size // 10 // 2 * 2 + 1)
    return {
        "ours, fused": (many, lambda: fused(images)),
        "ours, stock Kornia": (many, lambda: stock(images)),
        "lightly, 1 process": (few, lambda: [pairs[i] for i in range(few)]),
        f"lightly, {workers} workers": (4 * few, lambda: sum(1 for _ in loader)),
        "torchvision v2, per image": (few, lambda: [(view(image), view(image)) for image in images[:few]]),
        "torchvision v2, one draw a batch": (many, lambda: (view(images), view(images))),
    }


def main() -> None:
    """Measure every setting and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, and workers of lightly's loader")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in SETTINGS:
        calls = candidates(name, arguments.threads)
        times = alternate({key: call for key, (_, call) in calls.items()}, repeats=arguments.repeats)
        speeds = {key: calls[key][0] / seconds["median_s"] for key, seconds in times.items()}
        for key, speed in speeds.items():
            ratio = speeds["ours, fused"] / speed
            rows.append({"views": name, "by": key, "images/s": round(speed, 1), "fused is faster by": round(ratio, 2)})
    notes = (
        "Images per second for which both views were made, medians of alternating rounds, uint8 input in memory. "
        "One draw for a whole batch is not a valid way to make views; it is shown as the bound of batched kernels."
    )
    report("views", rows, notes)


if __name__ == "__main__":
    main()

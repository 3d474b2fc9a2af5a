"""Peak memory and time of a SimCLR step whose backbone runs in chunks (`GradientCache`), and without."""

import functools
import os
import subprocess
import sys

import torch
from torch import Tensor, nn

from benchmarks.common import alternate, memory_growth_mib, report
from lightning_contrast.callbacks.gradient_cache import ChunkedForward
from lightning_contrast.losses import nt_xent
from lightning_contrast.nn import SmallConvNet

SIZE = 32
CASES = {  # name: (images a batch, views a chunk or None)
    "batch 256": (256, None),
    "batch 2048": (2048, None),
    "batch 2048, chunks of 256 images": (2048, 512),
}


class Step(nn.Module):
    """Backbone, head and loss as in SimCLR, without a Trainer around them."""

    def __init__(self, chunk: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = SmallConvNet()
        width = self.backbone.num_features
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
        if chunk is not None:
            self.backbone.__dict__["forward"] = ChunkedForward(self.backbone, chunk)

    def forward(self, views: Tensor) -> Tensor:
        """Return the loss of the views (2B, 3, H, W): all first ones, then all second ones."""
        z_a, z_b = self.head(self.backbone(views)).chunk(2)
        return nt_xent(z_a, z_b, temperature=0.5)


def peak_mib(name: str) -> float:
    """Return by how many MiB one step raises the peak memory of this process."""
    batch, chunk = CASES[name]
    step = Step(chunk)
    Step(None)(torch.randn(8, 3, SIZE, SIZE)).backward()  # what the libraries set up once
    views = torch.randn(2 * batch, 3, SIZE, SIZE)
    return memory_growth_mib(lambda: step(views).backward())


def peak_mib_apart(name: str) -> float:
    """Measure a peak in a fresh process, because the peak of a process never falls.

    The allocator gives every block above 1 MiB back at once there, so that what is resident is what is in use.
    """
    command = [sys.executable, "-m", "benchmarks.memory", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(output.strip().splitlines()[-1])


def times(repeats: int = 3) -> dict[str, float]:
    """Return the median seconds of a step of each case, measured in turn."""
    calls = {}
    for name, (batch, chunk) in CASES.items():
        step, views = Step(chunk), torch.randn(2 * batch, 3, SIZE, SIZE)
        calls[name] = functools.partial(lambda step, views: step(views).backward(), step, views)
    return {name: value["median_s"] for name, value in alternate(calls, repeats=repeats).items()}


def main() -> None:
    seconds, peaks = times(), {name: peak_mib_apart(name) for name in CASES}
    whole = "batch 2048"
    rows = [
        {
            "step": name,
            "peak growth MiB": peaks[name],
            "s / step": seconds[name],
            "memory / uncached": peaks[name] / peaks[whole],
            "time / uncached": seconds[name] / seconds[whole],
        }
        for name in CASES
    ]
    notes = (
        f"One step of SimCLR (two views of {SIZE} x {SIZE} pixels, SmallConvNet, NT-Xent over the batch), forward "
        "and backward. Memory: by how much it raises the peak of a fresh process that already holds the views (6 MiB "
        "for 256 images, 48 MiB for 2048). Time: the cases in turn in one process."
    )
    report("memory", rows, notes)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_mib(sys.argv[1]))
    else:
        main()

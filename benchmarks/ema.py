"""Moving average of a network's weights: one fused interpolation against lightly's multiply and add."""

import copy

import timm
import torch
from lightly.models.utils import update_momentum
from torch import nn

from benchmarks.common import alternate, report
from lightning_contrast.nn import ema_update

NETWORKS = ("resnet50", "vit_small_patch16_224")
MOMENTUM = 0.996
BYTES = 12  # that an update moves for a float32 weight: two are read, one is written


def measure(name: str, threads: int, repeats: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    online = timm.create_model(name)
    ours = copy.deepcopy(online).requires_grad_(False)
    theirs, spare = copy.deepcopy(ours), copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn_like(parameter))
    ema_update(online, ours, MOMENTUM)
    update_momentum(online, theirs, MOMENTUM)
    check_equal(ours, theirs)
    count = sum(parameter.numel() for parameter in online.parameters())
    flat, flat_target = torch.rand(count), torch.rand(count)
    times = alternate(
        {
            "ours": lambda: ema_update(online, ours, MOMENTUM),
            "lightly": lambda: update_momentum(online, theirs, MOMENTUM),
            "copy": lambda: copy_weights(online, spare),
            "flat": lambda: flat_target.lerp_(flat, 1 - MOMENTUM),
        },
        repeats=repeats,
        warmup=5,
    )
    seconds = {key: value["median_s"] for key, value in times.items()}
    return {
        "network": name,
        "threads": threads,
        "million weights": count / 1e6,
        "ours ms": 1e3 * seconds["ours"],
        "lightly ms": 1e3 * seconds["lightly"],
        "plain copy ms": 1e3 * seconds["copy"],
        "one tensor ms": 1e3 * seconds["flat"],
        "ours GB/s": BYTES * count / seconds["ours"] / 1e9,
        "one tensor GB/s": BYTES * count / seconds["flat"] / 1e9,
        "lightly / ours": seconds["lightly"] / seconds["ours"],
    }


@torch.no_grad()
def copy_weights(online: nn.Module, target: nn.Module) -> None:
    torch._foreach_copy_(list(target.parameters()), list(online.parameters()))


def check_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def main(repeats: int = 30) -> None:
    notes = (
        "One update of all weights in float32, the same numbers in both. The peer is "
        "`lightly.models.utils.update_momentum`; all run in turn in one process. For comparison a plain copy of the "
        "weights, and one interpolation of as many numbers in one tensor: the least that an update can take."
    )
    report("ema", [measure(name, threads, repeats) for name in NETWORKS for threads in (1, 2)], notes)


if __name__ == "__main__":
    main()

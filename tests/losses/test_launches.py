"""The number of kernels that a loss dispatches at the tile size of an accelerator, where each costs a launch."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_contrast import losses
from lightning_contrast.losses.kernels.tiles import ACCELERATOR_TILE

# They change metadata or allocate, and launch nothing.
FREE = {
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "expand",
    "new_empty",
    "permute",
    "select",
    "slice",
    "split",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def launches(loss: Callable[[Tensor, Tensor], Tensor], pairs: int = 4096, dim: int = 128) -> Counter[str]:
    a, b = (torch.randn(pairs, dim, requires_grad=True) for _ in range(2))
    with Launches() as counted:
        loss(a, b).backward()
    assert a.grad is not None
    assert b.grad is not None
    return counted.kernels


def test_the_counter_counts_kernels_and_no_views() -> None:
    with Launches() as counted:
        x = torch.zeros(4, 4)
        x.view(16)[2:].add_(1)
        x.t() @ x
    assert counted.kernels == {"zeros": 1, "add_": 1, "mm": 1}


def test_nt_xent_of_4096_pairs() -> None:
    kernels = launches(lambda a, b: losses.nt_xent(a, b, temperature=0.1, tile_size=ACCELERATOR_TILE))
    assert kernels["mm"] == 6  # 8192 rows: two diagonal tiles and one off the diagonal, forward and backward
    assert kernels.total() <= 66, kernels


T = ACCELERATOR_TILE
OTHERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "info_nce": (lambda a, b: losses.info_nce(a, b, temperature=0.1, tile_size=T), 55),
    # 15 more than with the positive in the log-sum-exp: masks, unknown labels, the other positives of the class.
    "sup_con": (lambda a, b: losses.sup_con(a, b, torch.arange(len(a)) % 7, temperature=0.1, tile_size=T), 87),
    "clip": (lambda a, b: losses.clip_loss(a, b, logit_scale=10.0, tile_size=T), 64),
    "siglip": (lambda a, b: losses.siglip_loss(a, b, logit_scale=10.0, logit_bias=-10.0, tile_size=T), 68),
    "uniformity": (lambda a, b: losses.uniformity(torch.cat([a, b]), tile_size=T), 45),
}


@pytest.mark.parametrize("name", OTHERS)
def test_one_tile_of_the_other_losses(name: str) -> None:
    loss, bound = OTHERS[name]
    kernels = launches(loss, pairs=512)
    assert kernels.total() <= bound, kernels

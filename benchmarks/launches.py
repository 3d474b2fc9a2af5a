"""Kernels that a training step launches on an accelerator: counted, not timed, and without one.

Views and averages are counted on the meta device; losses and fits on the pretended device of ``tests/device``, which
autocast knows. Both take the branch of an accelerator everywhere. Run as ``python -m benchmarks.launches``.
"""

import logging
import math
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import torchvision
from lightning.pytorch.callbacks import Checkpoint

import lightning_contrast as lc
from benchmarks.common import report
from lightning_contrast import augment, losses
from lightning_contrast.callbacks import MomentumUpdate, QueueUpdate
from lightning_contrast.nn.ema import ema_update
from lightning_contrast.testing import count_kernels
from tests.device.pretended import PretendedDevice
from tests.device.runs import images, trainer

BATCH, DRAWS, PAIRS, STEPS = 256, 9, 4096, 3


def kernels_of(call: Callable[[], object]) -> int:
    """Return how many kernels a call launches."""
    with count_kernels() as kernels:
        call()
    return kernels.total


def views(size: int, *, fused: bool = True) -> int:
    """Count SimCLR's two views of a batch of uint8 images, the median of several draws.

    On the meta device; of stock Kornia, which reads values, on the CPU with four images.
    """
    torch.manual_seed(0)
    policy = augment.simclr_views(size, fused=fused)
    batch = torch.zeros(BATCH if fused else 4, 3, size, size, dtype=torch.uint8, device="meta" if fused else "cpu")
    return statistics.median_low(kernels_of(lambda: policy(batch)) for _ in range(DRAWS))


def nt_xent() -> int:
    """Count NT-Xent of 4,096 pairs, forward and backward, at an accelerator's tile."""
    with PretendedDevice() as pretended:
        a, b = (torch.rand(PAIRS, 128, device=pretended.device).requires_grad_() for _ in range(2))
        return kernels_of(lambda: losses.nt_xent(a, b, temperature=0.1).backward())


def ema() -> int:
    """Count an update of the average of a ResNet-50."""
    online, target = (torchvision.models.resnet50().to("meta") for _ in range(2))
    return kernels_of(lambda: ema_update(online, target, 0.99))


class Parts(Checkpoint):
    """Counts the kernels of each step of a fit, and those of some functions in it. Of the base that runs last."""

    def __init__(self) -> None:
        self.total, self.parts, self._counter = 0, Counter[str](), count_kernels()
        self._before = 0

    def watch(self, part: str, owner: Any, *names: str) -> None:
        """Count the functions of these names of an object as a part."""
        for name in names:
            setattr(owner, name, partial(self._count, part, getattr(owner, name)))

    def _count(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with count_kernels() as kernels:
            result = function(*args, **kwargs)
        self.parts[part] += kernels.total
        return result

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counter.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == STEPS:  # from the end of the step before to the end of this
            self.total = self._counter.total - self._before
        elif trainer.global_step == STEPS - 1:
            self._before = self._counter.total
            self.parts.clear()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counter.__exit__(None, None, None)


def step_of(
    module: L.LightningModule, policy: Any, callbacks: list[L.Callback], callback_part: str
) -> tuple[int, Counter[str]]:
    """Fit a few steps on the pretended device and return the kernels of the last step, in all and by part."""
    parts = Parts()
    augmentation = lc.ViewAugmentation(policy)
    parts.watch("views", augmentation, "_views")
    parts.watch("forward and loss", module, "training_step")
    for callback in callbacks:
        parts.watch(callback_part, callback, "on_train_batch_start", "on_train_batch_end")
    documented = {f"{kind}launches.py:step_of": (math.inf, "only kernels count here") for kind in ("", "meets ")}
    with PretendedDevice(documented) as pretended, tempfile.TemporaryDirectory() as folder:
        module.to(pretended.device)
        fit = trainer(
            folder, [augmentation, *callbacks, parts], max_epochs=1, limit_val_batches=0, enable_checkpointing=True
        )
        fit.fit(module, images(8))
    return parts.total, parts.parts


def methods() -> dict[str, tuple[L.LightningModule, Any, list[L.Callback]]]:
    """Return what the steps are counted of: the module, its policy, and the callbacks that end a step."""
    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, momentum=0.9, foreach=True)  # the default on an accelerator
    adamw = partial(torch.optim.AdamW, foreach=True)
    common: dict[str, Any] = {"small_images": True, "warmup_epochs": 0}
    return {
        "SimCLR": (lc.SimCLR("resnet18", optimizer=sgd, **common), augment.simclr_views(32), []),
        "MoCo": (
            lc.MoCo("resnet18", optimizer=sgd, queue_size=64, **common),
            augment.moco_v2_views(32),
            [MomentumUpdate(0.999, 0.999, "constant"), QueueUpdate()],
        ),
        "DINO": (lc.DINO("resnet18", optimizer=adamw, **common), augment.dino_views(32), [MomentumUpdate(0.996)]),
    }


def main() -> None:
    """Count everything and write the table."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []

    def add(what: str, kernels: int, goal: int | str = "") -> None:
        rows.append({"what": what, "kernels": kernels, "goal": f"<= {goal}" if goal else ""})

    for size in (32, 224):
        add(f"two SimCLR views, {size} px", views(size), 200)
    add("two SimCLR views, 32 px, stock Kornia", views(32, fused=False))
    add(f"NT-Xent of {PAIRS:,} pairs, forward and backward", nt_xent(), 70)
    add("EMA of ResNet-50", ema(), 4)
    probe = lc.OnlineLinearProbe(3)
    module, policy, _ = methods()["SimCLR"]
    _, parts = step_of(module, policy, [probe], "probe")
    add("linear probe, the hooks of a step", parts["probe"], 60)
    for name, (module, policy, callbacks) in methods().items():
        total, parts = step_of(module, policy, callbacks, "callbacks")
        for part, kernels in parts.items():
            add(f"{name} step: {part}", kernels)
        add(f"{name} step: backward, clipping, optimizer, logging", total - parts.total())
        add(f"{name} step: total", total)
    notes = (
        "Dispatched operations that launch a kernel on an accelerator, views of tensors and allocations excluded; a "
        f"`_foreach` operation counts once. Two views are those of {BATCH} images, median of {DRAWS} draws; steps are "
        "those of a ResNet-18 at 32 px, batch 8, in a fit on a pretended device. The counts depend neither on the "
        "machine nor on the batch, except for the random draw of the views."
    )
    report("launches", rows, notes)


if __name__ == "__main__":
    main()

"""Check that a callback does not change a run."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast._checks import check_at_least, fail
from lightning_contrast.seeding import isolated
from lightning_contrast.testing._runs import fit, make, required_arguments
from lightning_contrast.testing._trace import Difference, Record, Trace, first_difference, largest_difference
from lightning_contrast.testing.processes import run_processes


def assert_callback_changes_nothing(
    callback: L.Callback | Sequence[L.Callback] | Callable[[], L.Callback | Sequence[L.Callback]],
    make_module: Callable[[], L.LightningModule] | None = None,
    make_data: Callable[[], Any] | None = None,
    make_callbacks: Callable[[], Sequence[L.Callback]] = list,
    *,
    max_epochs: int = 2,
    world_size: int = 1,
    ignore: Sequence[str] = (),
    **trainer_settings: Any,
) -> None:
    """Raise unless a run with the callback is bit-identical to the same run without it.

    Batches, parameters, buffers, train and eval modes, optimizers, learning rates, the global step and the states of
    the random generators of torch, NumPy and Python are compared before each batch and at the end, the output of
    ``training_step`` in each step, and the names in the ``state_dict`` and the state of other callbacks at the end.

    Args:
        callback: A callback, a list of callbacks, or a function or class that returns them; prefer a function with
            several processes.
        make_module: Returns a new module at each call. None uses a small classifier with ``backbone`` (features of
            width 16), BatchNorm and dropout.
        make_data: Returns new data at each call: a datamodule, a loader, or a pair of loaders (training, validation).
            None uses 24 shuffled training and 8 validation images of 3 x 8 x 8 with labels 0..3.
        make_callbacks: Returns the other callbacks of both runs at each call.
        max_epochs: Length of the runs, >= 1.
        world_size: Number of processes, >= 1; more than 1 uses DDP on the CPU.
        ignore: Shell patterns for names in the message that may differ.
        **trainer_settings: Further arguments of the Trainer.

    Raises:
        AssertionError: If the runs differ; the message names the first difference.
        TypeError: If ``callback`` is not a callback, or a factory returns the wrong type.
    """
    check_at_least("max_epochs", max_epochs, 1)
    check_at_least("world_size", world_size, 1)
    settings = {"max_epochs": max_epochs} | trainer_settings
    if world_size > 1:
        settings |= {"devices": world_size, "strategy": settings.get("strategy", "ddp")}

    def run(rank: int, watched: bool) -> Record:
        with isolated(0), tempfile.TemporaryDirectory(prefix="callback-") as folder:
            module = make("make_module", make_module or _Classifier, L.LightningModule)
            data = make("make_data", make_data or _loaders)
            others, trace = list(make("make_callbacks", make_callbacks)), Trace(with_random=True)
            watching = _made(callback) if watched else []
            fit(module, data, [*others, *watching, trace], folder, settings)
            own = [c.state_key for c in watching]
            last = trace.moments[-1].seen
            for name in [name for name in last if name.startswith(tuple(f"callback `{key}`" for key in own))]:
                del last[name]  # the callback's own state
            return trace.record()

    if world_size > 1:
        alone, watched = (run_processes(run, world_size, flag, init=False) for flag in (False, True))
    else:
        alone, watched = [run(0, False)], [run(0, True)]
    differences = [first_difference(a.moments, b.moments, ignore) for a, b in zip(alone, watched, strict=True)]
    found = [(difference.index, rank) for rank, difference in enumerate(differences) if difference is not None]
    if found:
        _, rank = min(found)  # later differences on other ranks may follow from it
        on_rank = f" on rank {rank}" if world_size > 1 else ""
        first = differences[rank]
        assert first is not None
        raise AssertionError(_message(_name(callback) + on_rank, first, alone[rank], watched[rank]))


def _message(name: str, difference: Difference, alone: Record, watched: Record) -> str:
    """Describe what the callback changes first."""
    names = difference.names
    shown = ", ".join(f"the {item}" for item in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    lines = [f"{name} changes the run, first {difference.where}: {shown}{more}."]
    if "random numbers" in names:
        lines.append(
            "It draws from a global generator, or iterates over a DataLoader without its own generator: draw under "
            " `torch.random.fork_rng()`, or from a `torch.Generator`."
        )
    if any(item.startswith("train or eval mode") for item in names):
        lines.append("It leaves a module in another mode: restore the mode of each submodule.")
    added = [
        n for n in watched.moments[-1].seen.keys() - alone.moments[-1].seen.keys() if n[:6] in ("parame", "buffer")
    ]
    if added:
        lines.append(f"It adds to the module's state: {', '.join(sorted(added)[:4])}.")
    lines.append(largest_difference(alone.tensors, watched.tensors))
    return "\n".join(line for line in lines if line)


def _made(callback: Any) -> list[L.Callback]:
    made = callback
    if not isinstance(callback, L.Callback) and callable(callback) and required_arguments(callback) == 0:
        made = callback()
    several = list(made) if isinstance(made, list | tuple) and made else [made]
    for one in several:
        if not isinstance(one, L.Callback):
            hint = "Give a callback, a list of them, or a function without arguments that returns one"
            fail("callback", "be a Callback", type(one).__name__, hint, TypeError)
    return several


def _name(callback: Any) -> str:
    if isinstance(callback, list | tuple):
        return ", ".join(map(_name, callback))
    return type(callback).__name__ if isinstance(callback, L.Callback) else getattr(callback, "__name__", "callback")


class _Classifier(L.LightningModule):
    """A small classifier that is sensitive to the mode and the random generator."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), *norm, nn.Dropout(0.1), nn.Linear(32, 16))
        self.classifier = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss and the features."""
        features = self(batch[0])
        loss = nn.functional.cross_entropy(self.classifier(features), batch[1])
        return {"loss": loss, "features": features.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the features."""
        return {"features": self(batch[0])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def _loaders() -> tuple[Any, Any]:
    images, labels = torch.rand(32, 3, 8, 8), torch.arange(32) % 4
    train, test = TensorDataset(images[:24], labels[:24]), TensorDataset(images[24:], labels[24:])
    return DataLoader(train, batch_size=8, shuffle=True), DataLoader(test, batch_size=8)

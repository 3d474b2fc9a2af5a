"""Fingerprints of the state of a run before each batch, for the comparison of two runs."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

UNSAVED = "unsaved buffer"
_SOFT = (UNSAVED, "attribute")  # may differ during a run, like caches, if nothing depends on it


@dataclass
class Moment:
    """Fingerprints at one moment of a run, by name."""

    where: str
    seen: dict[str, str] = field(default_factory=dict)


@dataclass
class Difference:
    """The first difference between two runs."""

    index: int
    where: str
    names: list[str]
    hints: list[str]


@dataclass
class Record:
    """The picklable result of a `Trace`, for transfer between processes."""

    moments: list[Moment]
    tensors: dict[str, Tensor]


class Trace(Checkpoint):
    """Records a run. A `Checkpoint` runs after all other callbacks.

    Args:
        with_random: Also record the state of the random generators.

    Attributes:
        moments: Two per batch, before and in its step, and one at the end.
        tensors: Parameters and buffers at the end, by name.
    """

    def __init__(self, *, with_random: bool = False) -> None:
        self.with_random = with_random
        self.moments: list[Moment] = []
        self.tensors: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the batch and the state before the step."""
        where = f"epoch {trainer.current_epoch}, batch {batch_idx}"
        seen = {"batch": _fingerprint_all(batch)} | self._state(trainer, pl_module)
        seen |= {"random numbers": _random_state()} if self.with_random else {}
        self.moments.append(Moment(f"before {where}", seen))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss."""
        where = f"in the step of epoch {trainer.current_epoch}, batch {batch_idx}"
        self.moments.append(Moment(where, {"loss": _fingerprint_all(outputs)}))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the final state, including that of the callbacks."""
        seen = self._state(trainer, pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, Checkpoint):
                for name, value in _leaves(callback.state_dict()):
                    seen[f"callback `{callback.state_key}`{name}"] = fingerprint(value)
        self.moments.append(Moment("at the end of the run", seen))
        self.tensors = {name: _local(tensor).detach().cpu().clone() for name, tensor in named_tensors(pl_module)}

    def record(self) -> Record:
        """Return the picklable record."""
        return Record(self.moments, self.tensors)

    def _state(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        seen = {name: fingerprint(tensor) for name, tensor in named_tensors(pl_module)}
        seen["global step"] = str(trainer.global_step)
        for path, module in pl_module.named_modules():
            seen[f"train or eval mode of `{path or type(pl_module).__name__}`"] = str(module.training)
            for name, value in vars(module).items():
                if isinstance(value, Tensor | int | float) and not name.startswith("_") and name != "training":
                    seen[f"attribute `{path}.{name}`"] = fingerprint(value)
        names: dict[Tensor, str] = {parameter: name for name, parameter in pl_module.named_parameters()}
        for number, optimizer in enumerate(trainer.optimizers):
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    seen[f"`{key}` of `{names.get(parameter, '?')}` in optimizer {number}"] = fingerprint(value)
            for index, group in enumerate(optimizer.param_groups):
                for key, value in group.items():
                    if isinstance(value, int | float | Tensor):
                        seen[f"`{key}` of group {index} in optimizer {number}"] = fingerprint(value)
        return seen


def named_tensors(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Yield the named parameters and buffers of a module.

    Args:
        module: The module; its tensors have any shape.
    """
    saved = module.state_dict().keys()
    for name, parameter in module.named_parameters():
        yield f"parameter `{name}`", parameter
    for name, buffer in module.named_buffers():
        yield f"{'buffer' if name in saved else UNSAVED} `{name}`", buffer


def first_difference(expected: Sequence[Moment], found: Sequence[Moment], ignore: Sequence[str]) -> Difference | None:
    """Return the first difference between two runs, or None if they are equal.

    Args:
        expected: The moments of one run.
        found: The moments of the other run, starting at the same moment.
        ignore: Shell patterns of names that may differ.
    """
    hints: dict[str, None] = {}
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=False)):
        is_last = index == len(expected) - 1
        names = [
            name
            for name in {**ours.seen, **theirs.seen}
            if ours.seen.get(name) != theirs.seen.get(name) and not any(fnmatch(name, pattern) for pattern in ignore)
        ]
        soft = [name for name in names if name.startswith(_SOFT)]
        hard = [name for name in names if name not in soft or (is_last and name.startswith(UNSAVED))]
        hints |= dict.fromkeys(soft)
        if hard:
            return Difference(index, theirs.where, hard, [name for name in hints if name not in hard])
    if len(expected) != len(found):
        rule = f"the number of batches, {len(found) // 2} instead of {len(expected) // 2}"
        return Difference(len(found), "at the end of the run", [rule], list(hints))
    return None


def largest_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return a sentence about the tensors that differ at the end, or an empty string.

    Args:
        expected: Tensors of any shape, by name.
        found: Tensors of the other run.
    """
    sizes: dict[str, float] = {}
    for name in expected.keys() & found.keys():
        a, b = expected[name], found[name]
        if a.shape != b.shape:
            sizes[name] = float("inf")
        elif not torch.equal(a, b):
            sizes[name] = float((a.to(torch.float64) - b.to(torch.float64)).abs().max())
    if not sizes:
        return ""
    worst = max(sizes, key=lambda name: sizes[name])
    return f"At the end {len(sizes)} of {len(expected)} tensors differ, most of all the {worst}, by {sizes[worst]:.3g}."


def fingerprint(value: Any) -> str:
    """Return a short text that is equal for bit-identical values."""
    if not isinstance(value, Tensor):
        return repr(value)
    value = _local(value)
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{value.dtype}{tuple(value.shape)}{hashlib.blake2b(raw.numpy().tobytes(), digest_size=12).hexdigest()}"


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor (FSDP2)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fingerprint_all(values: Any) -> str:
    return " ".join(f"{name}={fingerprint(value)}" for name, value in _leaves(values))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the numbers, strings and tensors in nested containers."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            yield from _leaves(item, f"{name}/{key}")
    elif isinstance(value, Tensor | int | float | str) or value is None:
        yield name, value


def _random_state() -> str:
    numpy_state = np.random.get_state(legacy=False)
    parts = [fingerprint(torch.get_rng_state()), repr(random.getstate()), repr(numpy_state)]
    return hashlib.blake2b("".join(parts).encode(), digest_size=12).hexdigest()

"""What a run holds before each of its batches, as fingerprints that two runs can be compared by."""

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
_SOFT = (UNSAVED, "attribute")  # what may differ on the way, as a cache does, if nothing comes of it


@dataclass
class Moment:
    """What was seen at one moment of a run: fingerprints by a name in words."""

    where: str
    seen: dict[str, str] = field(default_factory=dict)


@dataclass
class Difference:
    """The first moment at which two runs differ."""

    index: int
    where: str
    names: list[str]
    hints: list[str]


@dataclass
class Record:
    """What a `Trace` saw, without the Trainer that Lightning ties to a callback, so that processes can exchange it."""

    moments: list[Moment]
    tensors: dict[str, Tensor]


class Trace(Checkpoint):
    """Records a run. Callbacks of this base run after all others, as those that write checkpoints do.

    Args:
        with_random: Record the state of the random generators, too.

    Attributes:
        moments: Two for each batch, before and in its step, and one at the end.
        tensors: What the module holds at the end, by name.
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
        """Record the state at the end, that of the callbacks included."""
        seen = self._state(trainer, pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, Checkpoint):
                for name, value in _leaves(callback.state_dict()):
                    seen[f"callback `{callback.state_key}`{name}"] = fingerprint(value)
        self.moments.append(Moment("at the end of the run", seen))
        self.tensors = {name: _local(tensor).detach().cpu().clone() for name, tensor in named_tensors(pl_module)}

    def record(self) -> Record:
        """Return what was seen."""
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
    """Yield parameters and buffers, with a name that tells what they are."""
    saved = module.state_dict().keys()
    for name, parameter in module.named_parameters():
        yield f"parameter `{name}`", parameter
    for name, buffer in module.named_buffers():
        yield f"{'buffer' if name in saved else UNSAVED} `{name}`", buffer


def first_difference(expected: Sequence[Moment], found: Sequence[Moment], ignore: Sequence[str]) -> Difference | None:
    """Return where two runs first differ, or None where they do not.

    Args:
        expected: The moments of one run.
        found: Those of the other, beginning at the same moment.
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
    """Tell which tensors differ at the end and how much, in a sentence, or nothing where none does."""
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
    """Return a short text that equal values share, bit for bit."""
    if not isinstance(value, Tensor):
        return repr(value)
    value = _local(value)
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{value.dtype}{tuple(value.shape)}{hashlib.blake2b(raw.numpy().tobytes(), digest_size=12).hexdigest()}"


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is divided among ranks, as FSDP2 does."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fingerprint_all(values: Any) -> str:
    return " ".join(f"{name}={fingerprint(value)}" for name, value in _leaves(values))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the numbers, texts and tensors in nested containers."""
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

"""Check that several ranks give the same loss, gradients and weights as one process with the joined batch."""

import copy
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_contrast._checks import check_at_least, check_positive, fail
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.seeding import isolated
from lightning_contrast.testing._runs import fit, required_arguments
from lightning_contrast.testing.processes import run_processes

_Values = dict[str, Tensor]  # by name, in order of computation

# Runs are in float64, but what a module keeps in float32 on purpose (centers, queues, memory banks) stays float32, so
# the relative tolerance is a few float32 roundings: 8 eps = 9.5e-7. Float64 sums that cancel, such as a gradient that
# is zero, leave up to 2^22 eps = 9.3e-10 of terms of size 1. A missing factor or gather is an error of some percent.
_RTOL = 8 * torch.finfo(torch.float32).eps
_ATOL = 2**22 * torch.finfo(torch.float64).eps


def check_world_size_equivalence(
    make_module_or_loss: Any,
    world_size: int = 2,
    *,
    batch: Any = None,
    steps: int = 2,
    rtol: float = _RTOL,
    atol: float = _ATOL,
    timeout: float = 120.0,
    **trainer_settings: Any,
) -> None:
    """Raise unless several processes give the same results as one with the joined batch, in float64.

    A LightningModule is trained for a few steps with DDP, each rank with its share of the rows, and in one process with
    all rows: the loss (mean over ranks), the gradient of each parameter and the final ``state_dict`` must agree. A loss
    is called with each rank's share of the rows; its value and the gradient of each row, with the mean over ranks as in
    DDP, must agree. Disable random draws of the step (dropout, views), and do not use BatchNorm, whose statistics are
    per rank. The processes are forks on the CPU.

    Args:
        make_module_or_loss: A function without arguments that returns a LightningModule or a loss; or a loss: a
            function of tensors with one row per image, or an ``nn.Module``.
        world_size: Number of processes, >= 2.
        batch: The joined batch: nested tensors whose number of rows is divisible by ``world_size``; for a loss, the
            tuple of its arguments. None uses random embeddings (4 x world_size, 16) for each required argument of a
            loss; two views of 32 pixels with labels and indices for a method of this package.
        steps: Optimizer steps of a module, >= 1.
        rtol: Allowed difference as a share of the largest value of a tensor, > 0. Default: 8 times the float32 epsilon
            (9.5e-7), since a module may keep some of its state in float32.
        atol: Allowed difference in addition, > 0. Default: 2^22 times the float64 epsilon (9.3e-10), the rounding of
            sums that cancel.
        timeout: Seconds that the processes may take.
        **trainer_settings: Further arguments of the Trainer.

    Raises:
        AssertionError: If they differ; the message names the first difference, its step and its factor.
        ValueError: If the batch is missing or its number of rows is not divisible.
        ChildError: If a process fails.
    """
    check_at_least("world_size", world_size, 2)
    check_at_least("steps", steps, 1)
    check_positive("rtol", rtol)
    check_positive("atol", atol)
    with isolated(0):
        subject = _made(make_module_or_loss)
        joined = _default_batch(subject, world_size) if batch is None else batch
    joined = _as_double(joined)

    def run(rank: int | None) -> _Values:
        share = joined if rank is None else _rows(joined, rank, world_size)
        with isolated(0):
            made = _made(make_module_or_loss)
            if isinstance(made, L.LightningModule):
                devices = {"devices": 1 if rank is None else world_size, "strategy": "auto" if rank is None else "ddp"}
                return _train(made, share, steps, devices | trainer_settings)
            return _differentiate(made, share)

    _rows(joined, 0, world_size)
    is_module = isinstance(subject, L.LightningModule)
    alone = run(None)
    ranks: list[_Values] = run_processes(run, world_size, timeout=timeout, init=not is_module)
    several = _as_one(ranks, is_module)
    for name, expected in alone.items():
        if name not in several:
            raise AssertionError(f"On {world_size} ranks the {name} is missing; one process has it.")
        if not _close(expected, several[name], rtol, atol):
            raise AssertionError(_message(name, alone, several, subject, world_size, rtol, atol))
    if is_module:
        _check_agreement(ranks, rtol, atol)


def _train(module: L.LightningModule, share: Any, steps: int, settings: Mapping[str, Any]) -> _Values:
    """Return the results of a fit that repeats one batch."""
    record = _Record()
    batches: Any = [share] * steps  # a list is a map-style dataset
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None, collate_fn=_same)
    plain = {"precision": "64-true", "max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        fit(module, loader, [record], folder, plain | {"use_distributed_sampler": False} | dict(settings))
    return record.values | {f"`{k}` at the end": v.detach().clone() for k, v in module.state_dict().items()}


class _Record(L.Callback):
    """Records the loss and the gradients of each step, as used by the optimizer."""

    def __init__(self) -> None:
        self.values: _Values = {}
        self._gradients: _Values = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Record the gradients, after the mean over ranks by DDP."""
        named = [(name, p.grad) for name, p in pl_module.named_parameters()]
        self._gradients = {name: gradient.detach().clone() for name, gradient in named if gradient is not None}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the loss, followed by the gradients."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.values[f"loss of step {batch_idx}"] = loss.detach().clone()
        for name, gradient in self._gradients.items():
            self.values[f"gradient of `{name}` in step {batch_idx}"] = gradient
        self._gradients = {}


def _differentiate(loss: Callable[..., Any], share: Sequence[Tensor]) -> _Values:
    """Return the value and the gradients of a loss, for the mean over ranks."""
    leaves: list[Tensor] = []

    def as_leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return _mapped(value, as_leaf)
        leaf = value.detach().clone().requires_grad_(value.is_floating_point())
        leaves.append(leaf)
        return leaf

    inputs = [as_leaf(item) for item in share]
    if isinstance(loss, nn.Module):
        loss.double()
    value = loss(*inputs)
    value.backward()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    values = {"loss": value.detach()}
    for index, x in enumerate(leaves):
        if x.is_floating_point():
            gradient = torch.zeros_like(x) if x.grad is None else x.grad
            values[f"gradient of the rows of argument {index}"] = gradient / ranks
    named = loss.named_parameters() if isinstance(loss, nn.Module) else iter(())
    return values | {f"gradient of `{name}`": p.grad.detach() for name, p in named if p.grad is not None}


def _as_one(ranks: list[_Values], is_module: bool) -> _Values:
    """Combine the results of all ranks: means of losses and parameter gradients, concatenated rows."""
    joined = {}
    for name, first in ranks[0].items():
        parts = [values[name] for values in ranks if name in values]
        if name.startswith("gradient of the rows"):
            joined[name] = torch.cat(parts)
        elif name.startswith("loss") or not is_module:
            joined[name] = torch.stack(parts).mean(0)
        else:
            joined[name] = first
    return joined


def _check_agreement(ranks: list[_Values], rtol: float, atol: float) -> None:
    """Raise if a rank differs from rank 0."""
    for rank, values in enumerate(ranks[1:], start=1):
        for name, value in values.items():
            if not name.startswith("loss") and not _close(ranks[0][name], value, rtol, atol):
                raise AssertionError(f"Ranks 0 and {rank} differ in the {name}: the state is not synchronized.")


def _close(expected: Tensor, found: Tensor, rtol: float, atol: float) -> bool:
    if expected.shape != found.shape:
        return False
    a, b = expected.double(), found.double()
    limit = atol + rtol * float(a.abs().max()) if a.numel() else 0.0
    return bool(((a - b).abs() <= limit).all())


def _message(
    name: str, alone: _Values, several: _Values, subject: Any, world_size: int, rtol: float, atol: float
) -> str:
    """Describe the first difference and its possible causes."""
    a, b = alone[name].double(), several[name].double()
    lines = [f"{world_size} ranks differ from one process on the joined batch. First difference, the {name}:"]
    if a.shape != b.shape:
        lines.append(f"shape {tuple(b.shape)} on the ranks, {tuple(a.shape)} on one process.")
    elif a.numel() == 1:
        lines.append(f"{float(b):.6g} on the ranks (their mean), {float(a):.6g} on one process.")
    else:
        lines.append(f"largest difference {float((a - b).abs().max()):.3g}, largest value {float(a.abs().max()):.3g}.")
    compared = {key: value for key, value in alone.items() if key.startswith("gradient") and key in several}
    wrong = [key for key, value in compared.items() if not _close(value, several[key], rtol, atol)]
    if compared and not name.startswith("gradient"):
        lines.append(f"Of {len(compared)} gradients {len(wrong)} differ{_worst(wrong, alone, several)}.")
    factor = _factor(alone[wrong[0]], several[wrong[0]]) if wrong else None
    if factor is not None:
        lines.append(f"The {wrong[0]} is {factor:.6g} times that of one process: a sum where DDP takes a mean, or")
        lines.append("a gather whose backward pass does not sum the gradients of the other ranks.")
    elif name in ("loss", "loss of step 0"):
        lines.append("A loss that compares images must use those of all ranks: gather with gradient.")
    modules = subject.modules() if isinstance(subject, nn.Module) else ()
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        lines.append("It has BatchNorm, whose statistics are per rank: remove it for this check.")
    return "\n".join(lines)


def _worst(wrong: list[str], alone: _Values, several: _Values) -> str:
    if not wrong or any(alone[key].shape != several[key].shape for key in wrong):
        return ""
    share = {k: float((alone[k] - several[k]).abs().max() / alone[k].abs().max().clamp(min=1e-300)) for k in wrong}
    worst = max(share, key=lambda key: share[key])
    return f", most of all the {worst}, by {share[worst]:.1%} of its largest value"


def _factor(expected: Tensor, found: Tensor) -> float | None:
    """Return the factor if one tensor is a multiple of the other, else None."""
    a, b = expected.double().flatten(), found.double().flatten()
    if a.shape != b.shape or not bool(a.any()):
        return None
    factor = float(a @ b / (a @ a))
    return factor if bool(((b - factor * a).abs() <= _RTOL * b.abs().max()).all()) else None


def _made(subject: Any) -> Any:
    """Return the result of a factory, or the loss itself."""
    if isinstance(subject, nn.Module):
        return copy.deepcopy(subject)
    if not callable(subject):
        hint = "Give a loss, or a function that returns a LightningModule or a loss"
        fail("make_module_or_loss", "be callable", type(subject).__name__, hint, TypeError)
    return subject() if inspect.isclass(subject) or required_arguments(subject) == 0 else subject


def _default_batch(subject: Any, world_size: int) -> Any:
    rows = 4 * world_size
    if isinstance(subject, SelfSupervisedModule):
        views = [torch.rand(rows, 3, 32, 32) for _ in range(2)]
        return [views, torch.arange(rows) % 3, torch.arange(rows)]
    if isinstance(subject, L.LightningModule):
        hint = "Pass the joined batch of all ranks"
        fail("batch", "be given for a custom module", None, hint)
    call = subject.forward if isinstance(subject, nn.Module) else subject
    return tuple(torch.randn(rows, 16, dtype=torch.float64) for _ in range(required_arguments(call)))


def _rows(value: Any, rank: int, world_size: int) -> Any:
    """Return the share of a rank."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) % world_size:
            hint = "Give tensors with one row per image"
            fail("batch", f"have a number of rows divisible by {world_size}", tuple(value.shape), hint)
        size = len(value) // world_size
        return value[rank * size : (rank + 1) * size]
    return _mapped(value, lambda item: _rows(item, rank, world_size))


def _as_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return _mapped(value, _as_double)


def _mapped(value: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: fn(item) for key, item in value.items()}
    return type(value)(map(fn, value)) if isinstance(value, list | tuple) else value


def _same(batch: Any) -> Any:
    return batch

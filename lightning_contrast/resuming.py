"""Go on from what is there: make a finished run longer, or start from the weights of a backbone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_contrast._checks import check_at_least, check_not_negative, fail, require
from lightning_contrast.checkpoints import load_checkpoint
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.runtime.default_callbacks import mark_defaults
from lightning_contrast.runtime.optimizer_steps import has_gradients
from lightning_contrast.runtime.schedule_position import (
    ScheduleExtension,
    epoch_length_changed,
    set_extension,
    steps_per_epoch,
)

__all__ = ["ExtendedRun", "HeadWarmup", "extend_training", "from_pretrained_backbone"]

_Method = TypeVar("_Method", bound=SelfSupervisedModule)
_CLASSIFIERS = ("head", "fc", "classifier", "last_linear")


class ExtendedRun(L.Callback):
    """Lets all schedules of a run go on without a jump; made by `extend_training`.

    Attributes:
        checkpoint: Path of the checkpoint to go on from.
        max_epochs: Length of the longer run, for the Trainer.
        plan: Where the schedules stand, in optimizer steps of the run before.
    """

    def __init__(self, checkpoint: str, max_epochs: int, plan: ScheduleExtension, epochs: int) -> None:
        self.checkpoint, self.max_epochs, self.plan = checkpoint, max_epochs, plan
        self._epochs = epochs  # that the checkpoint has done

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the Trainer the plan before optimizers and schedules are made."""
        if stage != "fit":
            return
        if trainer.max_epochs != self.max_epochs:
            hint = "Set `max_epochs=extension.max_epochs` on the Trainer"
            fail("max_epochs", f"be {self.max_epochs} for this extension", trainer.max_epochs, hint)
        set_extension(trainer, self.plan)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that does not go on from the checkpoint, or from a later one."""
        if trainer.global_step < self.plan.done:
            hint = "Pass `ckpt_path=extension.checkpoint`, or a later checkpoint of the extended run, to `fit`"
            fail("ckpt_path", f"lead to step {self.plan.done} or later", trainer.global_step, hint)
        steps, before = steps_per_epoch(trainer), self.plan.done / self._epochs
        if steps is not None and epoch_length_changed(steps, before):  # another number of processes, for example
            set_extension(trainer, ScheduleExtension(self._epochs * steps, round(self.plan.total / before * steps)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the plan away again."""
        set_extension(trainer, None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the plan away again."""
        set_extension(trainer, None)


def extend_training(checkpoint: str | Path, more_epochs: int, *, planned_epochs: int | None = None) -> ExtendedRun:
    """Return the callback with which a run goes on for more epochs than it was planned for.

    Learning rate, weight decay, momentum and a temperature that is scheduled over the run are functions of one step,
    and that step is re-planned, so they stay together, and none of them jumps at the checkpoint. From the end of a run,
    where the learning rate is spent and a teacher's momentum is 1, that step goes back, over a tenth of the added
    steps, to where a run of the new length would stand, and then forward to the end again: a re-warming along the
    schedules themselves. From a checkpoint on the way, the rest of the schedules is stretched. Rates that fall in steps
    (MoCo v1) keep their steps, and what counts in epochs (the warm-up of a teacher's temperature, frozen layers) is not
    changed.

    Add the callback to the Trainer and fit from the checkpoint; a stop within the extension resumes with the same
    callback, from its own checkpoint:

        extension = lc.resuming.extend_training("last.ckpt", more_epochs=100)
        trainer = L.Trainer(max_epochs=extension.max_epochs, callbacks=[extension])
        trainer.fit(model, data, ckpt_path=extension.checkpoint)

    Args:
        checkpoint: Path of a Lightning checkpoint, written at the end of an epoch; loaded with ``weights_only=True``.
        more_epochs: Epochs to add to the planned ones, >= 1.
        planned_epochs: Epochs that the run was planned for; None: those that the checkpoint has done, as at its end.

    Raises:
        ValueError: If a number is out of its range, or the file is damaged or no checkpoint of a fit.
        FileNotFoundError: If there is no such file.
    """
    check_at_least("more_epochs", more_epochs, 1)
    state = load_checkpoint(checkpoint, mmap=True)
    hint = "Give a checkpoint that `ModelCheckpoint` or `trainer.save_checkpoint` wrote in a fit"
    if not isinstance(state, dict) or "loops" not in state:
        fail("checkpoint", "be a Lightning checkpoint with the state of its loops", str(checkpoint), hint)
    steps = int(state["global_step"])
    epochs = int(state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    require(steps > 0 and epochs > 0, "checkpoint", "have done at least one epoch", (epochs, steps), hint)
    if planned_epochs is None:
        planned_epochs = epochs
    check_at_least("planned_epochs", planned_epochs, epochs, f"The checkpoint has done {epochs} already")
    plan = ScheduleExtension(done=steps, total=round(steps * planned_epochs / epochs))
    return ExtendedRun(str(checkpoint), planned_epochs + more_epochs, plan, epochs)


class HeadWarmup(L.Callback):
    """Keeps the backbone where it is for the first epochs, while the heads get used to it.

    The gradients of the backbone are dropped before each step: a parameter without gradient is left alone by the
    optimizer, weight decay included, and DDP, which has summed all gradients by then, sees nothing of it. Running
    averages of BatchNorm move on. Brought by `from_pretrained_backbone`; another one in the Trainer's callbacks wins.

    Args:
        epochs: Epochs in which the backbone keeps its weights, >= 0.

    Raises:
        ValueError: If ``epochs`` is below 0.
    """

    def __init__(self, epochs: int) -> None:
        check_not_negative("epochs", epochs)
        self.epochs = epochs

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of the backbone."""
        if trainer.current_epoch >= self.epochs:
            return
        backbone = pl_module.backbone
        for parameter in backbone.parameters():  # type: ignore[union-attr]  # a module
            parameter.grad = None
        if not has_gradients([optimizer]):
            hint = "Set `head_warmup_epochs=0`: this method has no heads to warm up"
            fail("head_warmup_epochs", "be 0 where only the backbone is trained", self.epochs, hint)


def from_pretrained_backbone(
    module: _Method,
    weights: str | Path | Mapping[str, Tensor] | nn.Module,
    *,
    head_warmup_epochs: int = 1,
    skip: Sequence[str] = (),
) -> _Method:
    """Start a method from the weights of a backbone: its own backbone, and every momentum copy of it.

        model = lc.resuming.from_pretrained_backbone(
            lc.DINO("resnet50"), timm.create_model("resnet50", pretrained=True)
        )

    Args:
        module: A method of this package, new; changed in place. Its heads start at random.
        weights: A network such as timm's, with weights; a ``state_dict`` of it; or a file with one, or with a Lightning
            checkpoint of a method of this package, of which the backbone is taken; read with ``weights_only=True``. A
            classifier ("head", "fc", "classifier") that the backbone does not have is left out.
        head_warmup_epochs: Epochs in which the backbone keeps its weights, >= 0; see `HeadWarmup`.
        skip: Beginnings of names that keep their random start, such as ``["conv1"]`` for the stem of ``small_images``.

    Returns:
        The module, which brings a `HeadWarmup` to its Trainer.

    Raises:
        ValueError: If a weight is missing, left over or of another shape (the message names the first ones), or if a
            file is damaged.
        TypeError: If the module is no method of this package, or the weights are none.
    """
    check_not_negative("head_warmup_epochs", head_warmup_epochs)
    if not isinstance(module, SelfSupervisedModule):
        fail("module", "be a method of this package", type(module).__name__, "Give e.g. lc.DINO(...)", TypeError)
    given = _state_of(weights)
    backbone = getattr(module.backbone, "vit", module.backbone)  # the timm network within a `MaskedViT`
    given = _fitting(given, backbone.state_dict(), skip)
    backbone.load_state_dict(given, strict=False)  # compared above
    for online, momentum in getattr(module, "momentum_pairs", list)():
        if online is module.backbone:
            momentum.load_state_dict(online.state_dict())
    if head_warmup_epochs > 0:
        module._default_callbacks = mark_defaults([*module.default_callbacks(), HeadWarmup(head_warmup_epochs)], module)
    return module


def _state_of(weights: Any) -> dict[str, Tensor]:
    """Return the weights as names and tensors."""
    if isinstance(weights, str | Path):
        weights = load_checkpoint(weights)
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if isinstance(weights, Mapping) and isinstance(weights.get("state_dict"), Mapping):
        whole = weights["state_dict"]
        weights = {name.removeprefix("backbone."): t for name, t in whole.items() if name.startswith("backbone.")}
        weights = {name.removeprefix("masked.vit."): t for name, t in weights.items() if name != "masked.mask_token"}
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        hint = "Give a network, its `state_dict()`, or a file with one"
        fail("weights", "be the weights of a network", type(weights).__name__, hint, TypeError)
    return dict(weights)


def _fitting(given: dict[str, Tensor], own: Mapping[str, Tensor], skip: Sequence[str]) -> dict[str, Tensor]:
    """Return the weights that the backbone takes, or tell what does not fit."""
    skipped = tuple(skip)
    given = {
        name: tensor
        for name, tensor in given.items()
        if not (skipped and name.startswith(skipped)) and (name in own or name.split(".")[0] not in _CLASSIFIERS)
    }
    missing = [name for name in own if name not in given and not (skipped and name.startswith(skipped))]
    other = [name for name in given if name in own and given[name].shape != own[name].shape]
    left = [name for name in given if name not in own]
    for names, what in ((missing, "are missing"), (left, "are not in the backbone"), (other, "have another shape")):
        if names:
            hint = "Build the backbone as the weights were made, or name what is to start at random in `skip`"
            fail("weights", "fit the backbone", f"{len(names)} that {what}, first {names[0]!r}", hint)
    return given

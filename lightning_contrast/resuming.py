"""Extended runs and initialization from a pretrained backbone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_contrast._checks import check_at_least, check_not_negative, fail, require
from lightning_contrast.checkpoints import load_checkpoint
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn.auxiliary_batchnorm import without_auxiliary
from lightning_contrast.nn.backbones import ARCHITECTURE, BUILT_AS, strip_prefix
from lightning_contrast.runtime.default_callbacks import mark_defaults
from lightning_contrast.runtime.optimizer_steps import has_gradients
from lightning_contrast.runtime.run_length import epoch_length_changed, epoch_steps, measure_run
from lightning_contrast.runtime.schedule_position import ScheduleExtension, set_extension

__all__ = ["ExtendedRun", "HeadWarmup", "extend_training", "from_pretrained_backbone"]

_Method = TypeVar("_Method", bound=SelfSupervisedModule)
_CLASSIFIERS = ("head", "fc", "classifier", "last_linear")


class ExtendedRun(L.Callback):
    """Extends the schedules of a run without a jump; created by `extend_training`.

    Attributes:
        checkpoint: Path of the checkpoint to resume from.
        max_epochs: Length of the extended run, for the Trainer.
        plan: Schedule position, in optimizer steps of the previous run.
    """

    def __init__(self, checkpoint: str, max_epochs: int, plan: ScheduleExtension, epochs: int) -> None:
        self.checkpoint, self.max_epochs, self.plan = checkpoint, max_epochs, plan
        self._epochs = epochs  # completed in the checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the plan before optimizers and schedules are created."""
        if stage != "fit":
            return
        if trainer.max_epochs != self.max_epochs:
            hint = "Set `max_epochs=extension.max_epochs` on the Trainer"
            fail("max_epochs", f"be {self.max_epochs} for this extension", trainer.max_epochs, hint)
        set_extension(trainer, self.plan)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the run resumed from the checkpoint or from a later one."""
        measure_run(trainer)
        if trainer.global_step < self.plan.done:
            hint = "Pass `ckpt_path=extension.checkpoint`, or a later checkpoint of the extended run, to `fit`"
            fail("ckpt_path", f"lead to step {self.plan.done} or later", trainer.global_step, hint)
        steps, before = epoch_steps(trainer, self._epochs), self.plan.done / self._epochs
        if steps is not None and epoch_length_changed(steps, before):  # another number of processes, for example
            done = round(self._epochs * steps)
            set_extension(trainer, ScheduleExtension(done, round(self.plan.total / before * steps)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the plan."""
        set_extension(trainer, None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the plan."""
        set_extension(trainer, None)


def extend_training(checkpoint: str | Path, more_epochs: int, *, planned_epochs: int | None = None) -> ExtendedRun:
    """Return a callback that extends a run beyond its planned number of epochs.

    Learning rate, weight decay, momentum and a scheduled temperature are functions of one schedule position, which is
    re-planned, so that all stay consistent and none jumps at the checkpoint. At the end of a run, where the learning
    rate is 0 and the momentum of a teacher is 1, the position moves back within a tenth of the added steps to that of a
    run of the new length, and then forward to the end: a re-warming along the schedules. From an intermediate
    checkpoint, the rest of the schedules is stretched. Milestones of step schedules (MoCo v1) and schedules counted in
    epochs (warm-up of the teacher temperature, frozen layers) do not change.

    Add the callback to the Trainer and fit from the checkpoint. To resume an interrupted extension, use the same
    callback with a checkpoint of the extended run:

        extension = lc.resuming.extend_training("last.ckpt", more_epochs=100)
        trainer = L.Trainer(max_epochs=extension.max_epochs, callbacks=[extension])
        trainer.fit(model, data, ckpt_path=extension.checkpoint)

    Args:
        checkpoint: Path of a Lightning checkpoint written at the end of an epoch; loaded with ``weights_only=True``.
        more_epochs: Epochs to add to the planned ones, >= 1.
        planned_epochs: Planned epochs of the run; None takes the epochs completed in the checkpoint.

    Raises:
        ValueError: If a number is out of range, or the file is damaged or not a checkpoint of a fit.
        FileNotFoundError: If the file does not exist.
    """
    check_at_least("more_epochs", more_epochs, 1)
    state = load_checkpoint(checkpoint, mmap=True)
    hint = "Give a checkpoint written by `ModelCheckpoint` or `trainer.save_checkpoint` during a fit"
    if not isinstance(state, dict) or "loops" not in state:
        fail("checkpoint", "be a Lightning checkpoint with the state of its loops", str(checkpoint), hint)
    steps = int(state["global_step"])
    epochs = int(state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    require(steps > 0 and epochs > 0, "checkpoint", "have completed at least one epoch", (epochs, steps), hint)
    if planned_epochs is None:
        planned_epochs = epochs
    check_at_least("planned_epochs", planned_epochs, epochs, f"The checkpoint has completed {epochs}")
    plan = ScheduleExtension(done=steps, total=round(steps * planned_epochs / epochs))
    return ExtendedRun(str(checkpoint), planned_epochs + more_epochs, plan, epochs)


class HeadWarmup(L.Callback):
    """Freezes the backbone for the first epochs while the heads are trained.

    The gradients of the backbone are set to None before each step, so the optimizer does not update it, including
    weight decay; DDP has reduced the gradients before. Running statistics of BatchNorm are updated. Added by
    `from_pretrained_backbone` unless the Trainer has another one.

    Args:
        epochs: Number of epochs in which the backbone is frozen, >= 0.

    Raises:
        ValueError: If ``epochs`` is below 0.
    """

    def __init__(self, epochs: int) -> None:
        check_not_negative("epochs", epochs)
        self.epochs = epochs

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Set the gradients of the backbone to None."""
        if trainer.current_epoch >= self.epochs:
            return
        backbone = pl_module.backbone
        for parameter in backbone.parameters():  # type: ignore[union-attr]  # a module
            parameter.grad = None
        if not has_gradients([optimizer]):
            hint = "Set `head_warmup_epochs=0`: this method has no heads"
            fail("head_warmup_epochs", "be 0 if only the backbone is trained", self.epochs, hint)


def from_pretrained_backbone(
    module: _Method,
    weights: str | Path | Mapping[str, Tensor] | nn.Module,
    *,
    head_warmup_epochs: int = 1,
    skip: Sequence[str] = (),
) -> _Method:
    """Load pretrained weights into the backbone of a method and its momentum copies.

        model = lc.resuming.from_pretrained_backbone(
            lc.DINO("resnet50"), timm.create_model("resnet50", pretrained=True)
        )

    Args:
        module: A new method of this package; modified in place. Its heads keep their random initialization.
        weights: A network such as one of timm; its ``state_dict``; or a file of `export.export`, with a
            ``state_dict``, or with a Lightning checkpoint of a method of this package, whose backbone is used; read
            with ``weights_only=True``. A classifier ("head", "fc", "classifier") that the backbone lacks is ignored.
        head_warmup_epochs: Number of epochs in which the backbone is frozen, >= 0; see `HeadWarmup`.
        skip: Prefixes of names that keep their random initialization, such as ``["conv1"]`` for the stem of
            ``small_images``.

    Returns:
        The module, which adds a `HeadWarmup` to its Trainer.

    Raises:
        ValueError: If a weight is missing, unexpected or of another shape (the message names the first one), or if a
            file is damaged.
        TypeError: If ``module`` is not a method of this package or ``weights`` are not weights.
    """
    check_not_negative("head_warmup_epochs", head_warmup_epochs)
    if not isinstance(module, SelfSupervisedModule):
        fail("module", "be a method of this package", type(module).__name__, "Give e.g. lc.DINO(...)", TypeError)
    if isinstance(weights, str | Path):
        weights = load_checkpoint(weights)
    backbone = getattr(module.backbone, "vit", module.backbone)  # the timm network in a `MaskedViT`
    _check_stem(weights, backbone, skip)
    given = _state_of(weights)
    given = _fitting(given, backbone.state_dict(), skip)
    backbone.load_state_dict(given, strict=False)  # compared above
    for online, momentum in getattr(module, "momentum_pairs", list)():
        if online is module.backbone:
            momentum.load_state_dict(online.state_dict())
    if head_warmup_epochs > 0:
        module._default_callbacks = mark_defaults([*module.default_callbacks(), HeadWarmup(head_warmup_epochs)], module)
    return module


def _check_stem(weights: Any, backbone: nn.Module, skip: Sequence[str]) -> None:
    """Check that an exported backbone has the stem of the network: both may have the same shapes."""
    built = getattr(weights, BUILT_AS, None) if isinstance(weights, nn.Module) else None
    built = weights.get(ARCHITECTURE) if isinstance(weights, Mapping) else built
    own = getattr(backbone, BUILT_AS, None)
    if isinstance(built, Mapping) and own is not None and not skip:
        hint = "Build the method with the same `small_images`, or list the weights of the stem in `skip`"
        rule = f"have the stem of the backbone, small_images={own['small_images']}"
        require(built["small_images"] == own["small_images"], "weights", rule, built["small_images"], hint)


def _state_of(weights: Any) -> dict[str, Tensor]:
    """Return the weights as a dict of tensors."""
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if isinstance(weights, Mapping) and isinstance(weights.get("state_dict"), Mapping):
        whole = weights["state_dict"]
        of_method = ARCHITECTURE not in weights and any(name.startswith("backbone.") for name in whole)
        weights = strip_prefix(whole)
        if of_method:
            own = {name.removeprefix("backbone."): t for name, t in whole.items() if name.startswith("backbone.")}
            weights = {name.removeprefix("masked.vit."): t for name, t in own.items() if name != "masked.mask_token"}
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        hint = "Give a network, its `state_dict()`, or a file with one"
        fail("weights", "be the weights of a network", type(weights).__name__, hint, TypeError)
    return without_auxiliary(weights)


def _fitting(given: dict[str, Tensor], own: Mapping[str, Tensor], skip: Sequence[str]) -> dict[str, Tensor]:
    """Return the weights of the backbone, or raise if they do not match."""
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
            hint = "Build the backbone as for the weights, or list weights to initialize randomly in `skip`"
            fail("weights", "fit the backbone", f"{len(names)} that {what}, first {names[0]!r}", hint)
    return given

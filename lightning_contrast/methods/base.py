"""What every method would otherwise repeat word for word; never an algorithm."""

import inspect
from collections.abc import Sequence
from types import FrameType
from typing import Any, ClassVar, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_contrast import distributed, optim
from lightning_contrast._checks import check_not_negative, check_positive, fail, require
from lightning_contrast.contracts import require_views, split_batch
from lightning_contrast.nn import ScheduledTemperature, build_backbone, check_image_size
from lightning_contrast.nn.temperature import Temperature
from lightning_contrast.runtime.default_callbacks import mark_defaults, missing_defaults
from lightning_contrast.runtime.fsdp import (
    ShardedClippingModule,
    has_local_batchnorm,
    initialize_optimizer_state,
    shard_submodules,
    strategy_module,
)
from lightning_contrast.runtime.hparams import caller, settings_as_dicts, unsaved_arguments
from lightning_contrast.runtime.run_length import EpochScheduledModule, global_batch_size, planned_steps, rate_factor
from lightning_contrast.runtime.schedule_position import schedule_position


class SelfSupervisedModule(ShardedClippingModule, EpochScheduledModule):
    """Base of the methods: features, evaluation steps, optimizer and schedule, default plug-ins, sharding.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        optimizer: "sgd", "adamw", "lars", "lamb", or a callable that gets the parameter groups and ``lr``.
        lr: Learning rate after the warm-up, absolute. None: ``base_lr`` scaled with the global batch (``lr_rule``).
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs in which the learning rate rises linearly from 0.
    """

    base_lr: ClassVar[float]
    """The paper's learning rate for a global batch of 256."""
    lr_rule: ClassVar[str] = "linear"
    sharded_methods: ClassVar[dict[str, Sequence[str]]] = {}
    """Methods other than ``forward`` that a step calls, by the name of the submodule that has them."""
    encodes_whole_images: ClassVar[bool] = True
    """False if the step output ``"features"`` belongs to images of which patches are masked or left out."""

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool,
        feature_dim: int | None,
        backbone_kwargs: dict[str, Any] | None,
        optimizer: optim.OptimizerLike,
        lr: float | None,
        weight_decay: float,
        warmup_epochs: int,
    ) -> None:
        super().__init__()
        if lr is not None:
            check_positive("lr", lr)
        check_not_negative("weight_decay", weight_decay)
        check_not_negative("warmup_epochs", warmup_epochs)
        optim.check_optimizer(optimizer)
        self.backbone, self.feature_dim = build_backbone(
            backbone, small_images=small_images, feature_dim=feature_dim, backbone_kwargs=backbone_kwargs
        )
        self.optimizer, self.lr, self.weight_decay, self.warmup_epochs = optimizer, lr, weight_decay, warmup_epochs
        self._default_callbacks: list[L.Callback] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, C, H, W) for downstream work."""
        return self.backbone(images)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def views(self, batch: Any, count: int) -> list[Tensor]:
        """Return the ``count`` views of a training batch, each (B, C, h, w), or say what is wrong with the batch."""
        views = require_views(batch, count, minimum=1 if distributed.is_distributed() else 2)
        for view in views:
            check_image_size(self.backbone, view)
        return views

    def images(self, batch: Any) -> Tensor:
        """Return the images (B, C, H, W) of an evaluation batch; of a list of views, the first."""
        images, _ = split_batch(batch)
        images = images if isinstance(images, Tensor) else images[0]
        hint = "Add `ViewAugmentation(...)` to the Trainer's callbacks, or let the loader yield normalised floats"
        require(images.is_floating_point(), "images", "be floating point", str(images.dtype), hint)
        check_image_size(self.backbone, images)
        return images

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return ``{"features": (B, F)}``; probes judge a run, there is no validation loss."""
        return {"features": self(self.images(batch))}

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the features (B, F) of the batch's images."""
        return self(self.images(batch))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: norms and biases carry no weight decay; ``"fixed_lr"`` skips the schedule."""
        return optim.parameter_groups(strategy_module(self), self.weight_decay)

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the learning rate at an optimizer step as a share of its peak: warm-up, then cosine to 0."""
        return optim.warmup_cosine(step, warmup_steps, total_steps)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule per optimizer step."""
        warmup_steps, total_steps = planned_steps(self.trainer, self.warmup_epochs)
        lr = self.lr
        if lr is None:
            global_batch = global_batch_size(self.trainer)
            lr = optim.scaled_lr(self.base_lr, global_batch, rule=self.lr_rule)
            rank_zero_info(f"{type(self).__name__}: learning rate {lr:g} for a global batch of {global_batch} images.")
        optimizer = initialize_optimizer_state(optim.build_optimizer(self.optimizer, self.parameter_groups(), lr=lr))
        factor = rate_factor(self.trainer, self.lr_factor, warmup_steps, total_steps)
        factors = [optim.constant if group.get("fixed_lr", False) else factor for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}

    def on_fit_start(self) -> None:
        """Warn once where several ranks keep BatchNorm statistics of their own."""
        if self.trainer.world_size > 1 and has_local_batchnorm(self):
            rank_zero_warn("BatchNorm statistics differ between ranks; set `sync_batchnorm=True` on the Trainer.")

    def default_callbacks(self) -> list[L.Callback]:
        """Return new instances of the plug-ins that the algorithm cannot do without."""
        return []

    def configure_callbacks(self) -> list[L.Callback]:
        """Bring the default plug-ins of which the Trainer has none: the user's own always win."""
        if self._default_callbacks is None:  # kept, since a new instance at a second fit would lose its state
            self._default_callbacks = mark_defaults(self.default_callbacks(), self)
        return missing_defaults(self._default_callbacks, self.trainer.callbacks, self)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Shard the submodules under FSDP2; every other strategy wraps the whole module itself."""
        if self.device_mesh is not None:
            shard_submodules(self, self.device_mesh, self.sharded_methods)

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Save the constructor's plain arguments, dataclasses as dicts; modules would make a checkpoint unloadable."""
        frame = frame or caller(inspect.currentframe())
        ignored = ([ignore] if isinstance(ignore, str) else list(ignore or ())) + unsaved_arguments(frame)
        super().save_hyperparameters(*args, ignore=ignored, frame=frame, logger=logger)
        self.hparams.update(settings_as_dicts(frame))


def require_crops(module: SelfSupervisedModule, batch: Any, global_views: int = 2) -> list[Tensor]:
    """Return the views of a training batch, global ones first, or say what is wrong with the batch.

    Local views are those that come after the global ones: any number, of any size, none of them needed. Where views
    have several sizes, those that begin with one size are the global ones.

    Args:
        module: The method.
        batch: A training batch.
        global_views: How many global views the method takes.

    Returns:
        At least ``global_views`` views, each (B, C, h, w).

    Raises:
        ValueError: If the batch holds one tensor of images, fewer views, more global views, or views of unequal batch
            sizes.
    """
    images, _ = split_batch(batch)
    if isinstance(images, Tensor):
        return module.views(batch, global_views)  # which says what to add
    hint = f"Give a policy that makes {global_views} global views and then local ones"
    require(len(images) >= global_views, "batch", f"hold at least {global_views} views", len(images), hint)
    sizes = [tuple(view.shape[-2:]) for view in images]
    first = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if first is not None and first > global_views:
        fail("views", f"begin with {global_views} global views", f"{first} of one size: {sizes}", hint)
    return module.views(batch, len(images))


def temperature_of(module: L.LightningModule) -> float | Tensor:
    """Return the temperature of this step, and log ``train/temperature`` where it is not a fixed number.

    A schedule is a function of ``trainer.global_step``, a number on the host, so that a resumed run goes on exactly
    where it stopped and nothing waits for the device. All micro-batches of a step have one temperature.

    Args:
        module: A method with an attribute ``temperature``.

    Returns:
        A number, or a tensor of one element with gradient where the temperature is learned.
    """
    temperature = cast("Temperature", module.temperature)
    if isinstance(temperature, int | float):
        return temperature
    value: float | Tensor
    if isinstance(temperature, nn.Module):
        value = temperature()
    elif isinstance(temperature, ScheduledTemperature):
        step: float = module.global_step
        total: float | None = None
        if temperature.steps is None:
            step, total = schedule_position(module.trainer, step, module.trainer.estimated_stepping_batches)
        value = temperature(step, total)
    else:
        value = temperature(module.global_step)
    module.log("train/temperature", value.detach() if isinstance(value, Tensor) else value)
    return value

"""Base class of the methods."""

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from lightning_contrast import distributed, optim
from lightning_contrast._checks import check_choice, check_not_negative, check_positive, require
from lightning_contrast.augment import ViewPolicy
from lightning_contrast.contracts import require_views, split_batch
from lightning_contrast.nn import Backbone, build_backbone, check_image_size
from lightning_contrast.nn.multi_crop import count_crops
from lightning_contrast.optim.groups import split_added_groups
from lightning_contrast.runtime.fsdp import initialize_optimizer_state, strategy_module
from lightning_contrast.runtime.learning_rate import StepSchedule
from lightning_contrast.runtime.method_module import MethodModule
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options


class SelfSupervisedModule(MethodModule):
    """Backbone, views, evaluation steps, optimizer and learning-rate schedule of a method.

    Args:
        backbone: Name of a timm model, a module that maps images (B, C, H, W) to features (B, F), or a `Backbone`.
        optimizer: "sgd", "adamw", "lars", "lamb", or a callable that takes the parameter groups and ``lr``.
        lr: Learning rate after the warm-up, absolute. None: ``base_lr`` scaled with the global batch (``lr_rule``).
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up. None is ``default_warmup_epochs``, cut to a tenth of a run that is not
            longer; a number that does not fit into the run is refused.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float]
    """The paper's learning rate for a global batch of 256."""
    lr_rule: ClassVar[str] = "linear"
    lr_schedules: ClassVar[tuple[str | None, ...]] = (None, "constant")
    """The choices of ``lr_schedule``."""
    adamw_options: ClassVar[dict[str, Any]] = {}
    """Options of ``optimizer="adamw"`` as published, such as ``betas``."""
    views: ClassVar[Callable[..., ViewPolicy]]
    """The published view policy: ``SimCLR.views(224, mean=..., std=...)``."""
    encodes_whole_images: ClassVar[bool] = True
    """False if the step output ``"features"`` belongs to images of which patches are masked or left out."""
    forward_gives_features: ClassVar[bool] = True
    """Whether `forward` returns what the evaluation steps output as ``"features"``."""

    def __init__(
        self,
        backbone: str | nn.Module | Backbone,
        *,
        optimizer: optim.OptimizerLike,
        lr: float | None,
        weight_decay: float,
        warmup_epochs: int | None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__()
        if lr is not None:
            check_positive("lr", lr)
        check_not_negative("weight_decay", weight_decay)
        if warmup_epochs is not None:
            check_not_negative("warmup_epochs", warmup_epochs)
        optim.check_optimizer(optimizer)
        known, self.lr_schedule = backbone_options(options), options.get("lr_schedule")
        check_choice("lr_schedule", self.lr_schedule, self.lr_schedules)
        network = backbone if isinstance(backbone, Backbone) else build_backbone(backbone, **known)
        (self.backbone, self.feature_dim), self.optimizer, self.lr = network, optimizer, lr
        self.weight_decay, self.warmup_epochs = weight_decay, warmup_epochs

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, C, H, W) for downstream use."""
        return self.backbone(images)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def batch_views(self, batch: Any, count: int) -> list[Tensor]:
        """Return the ``count`` views of a training batch, each (B, C, h, w); raise if the batch is not as expected."""
        views = require_views(batch, count, minimum=1 if distributed.is_distributed() else 2)
        for view in views:
            check_image_size(self.backbone, view)
        return views

    def batch_crops(self, batch: Any, global_views: int | None = None) -> list[Tensor]:
        """Return the global (None: two or more) and then any local views of a training batch, each (B, C, h, w)."""
        return self.batch_views(batch, count_crops(batch, global_views))

    def images(self, batch: Any) -> Tensor:
        """Return the images (B, C, H, W) of an evaluation batch; of a list of views, the first."""
        images, _ = split_batch(batch)
        images = images if isinstance(images, Tensor) else images[0]
        hint = "Add `ViewAugmentation(...)` to the Trainer's callbacks, or let the loader yield normalized floats"
        require(images.is_floating_point(), "images", "be floating point", str(images.dtype), hint)
        check_image_size(self.backbone, images)
        return images

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return ``{"features": (B, F)}`` for the probes; there is no validation loss."""
        return {"features": self(self.images(batch))}

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the features (B, F) of the batch's images."""
        return self(self.images(batch))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: no weight decay on norms and biases; ``"fixed_lr"`` skips the schedule."""
        groups = optim.parameter_groups(strategy_module(self), self.weight_decay)
        return [group | self.adamw_options for group in groups] if self.optimizer == "adamw" else groups

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the learning rate at an optimizer step as a share of its peak: linear warm-up, then cosine to 0."""
        return optim.warmup_cosine(step, warmup_steps, total_steps)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and a schedule that is updated every optimizer step."""
        lr = self.plan_learning_rate()
        optimizer = initialize_optimizer_state(optim.build_optimizer(self.optimizer, self.parameter_groups(), lr=lr))
        split_added_groups(optimizer, self.parameter_groups)
        schedule = StepSchedule(optimizer, self.rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

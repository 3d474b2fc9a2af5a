"""SEED: a small student learns a frozen teacher's similarities of each image to a queue of its embeddings.

Paper: https://arxiv.org/abs/2101.04731. Reference implementation: jacobswan1/SEED.
Differs from it: the teacher's temperature is the paper's 0.01, not the code's 1e-4; the queue starts empty instead of
random; no weight decay on norms and biases; the schedule is updated every step instead of every epoch. The small crops
of the best published students are an option.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack

from torch import nn

from lightning_contrast import optim
from lightning_contrast._checks import check_at_least, check_choice
from lightning_contrast.augment import ViewPolicy, ViewSpec, make_policy
from lightning_contrast.augment.view_spec import ViewOptions
from lightning_contrast.methods.distill import Distill
from lightning_contrast.nn.feature_queue import QueueDtype
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions


class SEED(Distill):
    """`Distill` with the loss "seed" and its published recipe.

    A batch holds one view (B, C, h, w), and then any small crops; `forward` gives the student's features (B, F). With
    small crops the loss is the sum of that of the views and that of the crops, which have a queue of their own.

    Args:
        backbone: The student: name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        teacher: As in `Distill`; the published teachers keep their projector, of 128 outputs.
        loss: "seed", the loss of the method.
        teacher_dim: As in `Distill`.
        teacher_kwargs: As in `Distill`.
        projector: A module (B, F) -> (B, T) that replaces MoCo v2's MLP.
        queue_size: Rows K of the queue, at least the images of one step.
        queue_dtype: "float32", "float16", "int8" or "int4".
        temperature: Divisor of the student's similarities, > 0.
        teacher_temperature: Divisor of the teacher's, > 0.
        small_crops: Number of small crops per image, >= 0; the best published students have 6, of 96 pixels, which
            the policy makes too: ``SEED.views(224, small_crops=6)``. A teacher of one image size is refused.
        optimizer: "sgd" as in the paper, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.03 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of the ramp from 0.03 to the peak before the cosine to 0.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.03

    def __init__(
        self,
        backbone: str | nn.Module,
        teacher: str | Path | nn.Module | None = None,
        *,
        loss: Literal["seed"] = "seed",
        teacher_dim: int | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
        projector: nn.Module | None = None,
        queue_size: int = 65536,
        queue_dtype: QueueDtype = "float32",
        temperature: float = 0.2,
        teacher_temperature: float = 0.01,
        small_crops: int = 0,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 5,
        **options: Unpack[MethodOptions],
    ) -> None:
        check_choice("loss", loss, ("seed",))
        super().__init__(
            backbone,
            teacher,
            loss=loss,
            teacher_dim=teacher_dim,
            teacher_kwargs=teacher_kwargs,
            projector=projector,
            queue_size=queue_size,
            queue_dtype=queue_dtype,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            small_crops=small_crops,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            **options,
        )

    @staticmethod
    def views(
        size: int,
        *,
        small_crops: int = 0,
        small_size: int = 96,
        small_scale: tuple[float, float] = (0.05, 0.14),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Unpack[ViewOptions],
    ) -> ViewPolicy:
        """Return the published policy, one view of `moco_v2_views`, and small crops with the area and size of SwAV."""
        check_at_least("small_crops", small_crops, 0)
        view = ViewSpec(size, (0.2, 1.0), (0.4, 0.4, 0.4, 0.1), blur_p=0.5)
        small = dataclasses.replace(view, size=small_size, scale=small_scale)
        return make_policy([view, *[small] * small_crops], mean=mean, std=std, **options)

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: a ramp from 0.03, the rate of 256 images, to the peak, then a cosine to 0."""
        return optim.warmup_cosine(step, warmup_steps, total_steps, start=min(1.0, self.base_lr / self.peak_lr))

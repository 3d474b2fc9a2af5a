"""DINO: a student predicts, from every view, how its own moving average sorts the global views into prototypes.

Paper: https://arxiv.org/abs/2104.14294.
Reference program: facebookresearch/dino.
Differs from it: the teacher's temperature warms up as in the paper, 0.04 to 0.07 in 30 epochs, where the program's
default stays at 0.04; the centre moves once per optimizer step, not per micro-batch of an accumulation; class tokens of
timm's ViTs, whose position embeddings are resized without the program's offset of 0.1.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_probability
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses import dino_loss
from lightning_contrast.methods.base import require_crops
from lightning_contrast.methods.distillation import DistillationModule
from lightning_contrast.metrics.teacher import teacher_statistics
from lightning_contrast.nn import Center, Norm, dino_head
from lightning_contrast.nn.backbones import vit_defaults
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.nn.teacher import teacher_of
from lightning_contrast.optim import OptimizerLike

_GLOBAL_VIEWS = 2


class DINO(DistillationModule):
    """Distil a moving average of the network from global views into all views.

    A batch holds two global views (B, C, h, w) and then any number of local ones (none at all too), of any size;
    `forward` gives features (B, F). ``momentum_backbone`` is the teacher, which the paper evaluates. Logs
    ``train/teacher_entropy``, ``train/prototype_entropy`` (nats; both 0 in a collapse to one prototype, both ln K in a
    collapse to the uniform distribution) and ``train/agreement`` of student and teacher (0..1).

    A ResNet-50 of the paper has ``optimizer="sgd"``, ``lr`` 0.03 x global batch / 256 and a weight decay of 1e-4 at
    both ends.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F). It must take all
            sizes of views: a ViT by name is built with ``dynamic_img_size=True`` and ``drop_path_rate=0.1``.
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        prototypes: K, the width of the logits, also of a ``projector`` of your own; >= 2.
        hidden_dim: Width of the head's hidden layers.
        bottleneck_dim: Width of what the prototypes are compared with.
        head_norm: Norm of the head's hidden layers, "batch", "layer" or None as in the paper.
        norm_last_layer: Keep all prototypes at length 1; False is better and safe for small ViTs only.
        projector: A module (N, F) -> (N, K) in the place of the head; the teacher gets a copy. Its ``last_layer``, if
            it has one, is what is frozen at first.
        student_temperature: Divisor of the student's logits, > 0.
        teacher_temperature: Divisor of the teacher's logits after the warm-up, > 0.
        teacher_temperature_start: The same in the first epoch, > 0.
        teacher_temperature_epochs: Epochs of this warm-up; 0 for none.
        center_momentum: Share of the centre that a step keeps, in [0, 1].
        momentum: Share of the teacher that the first step keeps, in [0, 1]; it rises to 1 as a cosine. 0.9995 is
            advised for a batch of 256.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is the paper's 0.0005 x global batch / 256.
        final_lr: Learning rate at the end, absolute.
        weight_decay: At the start, of all parameters but norms and biases.
        final_weight_decay: The same at the end, reached as a cosine.
        warmup_epochs: Epochs of linear warm-up before the cosine to ``final_lr``.
        freeze_last_layer_epochs: Epochs in which the prototypes keep their weights.
        clip_grad: Largest norm of each parameter's gradient on its own; None for no clipping. A ``gradient_clip_val``
            of the Trainer takes its place.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_norm: Norm = None,
        norm_last_layer: bool = True,
        projector: nn.Module | None = None,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_epochs: int = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        final_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        warmup_epochs: int = 10,
        freeze_last_layer_epochs: int = 1,
        clip_grad: float | None = 3.0,
    ) -> None:
        super().__init__(
            backbone,
            small_images=small_images,
            feature_dim=feature_dim,
            backbone_kwargs=vit_defaults(backbone, backbone_kwargs),
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
        )
        self.set_schedules(
            final_lr=final_lr,
            final_weight_decay=final_weight_decay,
            clip_grad=clip_grad,
            freeze_last_layer_epochs=freeze_last_layer_epochs,
        )
        self.set_temperatures(
            student_temperature, teacher_temperature, teacher_temperature_start, teacher_temperature_epochs
        )
        check_probability("center_momentum", center_momentum)
        check_probability("momentum", momentum)
        self.momentum = momentum
        self.projector = projector or dino_head(
            self.feature_dim, hidden_dim, bottleneck_dim, prototypes, norm=head_norm, norm_last_layer=norm_last_layer
        )
        self.momentum_backbone, self.momentum_projector = teacher_of(self.backbone), teacher_of(self.projector)
        self.center = Center(prototypes, center_momentum)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean cross entropy of every view with the teacher's view of the other global views."""
        views = require_crops(self, batch, _GLOBAL_VIEWS)  # V x (B, C, h, w)
        features = forward_by_size(self.backbone, views)  # V x (B, F)
        student = self.projector(torch.cat(features)).split(len(views[0]))  # V x (B, K)
        with torch.no_grad():
            known = forward_by_size(self.momentum_backbone, views[:_GLOBAL_VIEWS])  # 2 x (B, F)
            logits = self.momentum_projector(torch.cat(known))  # (2B, K)
        teacher = logits.split(len(views[0]))  # 2 x (B, K)
        center, temperature = self.center(logits), self.teacher_temperature  # (K,), as the last step left it
        loss = dino_loss(
            student,
            teacher,
            center,
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
        )
        self.log("train/loss", loss, batch_size=len(views[0]))
        self.log_all(teacher_statistics(student, teacher, center, temperature), batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the student's parts with those of the teacher."""
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def step_states(self) -> list[nn.Module]:
        """Return the centre, which moves once per optimizer step."""
        return [self.center]

    def default_callbacks(self) -> list[L.Callback]:
        """Return what moves the teacher and the centre."""
        return [MomentumUpdate(self.momentum)]

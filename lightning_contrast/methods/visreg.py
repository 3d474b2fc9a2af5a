"""VISReg: LeJEPA's invariance, and a regularizer of center, scale and shape that also acts on collapsed embeddings.

Paper: https://arxiv.org/abs/2606.02572.
Reference implementation: HaiyuWu/visreg.
Differs from it: all ranks use the same slices, so that they equal one process; the projector has weight decay; the
warm-up starts at 0, not at 0.001 of the peak. Its runs clip the norm of all gradients at 1 and share BatchNorm's
statistics between ranks: ``Trainer(gradient_clip_val=1.0, sync_batchnorm=True)``.
"""

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_probability
from lightning_contrast.augment import visreg_views
from lightning_contrast.losses import draw_directions, view_invariance, visreg_loss
from lightning_contrast.methods.joint_embedding import JointEmbeddingModule, JointEmbeddingOptions
from lightning_contrast.nn.multi_crop import count_global_views
from lightning_contrast.optim import OptimizerLike


class VISReg(JointEmbeddingModule):
    """Pull all views to the mean of the global views, and keep mean, deviation and slices of each view Gaussian.

    Views as in `JointEmbeddingModule`; all of them enter both terms. The regularizer covers the images of all ranks.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F). With local views
            it must accept their size, a ViT by ``dynamic_img_size=True``.
        hidden_dim: Width of the projector's hidden layers.
        projection_dim: D, the width of the embedding; 384 for a ViT-L.
        regularizer_weight: Share of the regularizer in the loss, in [0, 1]; the invariance has the rest. The paper has
            0.9 for a ViT-B, 0.8 for a ViT-L, 0.6 on Imagenette.
        num_slices: Random directions of each step, the same on all ranks, >= 1.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        weight_decay: Weight decay of all parameters except norms and biases.
        **options: See `JointEmbeddingOptions`. ``lr=None`` is 0.0009 x global batch / 128: the reference's 16 images on
            each of the 8 GPUs that its command line names.
    """

    base_lr: ClassVar[float] = 1.8e-3
    default_warmup_epochs: ClassVar[int] = 5
    views = staticmethod(visreg_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 2048,
        projection_dim: int = 256,
        regularizer_weight: float = 0.9,
        num_slices: int = 4096,
        optimizer: OptimizerLike = "adamw",
        weight_decay: float = 0.05,
        **options: Unpack[JointEmbeddingOptions],
    ) -> None:
        super().__init__(
            backbone,
            head="visreg",
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            optimizer=optimizer,
            weight_decay=weight_decay,
            **options,
        )
        check_probability("regularizer_weight", regularizer_weight)
        check_at_least("num_slices", num_slices, 1, "The paper has 4096")
        self.regularizer_weight, self.num_slices = regularizer_weight, num_slices
        self.save_hyperparameters()

    def view_loss(self, projections: Tensor, views: list[Tensor], generator: torch.Generator) -> Tensor:
        """Return the weighted sum of regularizer and invariance of projections (V, B, D)."""
        count = count_global_views(views)
        local = projections[count:] if count < len(views) else None
        directions = draw_directions(projections, slices=self.num_slices, generator=generator)
        regularizer = visreg_loss(projections, directions)
        invariance = view_invariance(projections[:count], local)
        return self.regularizer_weight * regularizer + (1 - self.regularizer_weight) * invariance

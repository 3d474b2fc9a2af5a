"""LeJEPA: views of an image agree, and the embeddings of each view follow a standard Gaussian (SIGReg).

Paper: https://arxiv.org/abs/2511.08544.
Reference implementation: rbalestr-lab/lejepa, which has the statistic and a minimal example; the script of the ImageNet
runs is not published. Differs from it: no weight decay on norms and biases; the slices of a step depend on its number
and that of its micro-batch.
"""

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_positive, check_probability
from lightning_contrast.augment import lejepa_views
from lightning_contrast.losses import draw_directions, lejepa_loss
from lightning_contrast.methods.joint_embedding import JointEmbeddingModule, JointEmbeddingOptions
from lightning_contrast.nn.multi_crop import count_global_views
from lightning_contrast.optim import OptimizerLike


class LeJEPA(JointEmbeddingModule):
    """Pull all views to the mean of the global views, and keep the embeddings of each view Gaussian.

    There is no teacher, no predictor and no stop-gradient. Views as in `JointEmbeddingModule`; all of them enter both
    terms. SIGReg covers the images of all ranks, each view by itself, and grows with their number as long as the
    embeddings are not Gaussian, so ``regularizer_weight`` belongs to a batch size.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F). With local views
            it must accept their size, a ViT by ``dynamic_img_size=True``.
        hidden_dim: Width of the projector's hidden layers.
        projection_dim: D, the width of the embedding; 16 in the minimal example.
        regularizer_weight: Share of SIGReg in the loss, in [0, 1]; the invariance has the rest. 0.02 in the minimal
            example.
        num_slices: Random directions of each step, the same on all ranks, >= 1.
        knots: Points of the integral of SIGReg, >= 2.
        t_max: End of that integral, > 0.
        optimizer: "adamw" as in the paper, "sgd", "lars", "lamb", or a callable.
        weight_decay: Weight decay of all parameters except norms and biases; 5e-4 for a ResNet.
        **options: See `JointEmbeddingOptions`. ``lr=None`` is the paper's 0.0005 x global batch / 512.
    """

    base_lr: ClassVar[float] = 2.5e-4
    views = staticmethod(lejepa_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 2048,
        projection_dim: int = 512,
        regularizer_weight: float = 0.05,
        num_slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        optimizer: OptimizerLike = "adamw",
        weight_decay: float = 0.05,
        **options: Unpack[JointEmbeddingOptions],
    ) -> None:
        super().__init__(
            backbone,
            head="lejepa",
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            optimizer=optimizer,
            weight_decay=weight_decay,
            **options,
        )
        check_probability("regularizer_weight", regularizer_weight)
        check_at_least("num_slices", num_slices, 1, "The paper has 1024")
        check_at_least("knots", knots, 2, "The paper has 17")
        check_positive("t_max", t_max)
        self.regularizer_weight, self.num_slices, self.knots, self.t_max = regularizer_weight, num_slices, knots, t_max
        self.save_hyperparameters()

    def view_loss(self, projections: Tensor, views: list[Tensor], generator: torch.Generator) -> Tensor:
        """Return the weighted sum of SIGReg and invariance of projections (V, B, D)."""
        count = count_global_views(views)
        return lejepa_loss(
            projections[:count],
            projections[count:] if count < len(views) else None,
            draw_directions(projections, slices=self.num_slices, generator=generator),
            regularizer_weight=self.regularizer_weight,
            knots=self.knots,
            t_max=self.t_max,
        )

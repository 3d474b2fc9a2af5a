"""W-MSE: the whitened embeddings of the views of an image agree.

Paper: https://arxiv.org/abs/2007.06346.
Reference implementation: htdt/self-supervised.
Differs from it: AdamW instead of Adam (``optimizer=torch.optim.Adam`` is possible), no weight decay on norms and
biases; the learning rate falls at shares of the run, not at 50 and 25 epochs before its end; images are whitened with
those of all ranks, and those left over by a batch that is no multiple of ``whitening_size`` are left out.
"""

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_probability
from lightning_contrast.augment import wmse_views
from lightning_contrast.losses import draw_permutations, w_mse_loss
from lightning_contrast.losses.redundancy import check_whitening
from lightning_contrast.methods.joint_embedding import JointEmbeddingModule, JointEmbeddingOptions
from lightning_contrast.nn.multi_crop import forward_each
from lightning_contrast.optim import OptimizerLike


class WMSE(JointEmbeddingModule):
    """Whiten the embeddings of each view, and pull those of an image together.

    Views as in `JointEmbeddingModule`; the loss is the mean over all pairs of views, local ones included. The paper has
    two or four views of one size. The images of all ranks are divided into sub-batches at random, equally on each rank.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        hidden_dim: Width of the projector's hidden layer.
        projection_dim: D, the width of the embedding, also of a custom ``projector``; 128 in the paper for images of 64
            pixels and more.
        whitening_size: Images of a sub-batch, more than D and at most the global batch; None is the paper's 2 D.
        whitening_iterations: Divisions into sub-batches per step, >= 1; 4 in the paper for D = 128.
        whitening_eps: Share of the identity in each covariance, in [0, 1]; above 0, sub-batches may be smaller.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        weight_decay: Weight decay of all parameters except norms and biases.
        **options: See `JointEmbeddingOptions`. ``lr=None`` is the paper's 0.003 x global batch / 512.
    """

    base_lr: ClassVar[float] = 1.5e-3
    default_warmup_epochs: ClassVar[int] = 5  # 500 steps of 512 images of CIFAR-10
    views = staticmethod(wmse_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        hidden_dim: int = 1024,
        projection_dim: int = 64,
        whitening_size: int | None = None,
        whitening_iterations: int = 1,
        whitening_eps: float = 0.0,
        optimizer: OptimizerLike = "adamw",
        weight_decay: float = 1e-6,
        **options: Unpack[JointEmbeddingOptions],
    ) -> None:
        super().__init__(
            backbone,
            head="w_mse",
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            optimizer=optimizer,
            weight_decay=weight_decay,
            **options,
        )
        check_probability("whitening_eps", whitening_eps)
        self.whitening_size = 2 * projection_dim if whitening_size is None else whitening_size
        check_whitening("whitening_size", self.whitening_size, projection_dim, whitening_eps)
        check_at_least("whitening_iterations", whitening_iterations, 1)
        self.whitening_iterations, self.whitening_eps = whitening_iterations, whitening_eps
        self.save_hyperparameters()

    def view_features(self, views: list[Tensor]) -> list[Tensor]:
        """Return the features of each view, (B, F), with a forward pass of its own as in the reference."""
        return forward_each(views, self.backbone)[0]

    def view_loss(self, projections: Tensor, views: list[Tensor], generator: torch.Generator) -> Tensor:
        """Return the W-MSE of projections (V, B, D)."""
        size = sum(distributed.batch_sizes(projections.shape[1], projections.device))
        permutations = draw_permutations(size, iterations=self.whitening_iterations, generator=generator)
        return w_mse_loss(projections, permutations, whitening_size=self.whitening_size, eps=self.whitening_eps)

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up, then times 0.2 at 95 % and again at 97.5 % of the run."""
        if step < warmup_steps:
            return super().lr_factor(step, warmup_steps, total_steps)
        return 0.2 ** sum(step >= round(share * total_steps) for share in (0.95, 0.975))

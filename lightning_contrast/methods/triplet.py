"""Triplet loss: an anchor is closer to a positive than to a negative by a margin, on the unit sphere.

Paper: https://arxiv.org/abs/1503.03832 (FaceNet).
Reference implementation: davidsandberg/facenet; its miner (random among all violations of the margin) is not available.
Differs from the paper: one triplet per image instead of all positive pairs of a class; SGD instead of Adagrad; the mean
counts triplets that satisfy the margin as 0.
"""

from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_choice, check_positive
from lightning_contrast.augment import moco_v2_views
from lightning_contrast.contracts import require_labels
from lightning_contrast.losses import triplet_loss
from lightning_contrast.losses.labels import global_classes
from lightning_contrast.losses.mining import MINERS, Miner, mine
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import build_head
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.method_options import MethodOptions


class Triplet(SelfSupervisedModule):
    """Keep the other view closer than other images by a margin.

    A batch holds two views (B, C, h, w), and labels (B,) with ``use_labels``; `forward` gives features (B, F). The
    first view is the anchor; positives and negatives are the second views of all ranks. Logs
    ``train/active_triplets``, the share that violates the margin. A loss that stays at the margin indicates a collapse,
    which "hardest" may cause early; an anchor without a negative contributes the margin, without gradient.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        projection_dim: D, the width of the embedding, one linear layer.
        projector: A module (B, F) -> (B, D) that replaces that layer.
        use_labels: Use images of the same class as positives; False: the other view of the same image.
        miner: How positives and negatives are chosen: "random", "semi-hard" as in the paper, or "hardest".
        distance: "euclidean" is the paper's squared distance of unit vectors, in [0, 4]; "cosine" is 1 - cos, in
            [0, 2], half of it.
        margin: Minimum difference of the two distances, > 0, in units of the distance.
        optimizer: "sgd", "adamw", "lars", "lamb", or a callable such as torch.optim.Adagrad, the paper's.
        lr: Peak learning rate, absolute; None is 0.05 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.05
    views = staticmethod(moco_v2_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        use_labels: bool = False,
        miner: Miner = "semi-hard",
        distance: Literal["euclidean", "cosine"] = "euclidean",
        margin: float = 0.2,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_choice("miner", miner, MINERS)
        check_choice("distance", distance, ("euclidean", "cosine"))
        check_positive("margin", margin, "The paper uses 0.2")
        self.use_labels, self.miner, self.distance, self.margin = use_labels, miner, distance, margin
        self.projector = projector or build_head("moco", self.feature_dim, out_dim=projection_dim, layers=1)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean hinge loss of one triplet per image, and features (B, F)."""
        view_a, view_b = self.batch_views(batch, count=2)
        labels = require_labels(batch, "Triplet with `use_labels`") if self.use_labels else None
        features = self.backbone(
            torch.cat([view_a, view_b])
        )  # (2B, F): one network for anchors, positives and negatives
        anchors, others = unit_rows(self.projector(features)).chunk(2)  # (B, D) each
        candidates = distributed.gather_with_gradient(others)  # (N, D), of all ranks
        classes, all_classes = global_classes(labels, len(anchors), anchors.device)
        same = classes[:, None] == all_classes  # (B, N)
        own = global_classes(None, len(anchors), anchors.device)[0]  # (B,)
        halves = 2 if self.distance == "cosine" else 1  # 1 - cos is half the squared distance
        margin = halves * self.margin
        chosen = mine(anchors, candidates, same, own, miner=self.miner, margin=margin)
        positive, negative = (candidates[index] for index in chosen)  # (B, D) each
        loss = triplet_loss(anchors, positive, negative, margin=margin) / halves
        self.log("train/loss", loss, batch_size=len(view_a))
        self.log("train/active_triplets", _active(anchors, positive, negative, margin), batch_size=len(view_a))
        return {"loss": loss, "features": features[: len(view_a)].detach()}


@torch.no_grad()
def _active(anchors: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """Return the share of triplets of unit vectors, (B, D) each, whose loss is above 0."""
    gap = 2 * (anchors.float() * (negative - positive).float()).sum(1)
    return (gap + margin > 0).float().mean()

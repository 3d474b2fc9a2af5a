"""Siamese margin loss: similar pairs attract, dissimilar ones repel up to a margin.

Paper: Hadsell, Chopra and LeCun 2006, https://doi.org/10.1109/CVPR.2006.100.
There is no public program. Differs from the paper: it lists all pairs of a small set; here each image gives one similar
and one dissimilar pair a step, chosen by a miner among the images of all ranks, so that neither kind prevails.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_choice, check_positive
from lightning_contrast.contracts import require_labels
from lightning_contrast.losses import margin_contrastive_loss
from lightning_contrast.losses.labels import global_classes
from lightning_contrast.losses.mining import MINERS, Miner, mine
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import moco_head
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows


class SiameseMargin(SelfSupervisedModule):
    """Pull two views together and push views of other images away up to a margin.

    A batch holds two views (B, C, h, w), and labels (B,) with ``use_labels``; `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        small_images: Give the backbone a stem for small images (3x3, stride 1, no max-pool).
        feature_dim: F, where a module does not say it itself (``num_features``).
        backbone_kwargs: Further arguments of `timm.create_model`.
        projection_dim: D, the width of the embedding, one linear layer.
        projector: A module (B, F) -> (B, D) in the place of that layer.
        use_labels: Similar are images of one class; False: only the two views of an image.
        miner: How the pairs are chosen: "random", "semi-hard" (the nearest dissimilar image that is farther than the
            similar one), or "hardest" (farthest similar, nearest dissimilar image).
        distance: "euclidean" as in the paper, of the embeddings as they are; "cosine" brings them to unit length
            first, so that the distance is sqrt(2 - 2 cos), in [0, 2].
        margin: Distance up to which dissimilar pairs repel, > 0.
        optimizer: "sgd", "adamw", "lars", "lamb", or a callable.
        lr: Learning rate after the warm-up, absolute; None is 0.03 x global batch / 256; the paper gives none.
        weight_decay: Of all parameters but norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
    """

    base_lr: ClassVar[float] = 0.03

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        small_images: bool = False,
        feature_dim: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        projection_dim: int = 128,
        projector: nn.Module | None = None,
        use_labels: bool = False,
        miner: Miner = "random",
        distance: Literal["euclidean", "cosine"] = "euclidean",
        margin: float = 1.0,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(
            backbone,
            small_images=small_images,
            feature_dim=feature_dim,
            backbone_kwargs=backbone_kwargs,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
        )
        check_choice("miner", miner, MINERS)
        check_choice("distance", distance, ("euclidean", "cosine"))
        check_positive("margin", margin, "1 is usual for unit vectors")
        self.use_labels, self.miner, self.distance, self.margin = use_labels, miner, distance, margin
        self.projector = projector or moco_head(self.feature_dim, None, projection_dim, layers=1)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean loss of one similar and one dissimilar pair an image."""
        view_a, view_b = self.views(batch, count=2)
        labels = require_labels(batch, "SiameseMargin with `use_labels`") if self.use_labels else None
        features = self.backbone(torch.cat([view_a, view_b]))  # (2B, F): both branches are one network
        embedding = self.projector(features)  # (2B, D)
        if self.distance == "cosine":
            embedding = unit_rows(embedding)
        anchors, others = embedding.chunk(2)  # (B, D) each
        candidates = distributed.gather_with_gradient(others)  # (N, D): of all ranks
        classes, all_classes = global_classes(labels, len(anchors), anchors.device)
        same = classes[:, None] == all_classes  # (B, N)
        own = global_classes(None, len(anchors), anchors.device)[0]  # (B,)
        positive, negative = mine(anchors, candidates, same, own, miner=self.miner)  # (B,) each
        is_same = torch.cat([same.gather(1, chosen[:, None]) for chosen in (positive, negative)]).squeeze(1)  # (2B,)
        partners = candidates[torch.cat([positive, negative])]  # (2B, D)
        loss = margin_contrastive_loss(anchors.repeat(2, 1), partners, is_same, margin=self.margin)
        self.log("train/loss", loss, batch_size=len(view_a))
        return {"loss": loss, "features": features[: len(view_a)].detach()}

"""Siamese margin loss: pull similar pairs together and push dissimilar pairs apart up to a margin.

Paper: Hadsell, Chopra and LeCun 2006, https://doi.org/10.1109/CVPR.2006.100.
There is no public implementation. Differs from the paper, which uses all pairs of a small dataset: each image gives one
similar and one dissimilar pair per step, chosen by a miner from the images of all ranks, so both kinds are balanced.
"""

from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_choice, check_positive
from lightning_contrast.augment import moco_v2_views
from lightning_contrast.contracts import require_labels
from lightning_contrast.losses import margin_contrastive_loss
from lightning_contrast.losses.labels import global_classes
from lightning_contrast.losses.mining import MINERS, Miner, mine
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import build_head
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.method_options import MethodOptions


class SiameseMargin(SelfSupervisedModule):
    """Contrast a similar and a dissimilar pair per image with a margin loss.

    A batch holds two views (B, C, h, w), and labels (B,) with ``use_labels``; `forward` gives features (B, F).

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        projection_dim: D, the width of the embedding, one linear layer.
        projector: A module (B, F) -> (B, D) that replaces that layer.
        use_labels: Images of one class are similar; False: only the two views of an image.
        miner: How pairs are chosen: "random", "semi-hard" (the nearest dissimilar image that is farther than the
            similar one), or "hardest" (farthest similar, nearest dissimilar image).
        distance: "euclidean" as in the paper, without normalization; "cosine" normalizes embeddings first, so the
            distance is sqrt(2 - 2 cos), in [0, 2].
        margin: Distance up to which dissimilar pairs are pushed apart, > 0.
        optimizer: "sgd", "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is 0.03 x global batch / 256; the paper gives none.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.03
    views = staticmethod(moco_v2_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
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
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_choice("miner", miner, MINERS)
        check_choice("distance", distance, ("euclidean", "cosine"))
        check_positive("margin", margin, "1 is usual for unit vectors")
        self.use_labels, self.miner, self.distance, self.margin = use_labels, miner, distance, margin
        self.projector = projector or build_head("moco", self.feature_dim, out_dim=projection_dim, layers=1)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean loss of one similar and one dissimilar pair per image, and features (B, F)."""
        view_a, view_b = self.batch_views(batch, count=2)
        labels = require_labels(batch, "SiameseMargin with `use_labels`") if self.use_labels else None
        features = self.backbone(torch.cat([view_a, view_b]))  # (2B, F): both branches share one network
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

"""What a learned representation is compared with: features that nobody trained, and two other ways to train."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

import lightning_contrast as lc
from lightning_contrast import evaluation

RAW = ("raw pixels", "HOG", "PCA")


def raw_features(name: str, data: lc.data.EmojiDataModule) -> list[Tensor]:
    """Return the features of the training images and of the judged images by either artist, without any network.

    Args:
        name: One of `RAW`.
        data: Where the images come from.
    """
    train, test = data.images("train"), torch.cat(data.artists("val"))
    if name == "raw pixels":
        train, test = evaluation.pixel_features(train, test)
    elif name == "HOG":
        train, test = _gradient_histograms(train), _gradient_histograms(test)
    else:
        train, test = _principal_components(train, test)
    return [train, *test.chunk(2)]


def _gradient_histograms(images: Tensor) -> Tensor:
    """Return histograms of oriented gradients in cells of 8 pixels, blocks of 2 x 2 cells, 9 directions."""
    from skimage.feature import hog

    options: dict[str, Any] = {"pixels_per_cell": (8, 8), "cells_per_block": (2, 2), "channel_axis": -1}
    rows = [hog(image, **options) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(rows)).float()


def _principal_components(train: Tensor, test: Tensor, count: int = 64) -> tuple[Tensor, Tensor]:
    """Return the first principal components of the pixels, fitted on the training images."""
    from sklearn.decomposition import PCA

    model = PCA(count, random_state=0).fit(train.flatten(1).numpy())
    of_train, of_test = (model.transform(images.flatten(1).numpy()) for images in (train, test))
    return torch.from_numpy(of_train).float(), torch.from_numpy(of_test).float()


class Classifier(L.LightningModule):
    """The same backbone trained to name a class: the labels, or by which quarter turn an image was rotated.

    Args:
        backbone: Name of the backbone.
        task: "supervised" or "rotation".
        num_classes: Classes of the labels.
        lr: Peak learning rate of AdamW, with a cosine to 0.
        backbone_kwargs: Further arguments of the backbone.
    """

    def __init__(
        self,
        backbone: str,
        *,
        task: str,
        num_classes: int,
        lr: float = 2e-3,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, width = lc.nn.build_backbone(backbone, backbone_kwargs=backbone_kwargs)
        self.task, self.lr = task, lr
        self.classifier = nn.Linear(width, 4 if task == "rotation" else num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, C, H, W)."""
        return self.backbone(images)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy of the first view: one augmented image, as often seen as in the methods."""
        views, labels = lc.contracts.split_batch(batch)
        images = views[0]
        if self.task == "rotation":
            labels = torch.arange(len(images), device=images.device) % 4
            turned = [torch.rot90(images[turn::4], turn, (2, 3)) for turn in range(4)]
            images, labels = torch.cat(turned), torch.cat([labels[turn::4] for turn in range(4)])
        return nn.functional.cross_entropy(self.classifier(self(images)), labels)

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine to 0 over the run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

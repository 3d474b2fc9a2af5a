"""Small modules with a projector and two views, for the monitors."""

import copy

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast.losses import info_nce, nt_xent
from lightning_contrast.nn import FeatureQueue
from tests.callbacks.probe_modules import CLASSES


def view_pairs(count=64, width=8, seed=0, labels=True):
    """Return a dataset of (two views of an image of width x width pixels, label)."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (count,), generator=generator)
    images = torch.rand(count, 3, width, width, generator=generator) + 0.5 * classes.view(-1, 1, 1, 1)
    views = [images + 0.1 * torch.randn(images.shape, generator=generator) for _ in range(2)]
    return TensorDataset(*views, classes) if labels else TensorDataset(*views)


def collate(rows):
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return columns[:2] if len(columns) == 2 else (columns[:2], columns[2])


def views_loader(count=64, batch=16, **kwargs):
    return DataLoader(view_pairs(count, **kwargs), batch_size=batch, collate_fn=collate)


class TwoViews(L.LightningModule):
    """NT-Xent with a projector that is called once for both views or once for each."""

    def __init__(self, lr=0.005, temperature=0.5, joined=True):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Dropout(0.1))
        self.projector = nn.Sequential(nn.Linear(24, 12))
        self.temperature, self.joined, self.lr = temperature, joined, lr

    def embed(self, views):
        if self.joined:
            features = self.backbone(torch.cat(views))
            return features.chunk(2)[0], self.projector(features).chunk(2)
        features = [self.backbone(view) for view in views]
        return features[0], [self.projector(each) for each in features]

    def training_step(self, batch, batch_idx):
        views = batch[0] if isinstance(batch[0], list) else batch
        features, (a, b) = self.embed(views)
        self.last = a.detach().clone(), b.detach().clone()
        return {"loss": nt_xent(a, b, temperature=self.temperature), "features": features.detach()}

    def validation_step(self, batch, batch_idx):
        self.backbone(batch[0][0] if isinstance(batch[0], list) else batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Queued(TwoViews):
    """InfoNCE against a queue, with a momentum network for the keys."""

    def __init__(self, rows=40):
        super().__init__()
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.queue = FeatureQueue(rows, 12)

    def training_step(self, batch, batch_idx):
        view_q, view_k = batch[0]
        features = self.backbone(view_q)
        query, key = self.projector(features), self.momentum_projector(self.momentum_backbone(view_k))
        self.last = query.detach().clone(), key.clone(), self.queue.features.clone(), self.queue.mask.clone()
        loss = info_nce(query, key, self.queue.features, temperature=0.5, negatives_mask=self.queue.mask)
        return {"loss": loss, "features": features.detach(), "keys": F.normalize(key, dim=1)}

    def momentum_pairs(self):
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def queues(self):
        return {"keys": self.queue}

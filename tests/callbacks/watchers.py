"""The table of the callbacks that only look on, and a run that each of them can look on at."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast.augment import simclr_cifar_views
from lightning_contrast.callbacks import (
    CollapseMonitor,
    EmbeddingLogger,
    InstanceDiscriminationMonitor,
    InvarianceMonitor,
    OnlineKNN,
    OnlineLinearProbe,
    TrainingCostMonitor,
    ViewAugmentation,
    ViewLogger,
)
from lightning_contrast.data import InMemoryDataModule
from lightning_contrast.losses import info_nce, nt_xent
from lightning_contrast.nn import FeatureQueue
from lightning_contrast.seeding import isolated
from lightning_contrast.testing._trace import Trace
from tests.callbacks.probe_modules import CLASSES, convnet, images_and_labels, labelled, quiet_fit
from tests.callbacks.strategies import sharded


class Watcher(NamedTuple):
    """How a test makes a callback, and what shows that it has looked on."""

    make: Callable[[str, str], L.Callback]
    """Gets the names of the layer of the features and of the layer of the two views' embeddings."""
    shows: str
    """A key of ``callback_metrics``, or a pattern of files below ``default_root_dir``."""
    tensor_bytes: int = 0
    """What its state holds in tensors at most, by its documentation, for the layers of `TwoViews`."""


def probe(layer: str, pair: str) -> L.Callback:
    return OnlineLinearProbe(CLASSES, features=layer)


def several_layers(layer: str, pair: str) -> L.Callback:
    data = labelled(20, seed=9, shuffle=True)
    return OnlineLinearProbe(CLASSES, features=[layer, pair], dataloader=data, every_n_steps=2, name="several", lr=0.01)


def other_bank(layer: str, pair: str) -> L.Callback:
    return OnlineKNN(CLASSES, features=layer, k=5, dataloader=labelled(20, seed=9, shuffle=True), name="other")


def at_validation(layer: str, pair: str) -> L.Callback:
    return CollapseMonitor(layer, projections=None, every_n_steps=None, name="at_validation")


def probe_bytes(width: int) -> int:
    return 4 * (3 * CLASSES * (width + 1) + 4 * width)


def collapse_bytes(features: int, projections: int) -> int:
    return 4 * (1024 * (features + 4 * projections) + 2 * (features + projections))


F, D = 6, 8  # widths of `TwoViews`
WATCHERS = {
    "OnlineLinearProbe": Watcher(probe, "linear_probe/train_top1", probe_bytes(F)),
    "OnlineLinearProbe, labelled loader": Watcher(
        several_layers, "several/train_top1", probe_bytes(F) + probe_bytes(D)
    ),
    "OnlineKNN, train": Watcher(
        lambda layer, pair: OnlineKNN(CLASSES, features=layer, k=[1, 5], bank="train"), "knn/top1"
    ),
    "OnlineKNN": Watcher(lambda layer, pair: OnlineKNN(CLASSES, features=layer, k=5, name="fresh"), "fresh/top1"),
    "OnlineKNN, labelled loader": Watcher(other_bank, "other/top1"),
    "CollapseMonitor": Watcher(
        lambda layer, pair: CollapseMonitor(layer, projections=pair, every_n_steps=4),
        "collapse/rankme",
        collapse_bytes(F, D),
    ),
    "CollapseMonitor, at validation": Watcher(at_validation, "at_validation/rankme", collapse_bytes(F, 0)),
    "InstanceDiscriminationMonitor": Watcher(
        lambda layer, pair: InstanceDiscriminationMonitor(pair, every_n_steps=2), "contrast/positive_cosine"
    ),
    "ViewLogger": Watcher(lambda layer, pair: ViewLogger(4), "pictures/views_*.png"),
    "EmbeddingLogger": Watcher(
        lambda layer, pair: EmbeddingLogger(layer, samples=16, queries=2),
        "pictures/embeddings_*.png",
        8 * 2 * (5 * 8 + 1),
    ),
    "InvarianceMonitor": Watcher(
        lambda layer, pair: InvarianceMonitor(layer, samples=8, changes=["hue", "crop"], every_n_epochs=1),
        "invariance/crop",
    ),
    "TrainingCostMonitor": Watcher(lambda layer, pair: TrainingCostMonitor(every_n_steps=4), "throughput/step_ms"),
}


def watchers(*names: str, layer: str = "backbone", pair: str = "projector") -> list[L.Callback]:
    """Return the callbacks of these names, of all where none is given, and one that fails where one saw nothing."""
    rows = [WATCHERS[name] for name in names or WATCHERS]
    return [*(row.make(layer, pair) for row in rows), Shows(*(row.shows for row in rows))]


class Shows(L.Callback):
    """Fails at the end of a fit where what a callback should have shown is not there: it may have done nothing."""

    def __init__(self, *what: str) -> None:
        self.what = what

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        files = Path(trainer.default_root_dir)
        missing = [
            what
            for what in self.what
            if not (any(files.glob(what)) if "*" in what else what in trainer.callback_metrics)
        ]
        assert not missing or not trainer.is_global_zero, f"{missing}, there is {sorted(trainer.callback_metrics)}"
        own = {key: float(value) for key, value in trainer.callback_metrics.items() if key != "loss"}  # of one rank
        everyone = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(everyone, own)
        assert [repr(each) for each in everyone] == [repr(own)] * trainer.world_size


def two_views(base: Any = L.LightningModule) -> Any:
    """Return NT-Xent of two views, with BatchNorm and dropout, which notice another mode and other random numbers."""

    class TwoViews(base):
        def __init__(self, lr: float = 0.05) -> None:
            super().__init__()
            self.backbone = nn.Sequential(convnet(), nn.Dropout(0.1))
            self.projector = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
            self.temperature, self.lr = 0.5, lr

        def forward(self, images):
            return self.backbone(images)

        def training_step(self, batch, batch_idx):
            views, _ = batch
            features = self(torch.cat(views))
            a, b = self.projector(features).chunk(2)
            loss = nt_xent(a, b, temperature=self.temperature)
            self.log("loss", loss.detach())
            return {"loss": loss, "features": features[: len(a)].detach()}

        def validation_step(self, batch, batch_idx):
            return {"features": self(batch[0])}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    return TwoViews


TwoViews = two_views()


class ByHand(TwoViews):
    """Manual optimization, two steps of the optimizer for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            outputs = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(outputs["loss"])
            self.optimizers().step()
        return {"features": outputs["features"]}


class Queued(TwoViews):
    """InfoNCE against a queue of keys of a momentum network."""

    def __init__(self) -> None:
        super().__init__()
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.queue = FeatureQueue(40, D)

    def training_step(self, batch, batch_idx):
        (view_q, view_k), _ = batch
        features = self(view_q)
        query, key = self.projector(features), self.momentum_projector(self.momentum_backbone(view_k))
        loss = info_nce(query, key, self.queue.features, temperature=0.5, negatives_mask=self.queue.mask)
        return {"loss": loss, "features": features.detach(), "keys": nn.functional.normalize(key, dim=1)}

    def momentum_pairs(self):
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def queues(self):
        return {"keys": self.queue}


ShardedViews = sharded(TwoViews)


def data(shuffle: bool = True) -> tuple[Any, Any]:
    """Return loaders of uint8 images with labels, 6 batches of 8 for training and 3 for validation."""
    train, test = TensorDataset(*images_and_labels(48)), TensorDataset(*images_and_labels(24, seed=5))
    return DataLoader(train, batch_size=8, shuffle=shuffle), DataLoader(test, batch_size=8)


class Images(InMemoryDataModule):
    """The same images, in an order that a resumed run finds again."""

    def read(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return images_and_labels(48) if split == "train" else images_and_labels(24, seed=5)


def views() -> list[L.Callback]:
    """Return what makes the views, out of random numbers of the global generators."""
    return [ViewAugmentation(simclr_cifar_views(8))]


def moments(
    callbacks: list[L.Callback], make: Any, make_data: Any, folder: Path, library: Any = L, *, fits: int = 1
) -> list[Any]:
    """Return what is to be seen of a run with these callbacks in a Trainer of `lightning` or `pytorch_lightning`.

    The second fit goes on with the Trainer, the third has the same module and callbacks in another one.
    """
    trace = Trace(with_random=True)
    settings = {"default_root_dir": folder, "enable_checkpointing": library is L}  # a `Trace` writes no checkpoint
    callbacks = [*callbacks, trace]
    with isolated(0):
        module = make()
        trainer = quiet_fit(module, callbacks, *make_data(), trainer=library.Trainer, **settings)
        if fits > 1:
            trainer.fit_loop.max_epochs = 3
            quiet_fit(module, [], *make_data(), trainer=trainer)
        if fits > 2:
            quiet_fit(module, callbacks, *make_data(), trainer=library.Trainer, **settings, max_epochs=1)
    assert not any(layer._forward_hooks for layer in module.modules())
    return trace.moments

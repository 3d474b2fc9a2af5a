"""Small modules and trainers for the callbacks that act on optimizer steps."""

import copy
import warnings

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Pair(L.LightningModule):
    """Two linear layers that learn, and their momentum copies; records what the callbacks do."""

    def __init__(self, lr=0.1, norm=False, hidden=4):
        super().__init__()
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(hidden) if norm else nn.Tanh()
        self.online = nn.Sequential(nn.Linear(6, hidden), middle, nn.Linear(hidden, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.lr = lr
        self.moments = []

    def momentum_pairs(self):
        return [(self.online, self.target)]

    def loss(self, batch):
        (x,) = batch
        with torch.no_grad():
            goal = self.target(x)
        return (self.online(x) - goal - 1).square().mean()

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch)}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.moments.append(float(self.trainer.callback_metrics.get("train/momentum", float("nan"))))

    def configure_optimizers(self):
        return torch.optim.SGD(self.online.parameters(), lr=self.lr, momentum=0.9)


def loader(batches=8, rows=4, dim=6):
    data = torch.randn(batches * rows, dim, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data), batch_size=rows)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(module, callbacks, data=None, *, ckpt_path=None, trainer=None, **kwargs):
    """Fit and return the trainer; Lightning's advice on workers and the like is of no interest here."""
    trainer = trainer or L.Trainer(callbacks=callbacks, **({"max_epochs": 1} | QUIET | kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data if data is not None else loader(), ckpt_path=ckpt_path)
    return trainer


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Follow(L.Callback):
    """Repeats the average in plain Python at each batch end where the weights changed: the oracle of the update."""

    def __init__(self, momentum_of):
        self.momentum_of, self.count = momentum_of, 0

    def on_train_start(self, trainer, pl_module):
        self.weights = [p.detach().double().clone() for p in pl_module.online.parameters()]
        self.average = [p.detach().double().clone() for p in pl_module.target.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = [p.detach().double().clone() for p in pl_module.online.parameters()]
        if any(not torch.equal(a, b) for a, b in zip(now, self.weights, strict=True)):
            m = self.momentum_of(self.count)
            self.average = [m * a + (1 - m) * w for a, w in zip(self.average, now, strict=True)]
            self.count += 1
        self.weights = now

"""A linear classifier that is trained beside a run, on features that it does not change."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_contrast._checks import check_positive, require
from lightning_contrast.callbacks._probe_base import Labels, OnlineProbe, Step
from lightning_contrast.callbacks._probe_head import LinearHead, default_lr, to_cpu
from lightning_contrast.callbacks._probe_share import Share
from lightning_contrast.distributed import world_size

SGD_MOMENTUM = 0.9


class OnlineLinearProbe(OnlineProbe):
    """Trains a linear classifier on detached features beside the run, and logs its accuracy.

    It works on any LightningModule, under `lightning` and `pytorch_lightning`, with automatic or manual optimization,
    and leaves the run as it was, bit for bit: it has its own optimizer, all-reduces its own gradients, draws no random
    number, and adds nothing to the module, its loss or its state_dict.

    Logged: ``<name>/top1`` at validation (``<name>/test_top1`` at test), ``<name>/train_top1`` and
    ``<name>/train_loss`` at each epoch's end; with several validation loaders ``<name>/top1`` is the first one's and
    ``<name>/top1/dataloader_idx_<i>`` each one's. All reach ``trainer.callback_metrics``, with or without a logger.
    A checkpoint keeps the classifier, its statistics and its optimizer. A second `fit` goes on with them.

    Features are standardised by running statistics and the classifier is trained by SGD with momentum. An online
    accuracy is close to that of a linear evaluation afterwards but not equal to it: the features move while it learns,
    and it sees augmented images. Images with the label -1 are left out.

    Args:
        num_classes: Number of classes.
        features: Name of the submodule whose output is classified. "backbone" (the default) is the step output
            ``"features"`` where a step returns one, else the submodule of that name.
        labels: None: where the batch contract has them; a str: key of a dict batch; an int: index into a tuple or
            list; a callable: gets the whole batch.
        lr: Learning rate on the standardised features, absolute. None: min(sqrt(B), 16) / F for a global batch B, at
            most 0.1. The sum of the variances of F standardised features is F, which bounds the curvature of the loss;
            on four kinds of frozen features with F from 6 to 2048 and B of 32 and 256 it was the best, or close to
            it, of fixed rates, other multiples of 1 / F, and Adam.
        name: First part of the names that are logged; must differ between probes.
        tokens: A token sequence (B, N, D) becomes its "mean" or its first token, "cls".
    """

    def __init__(
        self,
        num_classes: int,
        *,
        features: str = "backbone",
        labels: Labels = None,
        lr: float | None = None,
        name: str = "linear_probe",
        tokens: str = "mean",
    ) -> None:
        super().__init__(num_classes, features=features, labels=labels, name=name, tokens=tokens)
        if lr is not None:
            check_positive("lr", lr)
        self.lr = lr
        self.head: LinearHead | None = None
        self._optimizer: torch.optim.SGD | None = None
        self._pending: dict[str, Any] | None = None
        self._train_top1: Share | None = None
        self._train_loss: MeanMetric | None = None

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"OnlineLinearProbe[{self.name}]"

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count anew."""
        self._train_top1 = Share().to(pl_module.device)
        self._train_loss = MeanMetric(nan_strategy="disable").to(pl_module.device)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the accuracy and the loss of the training images, each before the step that learned from it."""
        for key, metric in (("train_top1", self._train_top1), ("train_loss", self._train_loss)):
            if metric is not None and metric.update_called:
                pl_module.log(f"{self.name}/{key}", metric.compute(), sync_dist=True)

    def learn(self, step: Step) -> None:
        """Do one step of SGD."""
        head, optimizer = self._built(step.features)
        logits, loss = head.gradient(step.features, step.labels, step.valid, step.finite)
        optimizer.step()
        if self._train_top1 is not None and self._train_loss is not None:
            self._train_top1.update(logits.argmax(dim=1) == step.labels, step.valid)
            self._train_loss.update(loss)

    def predict(self, features: Tensor) -> Tensor | None:
        """Return the predicted classes (B,) of features (B, F), or None before the first step."""
        if self.head is None and self._pending is None:
            return None
        head, _ = self._built(features)
        logits: Tensor = head(features)
        return logits.argmax(dim=1)

    def state_dict(self) -> dict[str, Any]:
        """Return the classifier, its statistics and its optimizer, on the CPU."""
        if self.head is None or self._optimizer is None:
            return self._pending or {}
        state = {
            "head": self.head.state_dict(),
            "batches": self.head.batches,
            "optimizer": self._optimizer.state_dict(),
        }
        return to_cpu(state)  # sharded checkpoints are loaded without a map_location

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the classifier is built: where and how wide the features are is not known yet."""
        if state_dict:
            self._pending, self.head, self._optimizer = state_dict, None, None

    def _built(self, features: Tensor) -> tuple[LinearHead, torch.optim.SGD]:
        """Return the classifier and its optimizer, built at their first use."""
        width, device = features.shape[1], features.device
        if self.head is None or self._optimizer is None or self.head.width != width:
            lr = default_lr(len(features) * world_size(), width) if self.lr is None else self.lr
            with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could never learn
                self.head = LinearHead(width, self.num_classes, device)
                self._optimizer = torch.optim.SGD(self.head.parameters(), lr=lr, momentum=SGD_MOMENTUM)
                if self._pending is not None:
                    self._restore(self.head, self._optimizer, self._pending)
                    self._pending = None
        return self.head, self._optimizer

    def _restore(self, head: LinearHead, optimizer: torch.optim.SGD, state: dict[str, Any]) -> None:
        saved, own = tuple(state["head"]["weight"].shape), tuple(head.weight.shape)
        mend = "Give the probe the `features` and `num_classes` that it had, or another `name` to begin anew"
        require(saved == own, self.name, f"have a classifier of shape {saved}, as the checkpoint has", own, mend)
        head.load_state_dict(state["head"])
        head.batches = state["batches"]
        optimizer.load_state_dict(state["optimizer"])

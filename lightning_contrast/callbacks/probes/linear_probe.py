"""Online linear probe: a linear model on detached features, fitted at validation and trained during the run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_positive, fail, require
from lightning_contrast.callbacks.capture.dataloaders import LabeledStream
from lightning_contrast.callbacks.capture.forward_pass import encode, extra_pass
from lightning_contrast.callbacks.capture.labels import Labels, Source, UnreadableBatchError
from lightning_contrast.callbacks.capture.sampling import SEED
from lightning_contrast.callbacks.probes.bank import MAX_BANK, BatchSource, Step
from lightning_contrast.callbacks.probes.base import OnlineProbe
from lightning_contrast.callbacks.probes.head_trainer import HeadTrainer, MakeOptimizer, MakeSchedule
from lightning_contrast.callbacks.probes.linear_head import LinearHead
from lightning_contrast.callbacks.probes.metrics import Scores
from lightning_contrast.callbacks.probes.tasks import ClassWeights, TaskName, TaskScores, build_task
from lightning_contrast.seeding import derived_seed, isolated


class OnlineLinearProbe(OnlineProbe):
    """Log the accuracy of a linear model on detached features, fitted at validation and trained during the run.

    It needs no module of this package, works under `lightning` and `pytorch_lightning`, with automatic or manual
    optimization, and does not change the run, bit for bit: it has its own optimizer, all-reduces its own gradients,
    computes in float32, draws no random numbers, and adds nothing to the module, its loss or its state_dict.

    Validation values belong to one of two models:

    - ``bank="fresh"``: a model that is fitted to a bank at the first validation batch: the images that the run's
      training loader draws, or those of ``dataloader``, encoded in eval mode, without augmentation if the Trainer has a
      `ViewAugmentation`, with the weights that validation uses. The fit is L2-regularized logistic regression on
      standardized features, from zero (100 iterations of L-BFGS). The accuracy is close to that of
      `evaluation.linear_top1` on the same weights: within 0.005 on the emoji, see ``docs/numbers.md``. It costs one
      forward pass per image of the bank, which probes of the same layers share, and 12 F C multiplications per image
      and iteration. Without a bank the last fitted model is used, that of a checkpoint for example.
    - ``bank="train"``: the model that is trained in the steps, without a forward pass. It reads lower and may rank
      epochs differently: it has learned from augmented images, features normalized by the statistics of a batch, and
      weights that have changed since.

    Logged at validation (at test with ``test_`` before the last word):

    - classes: ``<name>/top1``, ``<name>/top5`` for five classes or more, ``<name>/calibration_error`` (15 bins);
    - multilabel: ``<name>/map`` and ``<name>/f1``, averaged over the labels;
    - regression: ``<name>/r2`` and ``<name>/mae``;
    - ``<name>/loss``: the mean cross-entropy without class weights, or the mean squared error;

    and at the end of each epoch, of the model that is trained in the steps, each image before the step that used it:
    ``<name>/train_loss``, a mean over the images with a label, and, for classes, ``<name>/train_top1``. Modules whose
    steps encode parts of images (``encodes_whole_images = False``: I-JEPA, iBOT, DINOv2, MSN), and layers that the
    steps do not call, have no training values. Several layers are logged as ``<name>/<layer>/top1`` each, and the first
    also as ``<name>/top1``. Of several validation loaders the first with labels is logged as ``<name>/top1`` and each
    as ``<name>/top1/dataloader_idx_<i>``. All values are in ``trainer.callback_metrics``, with or without a logger,
    before `ModelCheckpoint` and `EarlyStopping` read them. A checkpoint keeps both models, their statistics, the
    optimizer and the position in ``dataloader``. A second `fit` continues to train the model.

    In the steps, features are standardized by running statistics and the model is trained by SGD with momentum
    (Nesterov for regression).

    Args:
        num_classes: Number of classes, labels or numbers C.
        features: One or several names of submodules whose output is classified. "backbone" (the default) is the step
            output ``"features"`` if the step returns one, else the submodule of that name. Of the layers that
            validation does not call, ``projector``, ``predictor``, ``momentum_backbone`` and ``momentum_projector`` are
            reached from the images, each through the modules before it; any other is refused.
        labels: None follows the batch contract; a str is the key of a dict batch, an int the index into a tuple or
            list; a callable is applied to the whole batch. Also for batches of ``dataloader`` and of validation.
        lr: Learning rate in the steps, on the standardized features, absolute, > 0. None: min(sqrt(B), 16) / F for a
            global batch B, at most 0.1, and for regression at most 1 / F. The variances of F standardized features sum
            to F, which bounds the curvature of the loss. On four kinds of frozen features with F from 6 to 2048 and B
            of 32 and 256 this was the best, or close to the best, of fixed rates, other multiples of 1 / F, and Adam.
        dataloader: A loader of labeled batches, or a LightningDataModule whose training loader is used; the run itself
            may then be unlabeled. Features come from an additional forward pass of the module in eval mode, without
            gradient, on unaugmented images if the Trainer has a `ViewAugmentation`. On several ranks an ordinary
            DataLoader is divided among them; one with its own sampler, or any other iterable, is read by each rank. A
            resumed run continues with the next batch: immediately for a loader with ``state_dict`` and
            ``load_state_dict`` (rank 0's is saved), after reading up to it for any other.
        name: Prefix of the log keys; must differ between probes.
        tokens: Pooling of token sequences (B, N, D): "mean", or "cls" for the first token.
        task: "classes": integer labels (B,), -1 for none. "multilabel": labels (B, C) of 0 and 1, -1 if unknown.
            "regression": numbers (B, C) or (B,), NaN if unknown; they are standardized too.
        class_weights: For classes: weights (C,) of the loss, or "balanced": inverse to the class frequency so far.
        optimizer: Creates the optimizer from the parameters, instead of SGD.
        schedule: Creates a learning rate schedule from the optimizer, stepped once per step of the probe.
        every_n_steps: Training batches of the run per batch of ``dataloader``, >= 1.
        images: Where the images of a batch are, in the same way as ``labels``; read by the forward passes of the probe.
        bank: "fresh" or "train".
        max_bank: Maximum number of images of the bank over all ranks, >= 1; a larger set is sampled with a fixed seed.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or two arguments exclude each other.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        features: str | Sequence[str] = "backbone",
        labels: Labels = None,
        lr: float | None = None,
        dataloader: Any = None,
        name: str = "linear_probe",
        tokens: str = "mean",
        task: TaskName = "classes",
        class_weights: ClassWeights = None,
        optimizer: MakeOptimizer | None = None,
        schedule: MakeSchedule | None = None,
        every_n_steps: int = 1,
        images: Source = None,
        bank: str = "fresh",
        max_bank: int = MAX_BANK,
    ) -> None:
        self.task = build_task(task, num_classes, class_weights)
        super().__init__(
            self.task,
            features=features,
            labels=labels,
            images=images,
            name=name,
            tokens=tokens,
            bank=bank,
            max_bank=max_bank,
            dataloader=dataloader,
        )
        if lr is not None:
            check_positive("lr", lr)
            hint = "Set the learning rate of the optimizer"
            require(optimizer is None, "lr", "be None if there is an `optimizer`", lr, hint)
        for key, value in (("optimizer", optimizer), ("schedule", schedule)):
            if value is not None and not callable(value):
                hint = "Give for example `lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)`"
                fail(key, "be callable", type(value).__name__, hint, TypeError)
        check_at_least("every_n_steps", every_n_steps, 1)
        fits = dataloader is not None or every_n_steps == 1
        require(fits, "every_n_steps", "be 1 without `dataloader`", every_n_steps, "Leave it out")
        self.lr, self.every_n_steps = lr, every_n_steps
        self._stream = None if dataloader is None else LabeledStream(dataloader)
        self._batches = 0
        self._trainers = {
            layer: HeadTrainer(f"{name}/{layer}", self.task, lr=lr, optimizer=optimizer, schedule=schedule)
            for layer in self.layers
        }

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"OnlineLinearProbe[{self.name}]"

    @property
    def head(self) -> LinearHead | None:
        """The model of the first layer, None before its first step."""
        return self._trainers[self.layers[0]].head

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the first layer's model, None before its first step."""
        return self._trainers[self.layers[0]].optimizer

    @property
    def heads(self) -> dict[str, LinearHead | None]:
        """The models of all layers by name, None before their first step."""
        return {layer: trainer.head for layer, trainer in self._trainers.items()}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers and set up the labeled loader."""
        super().on_fit_start(trainer, pl_module)
        if self._stream is not None:
            self._stream.start(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the training metrics."""
        for head_trainer in self._trainers.values():
            head_trainer.begin_epoch(pl_module.device)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and arm the hooks, unless there is a labeled loader."""
        if self._stream is None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Learn from the step or from the next labeled batch, outside autocast and after the optimizer step."""
        if self._stream is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        self._batches += 1
        if self._batches % self.every_n_steps == 0:
            self._learn_from(trainer, pl_module, self._stream)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log accuracy and loss of the training images, each measured before the step that used the image."""
        for layer, head_trainer in self._trainers.items():
            for key, value in head_trainer.epoch_values().items():
                for log_key in self._log_keys(layer, key):
                    pl_module.log(log_key, value, sync_dist=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Shut down the labeled loader's workers."""
        if self._stream is not None:
            self._stream.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks and shut down the workers: `on_fit_end` is not called after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self.on_fit_end(trainer, pl_module)

    def learn(self, step: Step) -> None:
        """Make one optimizer step for the layer of the step."""
        self._trainer_of(step.layer).learn(step)

    def judge_with(self, trainer: Any, pl_module: Any) -> None:
        """Encode the bank and fit the model of each layer to it; without a bank, the last models are used."""
        if not self.encodes:
            return
        self._encode_bank(trainer, pl_module)
        for layer, bank in self._banks.items():
            if bank is not None:
                self._trainer_of(layer).fit(*bank)

    def predict(self, features: Tensor, layer: str = "") -> Tensor | None:
        """Return the logits or numbers ``(B, C)`` for features ``(B, F)`` of a layer, or None before a step."""
        return self._trainer_of(layer).predict(features, fitted=self.encodes)

    def new_scores(self, device: torch.device) -> Scores:
        """Return new metrics of the task, and the validation loss."""
        return TaskScores(self.task, device)

    def state_dict(self) -> dict[str, Any]:
        """Return models, statistics and optimizers, on the CPU, and the position in the labeled loader."""
        states = {layer: trainer.state_dict() for layer, trainer in self._trainers.items()}
        state = states[self.layers[0]] if len(self.layers) == 1 else {"layers": states}
        if self._stream is not None and self._batches:
            state = {**state, "data": self._stream.state_dict(), "seen": self._batches}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state until the first features determine the device and the width of the models.

        Raises:
            ValueError: If the checkpoint has other layers.
        """
        own = {key: value for key, value in state_dict.items() if key not in ("data", "seen")}
        states = own.get("layers", {self.layers[0]: own})
        hint = "Use the `features` of the checkpoint, or another `name` to start from zero"
        known = states.keys() == self._trainers.keys()
        require(known, self.name, "have the layers that the checkpoint has", (self.layers, tuple(states)), hint)
        for layer, state in states.items():
            self._trainers[layer].load_state_dict(state)
        if self._stream is not None and "data" in state_dict:
            self._stream.load_state_dict(state_dict["data"])
            self._batches = state_dict["seen"]

    def _trainer_of(self, layer: str) -> HeadTrainer:
        return self._trainers[layer or self.layers[0]]

    def _learn_from(self, trainer: Any, pl_module: Any, stream: LabeledStream) -> None:
        """Learn from the next batch of the labeled loader."""
        device = trainer.strategy.root_device
        batch = stream.next(device)
        hooks = list(self._hooks.values())
        try:
            with extra_pass(trainer, pl_module, hooks), isolated(derived_seed(SEED, self._batches), device):
                features, batch = encode(trainer, pl_module, hooks, batch, self.images)
        except UnreadableBatchError as error:
            self.say_once(f"{error}")
            return
        targets = self._targets_of(batch, BatchSource.DATALOADER)
        with torch.no_grad():
            for layer, found in zip(self.layers, features, strict=True):
                self.learn(self._step(layer, found, targets, BatchSource.DATALOADER, self._batches))
            self._checked.add(BatchSource.DATALOADER)

"""A linear model that is trained beside a run, on features that it does not change."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_positive, fail, require
from lightning_contrast.callbacks.capture.dataloaders import SEED, LabelledStream
from lightning_contrast.callbacks.capture.forward_pass import encode, extra_pass
from lightning_contrast.callbacks.capture.labels import Labels
from lightning_contrast.callbacks.probes.base import OnlineProbe, Step
from lightning_contrast.callbacks.probes.linear_head import Learner, LinearHead, MakeOptimizer, MakeSchedule
from lightning_contrast.callbacks.probes.metrics import Scores
from lightning_contrast.callbacks.probes.tasks import ClassWeights, TaskName, build_task
from lightning_contrast.seeding import derived_seed, isolated


class OnlineLinearProbe(OnlineProbe):
    """Trains a linear model on detached features beside the run, and logs how good it is.

    It works on any LightningModule, under `lightning` and `pytorch_lightning`, with automatic or manual optimization,
    and leaves the run as it was, bit for bit: it has its own optimizer, all-reduces its own gradients, computes in
    float32, draws no random number, and adds nothing to the module, its loss or its state_dict.

    Logged at validation (at test with ``test_`` before the last word):

    - classes: ``<name>/top1``, ``<name>/top5`` for more than five classes, ``<name>/calibration_error`` (15 bins);
    - multilabel: ``<name>/map`` and ``<name>/f1``, means over the labels;
    - regression: ``<name>/r2`` and ``<name>/mae``;

    and at each epoch's end ``<name>/train_loss`` and, of classes, ``<name>/train_top1``. With several layers each has
    its own, ``<name>/<layer>/top1``, and ``<name>/top1`` is the first one's. With several validation loaders
    ``<name>/top1`` is the first one's and ``<name>/top1/dataloader_idx_<i>`` each one's. All reach
    ``trainer.callback_metrics``, with or without a logger, in time for `ModelCheckpoint` and `EarlyStopping`. A
    checkpoint keeps the model, its statistics, its optimizer and its place in ``data``. A second `fit` goes on.

    Features are standardised by running statistics and the model is trained by SGD with momentum, Nesterov's for
    regression. An online accuracy is close to that of a linear evaluation afterwards but not equal to it: the features
    move while it learns, and without ``data`` it sees augmented images.

    Args:
        num_classes: Number of classes, labels or numbers C.
        features: Name of the submodule whose output is classified, or several. "backbone" (the default) is the step
            output ``"features"`` where a step returns one, else the submodule of that name. A layer that validation
            does not call, as a projector, gets those features.
        labels: None: where the batch contract has them; a str: key of a dict batch; an int: index into a tuple or
            list; a callable: gets the whole batch. For batches of ``data`` and of validation alike.
        lr: Learning rate on the standardised features, absolute. None: min(sqrt(B), 16) / F for a global batch B, at
            most 0.1, and for regression at most 1 / F. The sum of the variances of F standardised features is F, which
            bounds the curvature of the loss; on four kinds of frozen features with F from 6 to 2048 and B of 32 and
            256 it was the best, or close to it, of fixed rates, other multiples of 1 / F, and Adam.
        data: A DataModule of its own, whose training loader is read, or a loader of labelled batches of the contract:
            the run itself may then be unlabelled. Features come from a further forward pass of the module in eval
            mode, without gradient, of the plain images where the Trainer has a `ViewAugmentation`. On several ranks an
            ordinary DataLoader is divided among them; one with a sampler of its own, or an iterable, is read by each.
            A resumed run goes on with the next batch: at once with a loader that has ``state_dict`` and
            ``load_state_dict`` (rank 0's is saved), after reading up to it with any other.
        name: First part of the names that are logged; must differ between probes.
        tokens: A token sequence (B, N, D) becomes its "mean" or its first token, "cls".
        task: "classes": labels (B,), integers, -1 where there is none. "multilabel": labels (B, C) of 0 and 1, -1 where
            one is not known. "regression": numbers (B, C) or (B,), NaN where they are not known; standardised too.
        class_weights: For classes: weights (C,) of the loss, or "balanced": inverse to how often a class was seen.
        optimizer: Gets the parameters and returns their optimizer, in the place of SGD.
        schedule: Gets the optimizer and returns its schedule, which moves with every step of the probe.
        every_n_steps: Training batches of the run for each batch of ``data``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        features: str | Sequence[str] = "backbone",
        labels: Labels = None,
        lr: float | None = None,
        data: Any = None,
        name: str = "linear_probe",
        tokens: str = "mean",
        task: TaskName = "classes",
        class_weights: ClassWeights = None,
        optimizer: MakeOptimizer | None = None,
        schedule: MakeSchedule | None = None,
        every_n_steps: int = 1,
    ) -> None:
        self.task = build_task(task, num_classes, class_weights)
        super().__init__(self.task, features=features, labels=labels, name=name, tokens=tokens)
        if lr is not None:
            check_positive("lr", lr)
            hint = "Set the rate of the optimizer itself"
            require(optimizer is None, "lr", "be None where there is an `optimizer`", lr, hint)
        for key, value in (("optimizer", optimizer), ("schedule", schedule)):
            if value is not None and not callable(value):
                hint = "Give for example `lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)`"
                fail(key, "be callable", type(value).__name__, hint, TypeError)
        check_at_least("every_n_steps", every_n_steps, 1)
        fits = data is not None or every_n_steps == 1
        require(fits, "every_n_steps", "be 1 without `data`", every_n_steps, "Leave it out")
        self.lr, self.every_n_steps = lr, every_n_steps
        self._stream = None if data is None else LabelledStream(data)
        self._batches = 0
        self._learners = {
            layer: Learner(f"{name}/{layer}", self.task, lr=lr, optimizer=optimizer, schedule=schedule)
            for layer in self.layers
        }

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"OnlineLinearProbe[{self.name}]"

    @property
    def head(self) -> LinearHead | None:
        """The model of the first layer, None before its first step."""
        return self._learners[self.layers[0]].head

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the first layer's model, None before its first step."""
        return self._learners[self.layers[0]].optimizer

    @property
    def heads(self) -> dict[str, LinearHead | None]:
        """The models of all layers by name."""
        return {layer: learner.head for layer, learner in self._learners.items()}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers and prepare the labelled loader."""
        super().on_fit_start(trainer, pl_module)
        if self._stream is not None:
            self._stream.start(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count anew."""
        for learner in self._learners.values():
            learner.begin_epoch(pl_module.device)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and expect their features, unless they come from a loader of their own."""
        if self._stream is None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Learn, outside autocast and after the optimizer's step."""
        if self._stream is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        self._batches += 1
        if self._batches % self.every_n_steps == 0:
            self._learn_from(trainer, pl_module, self._stream)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the accuracy and the loss of the training images, each before the step that learned from it."""
        for layer, learner in self._learners.items():
            for key, value in learner.epoch_values().items():
                for log_key in self._log_keys(layer, key):
                    pl_module.log(log_key, value, sync_dist=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Let the workers of the labelled loader go."""
        if self._stream is not None:
            self._stream.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the workers go too: `on_fit_end` is not called after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self.on_fit_end(trainer, pl_module)

    def learn(self, step: Step) -> None:
        """Do one step of the optimizer for the step's layer."""
        self._learner(step.layer).learn(step)

    def predict(self, features: Tensor, layer: str = "") -> Tensor | None:
        """Return the logits or numbers (B, C) of a layer's features (B, F), or None before the first step."""
        return self._learner(layer).predict(features)

    def new_scores(self, device: torch.device) -> Scores:
        """Return what the task is judged by."""
        return self.task.scores(device)

    def state_dict(self) -> dict[str, Any]:
        """Return the models, their statistics and optimizers, on the CPU, and the place in the labelled loader."""
        states = {layer: learner.state_dict() for layer, learner in self._learners.items()}
        state = states[self.layers[0]] if len(self.layers) == 1 else {"layers": states}
        if self._stream is not None and self._batches:
            state = {**state, "data": self._stream.state_dict(), "seen": self._batches}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the model is built: where and how wide the features are is not known yet."""
        own = {key: value for key, value in state_dict.items() if key not in ("data", "seen")}
        states = own.get("layers", {self.layers[0]: own})
        hint = "Give the probe the `features` that it had, or another `name` to begin anew"
        known = states.keys() == self._learners.keys()
        require(known, self.name, "have the layers that the checkpoint has", (self.layers, tuple(states)), hint)
        for layer, state in states.items():
            self._learners[layer].load_state_dict(state)
        if self._stream is not None and "data" in state_dict:
            self._stream.load_state_dict(state_dict["data"])
            self._batches = state_dict["seen"]

    def _learner(self, layer: str) -> Learner:
        return self._learners[layer or self.layers[0]]

    def _learn_from(self, trainer: Any, pl_module: Any, stream: LabelledStream) -> None:
        """Learn from the next labelled batch."""
        device = trainer.strategy.root_device
        batch = stream.next(device)
        hooks = list(self._taps.values())
        with extra_pass(trainer, pl_module, hooks), isolated(derived_seed(SEED, self._batches), device):
            features, batch = encode(trainer, pl_module, hooks, batch)
        targets = self._targets_of(batch, "`data`")
        with torch.no_grad():
            for layer, found in zip(self.layers, features, strict=True):
                self.learn(self._step(layer, found, targets, f"`data` batch {self._batches}"))
            self._seen.add("`data`")

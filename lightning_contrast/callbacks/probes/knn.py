"""Online k-NN classifier over a set that is encoded at validation, or over the features of the training steps."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_choice, check_positive, require
from lightning_contrast.callbacks.capture.feature_bank import FeatureBuffer, LabeledFeatures
from lightning_contrast.callbacks.capture.labels import Labels, Source
from lightning_contrast.callbacks.probes.bank import MAX_BANK, Step
from lightning_contrast.callbacks.probes.base import OnlineProbe
from lightning_contrast.callbacks.probes.metrics import MaskedAccuracy, Scores
from lightning_contrast.callbacks.probes.tasks import ClassTask
from lightning_contrast.distributed import world_size
from lightning_contrast.metrics.neighbours import largest_shares, search, search_euclidean, sum_votes, vote


class OnlineKNN(OnlineProbe):
    """Classify validation images by their nearest neighbors among training images, and log the accuracy.

    The vote is the published one: the ``k`` most similar features, each weighted by exp(cosine / temperature)
    (https://arxiv.org/abs/1805.01978, sec. 3.4; DINO's ``eval_knn.py``). The bank of features is one of three:

    - ``bank="fresh"``: the images that the run's training loader draws, encoded at the first validation batch with the
      weights that validation uses, in eval mode, without augmentation if the Trainer has a `ViewAugmentation`. The
      accuracy is that of `evaluation.knn_top1` on the same weights and images. It costs one forward pass per image of
      the bank and validation; probes of the same layers share the passes. A loader without a dataset of known length is
      not encoded: a warning at the start says so.
    - ``bank="train"``: the features of the training steps, without a forward pass. It reads lower and may rank epochs
      differently: its images are augmented, its BatchNorm statistics are those of the batch, and its weights are up to
      an epoch old, while the queries are none of these. Weights that are loaded empty it.
    - ``dataloader=loader``: labeled batches of another loader, encoded like "fresh"; the run itself may be unlabeled.

    Logged: ``<name>/top1`` at validation (``<name>/test_top1`` at test), also per layer and per loader as by
    `OnlineLinearProbe`. Several ``k`` or temperatures are logged as ``<name>/k<k>_t<temperature>/top1`` each, and the
    first also as ``<name>/top1``. The run is not changed, bit for bit. A checkpoint keeps nothing: after a resume the
    bank "train" fills again, so its values equal those of the uninterrupted run from the end of the first epoch on; the
    other banks are complete at once.

    Memory per layer of width F: ``max_bank`` x F x 8 bytes on each rank plus 128 MiB of similarities during validation;
    for the bank "train" also ``max_bank`` x F x 2 bytes over all ranks during training.

    Args:
        num_classes: Number of classes, >= 2.
        features: As in `OnlineLinearProbe`.
        labels: As in `OnlineLinearProbe`; images with the label -1 are left out.
        images: As in `OnlineLinearProbe`.
        k: One or several numbers of neighbors that vote, >= 1; all features while the bank has fewer.
        temperature: One or several divisors of the cosine similarities; unitless, > 0.
        bank: "fresh" or "train".
        max_bank: Maximum number of images over all ranks, >= k. A larger set is sampled with a fixed seed, the same
            images at each validation; "train" keeps the newest features.
        dataloader: A loader of labeled batches, or a LightningDataModule whose training loader is used, as the bank.
        name: Prefix of the log keys; must differ between probes.
        tokens: As in `OnlineLinearProbe`.
        distance: "cosine", or "euclidean": neighbors by Euclidean distance d, each weighted by 1 / (d + 1e-5), without
            a temperature, as in solo-learn.
        top_k: Further accuracies: an image also counts for ``top<k>`` if its class is among the k with most votes.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or ``dataloader`` is given with ``bank="train"``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        features: str | Sequence[str] = "backbone",
        labels: Labels = None,
        images: Source = None,
        k: int | Sequence[int] = 20,
        temperature: float | Sequence[float] = 0.07,
        bank: str = "fresh",
        max_bank: int = MAX_BANK,
        dataloader: Any = None,
        name: str = "knn",
        tokens: str = "mean",
        distance: str = "cosine",
        top_k: int | Sequence[int] = 1,
    ) -> None:
        super().__init__(
            ClassTask(num_classes),
            features=features,
            labels=labels,
            images=images,
            name=name,
            tokens=tokens,
            bank=bank,
            max_bank=max_bank,
            dataloader=dataloader,
        )
        self.k, self.temperature = _several(k), _several(temperature)
        require(len(self.k) > 0 and len(self.temperature) > 0, "k", "not be empty", k, "Give `k` and `temperature`")
        for neighbors in self.k:
            check_at_least("k", neighbors, 1)
        for value in self.temperature:
            check_positive("temperature", value)
        check_at_least("max_bank", max_bank, max(self.k), "Raise `max_bank` to at least `k`")
        check_choice("distance", distance, ("cosine", "euclidean"))
        self.distance, self.top_k = distance, tuple(sorted({1, *_several(top_k)}))
        for number in self.top_k:
            check_at_least("top_k", number, 1)
        hint = "Decrease `top_k`"
        require(max(self.top_k) <= num_classes, "top_k", f"be <= {num_classes}, the number of classes", top_k, hint)
        if dataloader is not None:
            hint = "Give either `bank` or `dataloader`"
            require(bank == "fresh", "bank", "be left out if there is a `dataloader`", bank, hint)
        self._buffers = {layer: FeatureBuffer() for layer in self.layers}
        self._batches_per_epoch = float("inf")
        self._votes: dict[str, LabeledFeatures | None] = {}

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, which allows several in a Trainer."""
        return f"OnlineKNN[{self.name}]"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Empty the bank: features of an earlier fit may belong to another module."""
        super().on_fit_start(trainer, pl_module)
        for buffer in self._buffers.values():
            buffer.clear()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn if the run has no validation data, unless validation was turned off, or of what spoils the bank."""
        super().on_train_start(trainer, pl_module)
        if not trainer.enable_validation and trainer.limit_val_batches:
            rank_zero_warn(
                f"`{self.name}` classifies validation images, and this run has none, so nothing is logged before a "
                "test: define a `validation_step`, and give `fit` a validation loader."
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the length of an epoch; older features leave the bank."""
        self._batches_per_epoch = trainer.num_training_batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the labels and arm the hooks, for the bank "train" only."""
        if not self.encodes:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def learn(self, step: Step) -> None:
        """Add the features of a batch and remove those of one epoch before."""
        buffer = self._buffers[step.layer or self.layers[0]]
        buffer.add(step.features, self.task.masked(step.labels, step.valid))
        buffer.trim(max(1, self.max_bank // world_size()), self._batches_per_epoch)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Empty the bank "train", whose features belong to other weights."""
        for buffer in self._buffers.values():
            buffer.clear()

    def judge_with(self, trainer: Any, pl_module: Any) -> None:
        """Encode the bank, or gather that of the training steps."""
        if self.encodes:
            self._encode_bank(trainer, pl_module)
            found = self._banks
        else:
            found = {layer: buffer.gathered(pl_module.device) for layer, buffer in self._buffers.items()}
            if not any(found.values()):
                self.say_once(
                    'the bank "train" is empty: it holds the features of training steps with the current weights. Use '
                    '`bank="fresh"`; nothing is logged.'
                )
        self._votes = {layer: bank and (self._scaled(bank[0]), bank[1]) for layer, bank in found.items()}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Free the bank."""
        super().on_validation_end(trainer, pl_module)
        self._votes = {}

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Free the bank."""
        super().on_test_end(trainer, pl_module)
        self._votes = {}

    def _scaled(self, features: Tensor) -> Tensor:
        """Return features ``(N, F)`` as the search takes them: L2-normalized for cosines."""
        return F.normalize(features.float(), dim=1) if self.distance == "cosine" else features.float()

    def predict(self, features: Tensor, layer: str = "") -> Tensor | None:
        """Return the classes ``(B, S, K)`` with the most votes, or None without a bank.

        Args:
            features: ``(B, F)``.
            layer: Layer of the features; "" is the first layer.

        Returns:
            For S pairs of k and temperature the K = max(top_k) classes with the largest shares, largest first.

        Raises:
            ValueError: If the features of the bank have another width.
        """
        found = self._votes.get(layer or self.layers[0])
        if found is None:
            return None
        bank, labels = found
        widths = (features.shape[1], bank.shape[1])
        hint = "Name a layer that `forward` and the validation step both call"
        require(widths[0] == widths[1], "features", "be as wide at validation as in the bank", widths, hint)
        ranks = max(self.top_k)
        if len(features) == 0:
            return labels.new_zeros(0, len(self.k) * len(self.temperature), ranks)
        k = min(max(self.k), len(bank))
        similarities, indices = (search if self.distance == "cosine" else search_euclidean)(features, bank, k)
        neighbors = labels[indices]
        best = []
        for number in self.k:
            for temperature in self.temperature:
                near, classes = similarities[:, :number], neighbors[:, :number]
                if self.distance == "cosine":
                    shares = vote(near, classes, num_classes=self.num_classes, temperature=temperature)
                else:
                    shares = sum_votes(near, classes, self.num_classes)
                best.append(largest_shares(shares, ranks))
        return torch.stack(best, dim=1)

    def new_scores(self, device: torch.device) -> Scores:
        """Return the accuracy of each vote."""
        pairs = [f"k{k}_t{temperature:g}" for k in self.k for temperature in self.temperature]
        return VoteScores(pairs, self.top_k, device)


class VoteScores(Scores):
    """Accuracies of several votes by name, and those of the first without a name.

    Args:
        names: Name of each vote.
        ranks: An image counts for ``top<r>`` if its class is among the r with the largest shares.
        device: Device of the predictions.
    """

    def __init__(self, names: list[str], ranks: tuple[int, ...], device: torch.device) -> None:
        self.accuracies = {name: {rank: MaskedAccuracy().to(device) for rank in ranks} for name in names}

    def update(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add predicted classes ``(B, S, K)``, classes ``(B,)`` and the mask ``(B,)``."""
        for of_ranks, predicted in zip(self.accuracies.values(), outputs.unbind(dim=1), strict=True):
            correct = predicted == targets.unsqueeze(1)
            for rank, accuracy in of_ranks.items():
                accuracy.update(correct[:, :rank].any(dim=1), valid)

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies, scalars."""
        found = {
            name: {f"top{rank}": accuracy.compute() for rank, accuracy in of_ranks.items()}
            for name, of_ranks in self.accuracies.items()
        }
        first = next(iter(found.values()))
        if len(found) == 1:
            return first
        return first | {f"{name}/{key}": value for name, of in found.items() for key, value in of.items()}


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)

"""Instance discrimination by the embeddings of training steps."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_positive, check_word, fail
from lightning_contrast.callbacks.capture.features import ViewHook, count_images
from lightning_contrast.callbacks.capture.labels import Labels, read_classes
from lightning_contrast.callbacks.collapse.model_facts import temperature_of
from lightning_contrast.callbacks.reporting import log_values
from lightning_contrast.nn.memory_bank import MemoryBank

Values = dict[str, tuple[Tensor, Tensor]]
"""Values of each anchor ``(A,)`` and whether they are defined ``(A,)``, by name."""


class InstanceDiscriminationMonitor(L.Callback):
    """Log how well embeddings discriminate the two views of an image from other images.

    Every ``every_n_steps`` training batches, the output of a layer for two views, ``(B, D)`` each, is taken from the
    training step, without an extra forward pass; the hook is idle in all other batches. As in SimCLR, the negatives of
    an embedding are those of all other images in both views on all ranks, so a global batch of B images has N = 2 B - 1
    candidates. If the layer sees a single view and the step returns the other as ``"keys"`` ``(B, D)``, as in MoCo, the
    keys are the second view, and the negatives are the rows of the module's queue of keys.

    Logged as means over the images of all ranks: ``contrast/positive_cosine``, ``contrast/negative_cosine``, and
    ``contrast/top1``, the share of embeddings whose positive is more similar than every negative. With a temperature:
    ``contrast/loss``, the InfoNCE loss over the candidates in nats; ``contrast/bound``, ln N minus the loss, a lower
    bound of the mutual information of the views, which cannot exceed ln N (``contrast/bound_limit``);
    ``contrast/effective_negatives``, the exponential of the entropy of the softmax over the negatives, 1 to N - 1, and
    ``contrast/effective_negatives_share``, the same divided by the number of negatives: near 1, the temperature is so
    high that all negatives have equal weight; near 0, a few negatives dominate. With labels and without a queue:
    ``contrast/false_negatives``, the share of the ``hardest`` most similar negatives with the label of the image, and
    ``contrast/false_negatives_chance``, the same over all negatives.

    Training stays bit-identical. A checkpoint stores the number of batches. Overhead: one product of ``(2 B, D)`` and
    ``(D, N)`` and a few synchronizations per measurement.

    Args:
        features: Name of the submodule whose output is compared; methods of this package have a "projector".
        temperature: Divisor of the cosine similarities, > 0; None: the attribute ``temperature`` of the module or of
            its ``criterion``; keys that need a temperature are not logged without one.
        labels: Source of the labels; None: the labels of the batch if there are any; a key of a dict batch, an index
            into a tuple, or a function of the batch. -1 means no label.
        hardest: Number of negatives per embedding that are checked for false negatives, >= 1.
        every_n_steps: Number of batches between measurements, >= 1.
        name: Prefix of the logged names.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        features: str = "projector",
        *,
        temperature: float | None = None,
        labels: Labels = None,
        hardest: int = 10,
        every_n_steps: int = 50,
        name: str = "contrast",
    ) -> None:
        if temperature is not None:
            check_positive("temperature", temperature)
        check_at_least("hardest", hardest, 1)
        check_at_least("every_n_steps", every_n_steps, 1)
        check_word("name", name)
        self.temperature, self.labels, self.hardest = temperature, labels, hardest
        self.every_n_steps, self.name = every_n_steps, name
        self._hook = ViewHook(features)
        self._batches = 0
        self._labels: Tensor | None = None
        self._queue: Tensor | None = None
        self._queue_mask: Tensor | None = None
        self._has_bank = False
        self._warned = False

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``."""
        return f"InstanceDiscriminationMonitor[{self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Reset the number of batches (a checkpoint's is loaded later)."""
        if stage == "fit":
            self._batches, self._warned = 0, False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the feature hook; layers exist in their final, wrapped form only from here on."""
        self._hook.attach(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Arm the feature hook if the batch is measured, and copy the queue before the step updates it."""
        if not self._is_due():
            return
        self._hook.arm(count_images(batch))
        self._labels = read_classes(batch, self.labels, type(self).__name__)
        self._queue, self._queue_mask = _queue(pl_module)
        self._has_bank = _has_bank(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure and log if due."""
        due = self._is_due()
        self._batches += 1
        if not due:
            return
        with torch.no_grad():
            view_a, view_b, keyed = self._views(outputs)
            temperature = self._temperature(trainer, pl_module, view_a.device)
            queue, mask = (self._queue, self._queue_mask) if keyed else (None, None)
            if queue is not None and mask is not None:
                values = against_queue(view_a, view_b, queue, mask, temperature)
            else:
                values = against_batch(view_a, view_b, temperature, self._labels, self.hardest)
        self._labels = self._queue = self._queue_mask = None
        self._warn_of_nan(values["positive_cosine"], batch_idx)
        log_values(trainer, pl_module, {f"{self.name}/{key}": value for key, value in values.items()})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the feature hook."""
        self._hook.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the feature hook; `teardown` is not called after an exception."""
        self._hook.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches, so that a resumed run measures the same batches."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of batches."""
        self._batches = state_dict["batches"]

    def _is_due(self) -> bool:
        return (self._batches + 1) % self.every_n_steps == 0

    def _views(self, outputs: Any) -> tuple[Tensor, Tensor, bool]:
        """Return two views, ``(B, D)`` each, and whether the second view is the keys of the step output."""
        taken = self._hook.read_views()
        keys = outputs.get("keys") if isinstance(outputs, Mapping) else None
        single = taken is not None and len(taken) == 1 and not self._has_bank
        if single and taken is not None and isinstance(keys, Tensor) and keys.shape == taken[0].shape:
            return taken[0], keys.detach().float(), True
        if taken is None or len(taken) < 2:
            got = "nothing" if taken is None else f"{len(taken)} view"
            if self._hook.refused():
                got += f" and {self._hook.refused()}"
            rule = f"be a layer whose output is two views (B, D) in each training step ({self._hook.features!r} is not)"
            hint = 'Give the projection head, or return the second view as the step output "keys"'
            fail("features", rule, got, hint)
        return taken[0], taken[1], False

    def _warn_of_nan(self, cosine: Tensor, batch_idx: int) -> None:
        """Warn once if the mean over all ranks is not finite."""
        if not self._warned and not bool(cosine.isfinite()):
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__}: some embeddings of {self._hook.features!r} are NaN or infinite in training "
                f"batch {batch_idx}, so `{self.name}` logs NaN. Check the loss and the learning rate."
            )

    def _temperature(self, trainer: Any, module: Any, device: torch.device) -> Tensor | None:
        value: Any = self.temperature if self.temperature is not None else temperature_of(trainer, module)
        return None if value is None else torch.as_tensor(value, dtype=torch.float32, device=device).reshape(())


def _queue(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return copies of the queue of keys of all ranks ``(K, D)`` and its mask ``(K,)``, None without a queue."""
    queues = getattr(module, "queues", None)
    queue: Any = queues().get("keys") if callable(queues) else None
    mask = getattr(queue, "mask", None)
    if not isinstance(mask, Tensor) or not isinstance(getattr(queue, "features", None), Tensor):
        return None, None
    features = queue.features.detach().float()
    if getattr(queue, "sharded", False):
        features, mask = distributed.gather(features), distributed.gather(mask)
    return features.clone(), mask.clone()


def _has_bank(module: Any) -> bool:
    """Return whether the keys feed a memory bank: they are the embeddings themselves then, not a second view."""
    queues = getattr(module, "queues", None)
    return callable(queues) and isinstance(queues().get("keys"), MemoryBank)


def against_batch(
    view_a: Tensor, view_b: Tensor, temperature: Tensor | None, labels: Tensor | None, hardest: int
) -> dict[str, Tensor]:
    """Compare the embeddings of this rank with those of all other images on all ranks; a collective operation.

    Args:
        view_a: Embeddings of the first view, ``(B, D)``; L2-normalized here.
        view_b: Embeddings of the second view of the same images, ``(B, D)``; L2-normalized here.
        temperature: A scalar, or None.
        labels: Labels, ``(B,)``, -1 for none; or None.
        hardest: Number of negatives that are checked for false negatives.

    Returns:
        Means over all ranks, scalars by name; see `InstanceDiscriminationMonitor`.
    """
    a, b = F.normalize(view_a.float(), dim=1), F.normalize(view_b.float(), dim=1)
    sizes = distributed.batch_sizes(len(a), a.device)
    start, total = sum(sizes[: distributed.rank()]), sum(sizes)
    candidates = torch.cat([distributed.gather(a, sizes), distributed.gather(b, sizes)])  # (2N, D)
    anchors = torch.cat([a, b])
    own = torch.arange(start, start + len(a), device=a.device).repeat(2)  # index of the image of each anchor
    positive = (a * b).sum(dim=1).repeat(2)
    same_image = torch.arange(total, device=a.device).repeat(2).unsqueeze(0) == own.unsqueeze(1)
    cosines = (anchors @ candidates.T).masked_fill(same_image, -math.inf)
    values = _values(positive, cosines, ~same_image, temperature)
    if labels is not None and len(labels) == len(a) and total > 1:
        of_all = distributed.gather(labels.to(a.device), sizes).repeat(2)
        mine, known = labels.to(a.device).repeat(2).unsqueeze(1), (labels >= 0).to(a.device).repeat(2)
        false = (of_all.unsqueeze(0) == mine) & ~same_image
        nearest = cosines.topk(min(hardest, 2 * total - 2), dim=1).indices
        values["false_negatives"] = (false.gather(1, nearest).float().mean(dim=1), known)
        values["false_negatives_chance"] = (false.float().sum(dim=1) / (2 * total - 2), known)
    return _means(values)


def against_queue(
    query: Tensor, key: Tensor, queue: Tensor, mask: Tensor, temperature: Tensor | None
) -> dict[str, Tensor]:
    """Compare queries with their keys and the keys of a queue; a collective operation.

    Args:
        query: Embeddings of the first view, ``(B, D)``; L2-normalized here.
        key: Keys of the same images, ``(B, D)``; L2-normalized here.
        queue: Keys of other images, ``(K, D)``; L2-normalized here.
        mask: False for rows of the queue that are not filled yet, ``(K,)``.
        temperature: A scalar, or None.

    Returns:
        Means over all ranks, scalars by name; see `InstanceDiscriminationMonitor`.
    """
    q, k, n = (F.normalize(x.float(), dim=1) for x in (query, key, queue.to(query.device)))
    valid = mask.to(query.device).unsqueeze(0).expand(len(q), -1)
    cosines = (q @ n.T).masked_fill(~valid, -math.inf)
    return _means(_values((q * k).sum(dim=1), cosines, valid, temperature))


def _values(positive: Tensor, cosines: Tensor, valid: Tensor, temperature: Tensor | None) -> Values:
    """Return the values of each anchor and whether they are defined."""
    negatives = valid.sum(dim=1)
    some = negatives > 0
    everywhere = torch.ones_like(some)
    values = {
        "positive_cosine": (positive, everywhere),
        "negative_cosine": (cosines.masked_fill(~valid, 0.0).sum(dim=1) / negatives, some),
        "top1": ((positive > cosines.amax(dim=1)).float(), some),
    }
    if temperature is None:
        return values
    logits = cosines / temperature
    every = torch.cat([(positive / temperature).unsqueeze(1), logits], dim=1)
    loss = every.logsumexp(dim=1) - positive / temperature
    limit = (negatives + 1).float().log()
    effective = torch.special.entr(logits.masked_fill(~some.unsqueeze(1), 0.0).softmax(dim=1)).sum(dim=1).exp()
    return values | {
        "loss": (loss, some),
        "bound": (limit - loss, some),
        "bound_limit": (limit, some),
        "effective_negatives": (effective, some),
        "effective_negatives_share": (effective / negatives, some),
    }


def _means(values: Values) -> dict[str, Tensor]:
    """Return means over the anchors of all ranks for which a value is defined, NaN if there are none."""
    sums = torch.stack([torch.where(counts, value, 0.0).double().sum() for value, counts in values.values()])
    counts = torch.stack([counted.sum().double() for _, counted in values.values()])
    sums, counts = distributed.all_reduce_sum(torch.stack([sums, counts]))
    return dict(zip(values, (sums / counts).float(), strict=True))

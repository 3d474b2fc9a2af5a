"""How much perturbations, and the views of a policy, keep of an image's identity and lose of its class."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_probability, fail, require
from lightning_contrast.augment import ViewPolicy
from lightning_contrast.augment.images import as_float
from lightning_contrast.callbacks.invariance.perturbations import (
    Changes,
    changed,
    chosen_changes,
    fitting_changes,
)
from lightning_contrast.contracts import check_images
from lightning_contrast.evaluation.feature_pass import load_subject
from lightning_contrast.evaluation.frozen import encode
from lightning_contrast.metrics.neighbours import vote
from lightning_contrast.seeding import seeded

VIEWS = "views"
"""Operation of the rows that judge the first view of a policy as a whole."""
POLICY_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_PIXELS = 32  # edge of the images whose pixels are the features
_TEMPERATURE = 0.07


class ViewEffect(NamedTuple):
    """Effect of one operation at one strength on N images.

    Attributes:
        operation: Name of the perturbation, or `VIEWS`.
        strength: Its strength, in ``unit``.
        unit: What the strength means.
        identity: Share of the changed images whose nearest unchanged image, by cosine similarity, is their own. Equally
            near ones count in parts: features that are the same for all images give 1 / N.
        identity_error: Standard error of ``identity``.
        accuracy: Share of the labeled changed images that get their class by a k-NN vote of the other unchanged images;
            None without labels.
        class_lost: Accuracy of the unchanged images minus ``accuracy``: negative if the change helps; None without
            labels.
        class_lost_error: Standard error of ``class_lost``, of the paired differences.
    """

    operation: str
    strength: float
    unit: str
    identity: float
    identity_error: float
    accuracy: float | None
    class_lost: float | None
    class_lost_error: float | None


class Proposal(NamedTuple):
    """Range of strengths proposed for one operation.

    Attributes:
        strongest: The strongest one judged, such that it and all weaker ones stay within the limit; None if the weakest
            does not.
        is_open: Whether it is the strongest that was judged: a stronger one may stay within the limit too.
    """

    strongest: float | None
    is_open: bool


def view_effects(
    model: str | Path | nn.Module | None,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    changes: Changes = None,
    policy: ViewPolicy | None = None,
    k: int = 10,
    batch_size: int = 128,
    seed: int = 0,
) -> list[ViewEffect]:
    """Judge perturbations one at a time, and the views of a policy, by features of the changed images.

    The perturbations are those of `InvarianceMonitor`, fixed functions of image and strength: +s for even and -s for
    odd images. A policy's views draw every strength at random up to its own, and are judged at shares of its strength
    (`ViewPolicy.set_strength`) with one draw per image. All figures are those of the given features: an encoder that
    ignores a color does not notice that it was lost, and pixels notice a shift that no person does.

    Args:
        model: As for `load_subject`; None takes pixels as features: 32 x 32, centered at the mean of the unchanged
            images.
        images: N >= 2 different images ``(N, C, H, W)``, uint8 in 0..255 or float in 0..1.
        labels: Classes ``(N,)``, integers; -1 for unknown. None or all unknown: identity only.
        changes: Names, or functions with strengths, as for `InvarianceMonitor`; None is all that fit the channels.
        policy: A policy without mean and std, whose first view is judged at 0.25, 0.5, 0.75 and 1 of its strength;
            None judges none.
        k: Neighbors that vote on a class, weighted by exp(cosine / 0.07), at most the number of other labeled images.
        batch_size: Images per forward pass, >= 1.
        seed: Seed of the policy's draws, >= 0.

    Returns:
        One row per operation and strength, in the order of the strengths.

    Raises:
        ValueError: If an argument is out of range, or the policy normalizes.
    """
    check_images(images, values=True, evaluating=True)
    check_at_least("N", len(images), 2, "Give at least two images")
    check_at_least("k", k, 1)
    check_at_least("seed", seed, 0)
    if labels is not None and labels.shape != (len(images),):
        fail("labels", f"have the shape ({len(images)},)", tuple(labels.shape), "Give one class per image")
    if policy is not None:
        hint = "Make the policy without `mean` and `std`: the model has its own"
        plain = not any(policy.mean) and all(value == 1 for value in policy.std)
        require(plain and not policy.indices, "policy", "give images in 0..1", (policy.mean, policy.std), hint)
    pixels = as_float(images)
    judge = _Judge(model, pixels, labels, k, batch_size)
    rows = []
    for name, change in fitting_changes(chosen_changes(changes), images.shape[1]).items():
        for strength in change.strengths:
            parts = [changed(part, change, strength) for part in torch.split(pixels, 2 * batch_size)]  # keeps parity
            rows.append(judge(name, strength, change.unit, torch.cat(parts)))
    for strength in POLICY_STRENGTHS if policy is not None else ():
        rows.append(judge(VIEWS, strength, "share of its strength", _first_view(policy, pixels, strength, seed)))
    return rows


def _first_view(policy: ViewPolicy | None, images: Tensor, strength: float, seed: int) -> Tensor:
    """Return the first view ``(N, C, h, w)`` of images at a strength, which is the policy's own afterwards."""
    assert policy is not None
    before = policy.strength
    try:
        policy.set_strength(strength)
        with seeded(seed, images.device):
            return policy(images)[0].clamp(0, 1)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
    finally:
        policy.set_strength(before)


def propose(
    effects: list[ViewEffect], *, max_class_lost: float = 0.05, min_identity: float = 0.5
) -> Mapping[str, Proposal]:
    """Return the range of strengths proposed for each operation: from 0 to the strongest one within the limit.

    With classes the limit is on the class lost: views should differ as much as they can and show the same class
    (https://arxiv.org/abs/2005.10243). Without, it is on the identity: at least that share finds its own image. The
    estimates are compared with the limit, not their intervals: see ``class_lost_error`` for what chance can do.

    Args:
        effects: Of `view_effects`, N >= 1 rows.
        max_class_lost: Largest class lost, in 0..1.
        min_identity: Smallest identity, in 0..1, for effects without classes.

    Raises:
        ValueError: If a limit is out of range.
    """
    check_probability("max_class_lost", max_class_lost)
    check_probability("min_identity", min_identity)
    found: dict[str, Proposal] = {}
    for operation in dict.fromkeys(row.operation for row in effects):
        own = sorted((row for row in effects if row.operation == operation), key=lambda row: row.strength)
        strongest, is_open = None, True
        for row in own:
            kept = row.identity >= min_identity if row.class_lost is None else row.class_lost <= max_class_lost
            if not kept:
                is_open = False
                break
            strongest = row.strength
        found[operation] = Proposal(strongest, is_open)
    return found


class _Judge:
    """Features of the unchanged images, and the comparison of changed ones with them."""

    def __init__(
        self, model: str | Path | nn.Module | None, pixels: Tensor, labels: Tensor | None, k: int, batch_size: int
    ) -> None:
        self.subject = None if model is None else load_subject(model)
        self.batch_size = batch_size
        self.mean: Tensor | None = None
        plain = self.features(pixels)
        if self.subject is None:
            self.mean = plain.mean(dim=0)
            plain = plain - self.mean
        self.plain = F.normalize(plain.double(), dim=1)
        known = torch.zeros(len(pixels), dtype=torch.bool) if labels is None else labels.cpu() >= 0
        self.known = known.nonzero().flatten()
        self.labels: Tensor | None = None
        if len(self.known) > 1:
            assert labels is not None
            _, self.labels = torch.unique(labels.cpu()[self.known], return_inverse=True)
            self.k = min(k, len(self.known) - 1)
            self.before = self.correct(self.plain)

    def features(self, pixels: Tensor) -> Tensor:
        """Return features ``(N, F)`` of images ``(N, C, H, W)`` in 0..1."""
        if self.subject is not None:
            return encode(self.subject.module, pixels, self.subject.preprocess, batch_size=self.batch_size)
        small = F.interpolate(pixels, (_PIXELS, _PIXELS), mode="bilinear", antialias=True).flatten(1)
        return small if self.mean is None else small - self.mean

    def correct(self, unit: Tensor) -> Tensor:
        """Return which labeled images get their class from the other ones, float64 ``(n,)``."""
        assert self.labels is not None
        similarity = unit[self.known] @ self.plain[self.known].T
        similarity.fill_diagonal_(-torch.inf)
        near, indices = similarity.topk(self.k, dim=1)
        votes = vote(near, self.labels[indices], num_classes=int(self.labels.max()) + 1, temperature=_TEMPERATURE)
        return (votes.argmax(dim=1) == self.labels).double()

    def __call__(self, operation: str, strength: float, unit: str, pixels: Tensor) -> ViewEffect:
        """Return the effect of a change that gave these images ``(N, C, h, w)`` in 0..1."""
        rows = F.normalize(self.features(pixels).double(), dim=1)
        similarity = rows @ self.plain.T
        nearest = similarity == similarity.amax(dim=1, keepdim=True)
        own = nearest.diagonal().double() / nearest.sum(dim=1)
        identity, identity_error = _mean(own)
        if self.labels is None:
            return ViewEffect(operation, strength, unit, identity, identity_error, None, None, None)
        after = self.correct(rows)
        lost, lost_error = _mean(self.before - after)
        return ViewEffect(operation, strength, unit, identity, identity_error, float(after.mean()), lost, lost_error)


def _mean(values: Tensor) -> tuple[float, float]:
    """Return the mean of values ``(n,)`` and its standard error."""
    return float(values.mean()), float(values.std(correction=1) / len(values) ** 0.5)

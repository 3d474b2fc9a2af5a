"""Logistic regression by L-BFGS: with a given penalty, and with CLIP's sweep of the penalty."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_positive
from lightning_contrast.evaluation.protocols.inputs import Labeled, accuracy, held_out, split
from lightning_contrast.evaluation.protocols.linear import ProbeResult

SWEEP = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
"""First values of C, the inverse of the penalty."""


def logistic_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    c: float = 0.316,
    standardize: bool = False,
    max_iter: int = 1000,
) -> ProbeResult:
    """Fit multinomial logistic regression with an L2 penalty (scikit-learn, L-BFGS).

    The default is that of CLIP's README for CIFAR-100 (https://arxiv.org/abs/2103.00020, A.3); `logistic_sweep` chooses
    the penalty.

    Args:
        train: Features ``(N, F)``, floating.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        test: Features ``(M, F)``.
        test_labels: Classes ``(M,)``.
        c: Inverse of the penalty, > 0; the loss is a sum over rows.
        standardize: Divide each dimension by its standard deviation after subtracting its mean, both of ``train``.
        max_iter: Iterations at most, >= 1.

    Returns:
        Accuracy, logits ``(M, C)`` and settings; a class without training rows has the logit -inf.

    Raises:
        ValueError: If a number is out of range, shapes do not match, or there is one class only.
    """
    check_positive("c", c)
    check_at_least("max_iter", max_iter, 1)
    given = split(train, train_labels, test, test_labels)
    logits = _fit(given.train, given.test.features, given.num_classes, c, standardize, max_iter)
    return ProbeResult(accuracy(logits, given.test.labels), logits, given.test.labels, {"c": c})


def logistic_sweep(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    validation_share: float = 0.2,
    steps: int = 8,
    max_iter: int = 1000,
    seed: int = 0,
) -> ProbeResult:
    """Fit logistic regression with the penalty that is best on held-out training rows, in CLIP's protocol.

    As in the linear probe of CLIP (https://arxiv.org/abs/2103.00020, A.3) and CoOp's code of it: seven values of C from
    1e-6 to 1e6, then a search around the best one, halving the distance in log C ``steps`` times. The final model
    is fitted to all training rows. Differs from it: features are used as given, without normalization.

    Args:
        train: Features ``(N, F)``, floating.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        test: Features ``(M, F)``.
        test_labels: Classes ``(M,)``.
        validation_share: Share of the training rows of each class that chooses C, in (0, 1).
        steps: Halvings of the search, >= 0.
        max_iter: Iterations of L-BFGS at most, >= 1.
        seed: Seed of the split, >= 0.

    Returns:
        As `logistic_probe`; the settings name C and the validation accuracy of all values.

    Raises:
        ValueError: As `logistic_probe`.
    """
    check_at_least("steps", steps, 0)
    check_at_least("max_iter", max_iter, 1)
    given = split(train, train_labels, test, test_labels)
    stay, out = held_out(given.train.labels, validation_share, seed)
    learned = Labeled(given.train.features[stay], given.train.labels[stay])
    held = Labeled(given.train.features[out], given.train.labels[out])
    tried: dict[float, float] = {}

    def score(c: float) -> float:
        if c not in tried:
            tried[c] = accuracy(_fit(learned, held.features, given.num_classes, c, False, max_iter), held.labels)
        return tried[c]

    best = max(SWEEP, key=score)
    left, right = np.log10(best) - 1, np.log10(best) + 1
    for _ in range(steps):
        middle = (left + right) / 2
        if score(float(10**left)) >= score(float(10**right)):
            right = middle
        else:
            left = middle
    best = max(tried, key=lambda c: (tried[c], -c))  # of equal ones the strongest penalty
    logits = _fit(given.train, given.test.features, given.num_classes, best, False, max_iter)
    settings: dict[str, Any] = {"c": best, "validation": {f"{c:.4g}": tried[c] for c in sorted(tried)}}
    return ProbeResult(accuracy(logits, given.test.labels), logits, given.test.labels, settings)


def logistic_head(
    train: Tensor, train_labels: Tensor, *, c: float = 0.1, standardize: bool = True, max_iter: int = 1000
) -> nn.Linear:
    """Return the logistic regression of `logistic_probe` as a linear layer, such as for attacks through the network.

    Args:
        train: Features ``(N, F)``, floating.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        c: Inverse of the penalty, > 0.
        standardize: Fit to standardized features; mean and standard deviation become a part of the layer.
        max_iter: Iterations at most, >= 1.

    Returns:
        A layer from features ``(B, F)`` to logits ``(B, C)``, float32, without gradient; a class without training rows
        has the logit -inf.

    Raises:
        ValueError: As `logistic_probe`.
    """
    check_positive("c", c)
    check_at_least("max_iter", max_iter, 1)
    given = split(train, train_labels, train, train_labels)
    model, scaler = _model(given.train, c, standardize, max_iter)
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    if scaler is not None:
        weight = weight / torch.from_numpy(scaler.scale_)
        bias = bias - weight @ torch.from_numpy(scaler.mean_)
    head = nn.Linear(train.shape[1], given.num_classes).requires_grad_(False)
    head.weight.zero_()
    head.bias.fill_(-torch.inf)
    classes = torch.from_numpy(model.classes_)
    head.weight[classes], head.bias[classes] = weight.float(), bias.float()
    return head.to(train.device)


def _fit(train: Labeled, test: Tensor, num_classes: int, c: float, standardize: bool, max_iter: int) -> Tensor:
    """Return the logits ``(M, C)`` of a model that is fitted to labeled rows."""
    model, scaler = _model(train, c, standardize, max_iter)
    queries = test.double().cpu().numpy()
    found: NDArray[np.float64] = model.decision_function(queries if scaler is None else scaler.transform(queries))
    if found.ndim == 1:
        found = np.stack([-found, found], 1) / 2
    logits = torch.full((len(test), num_classes), -torch.inf)
    logits[:, torch.from_numpy(model.classes_)] = torch.from_numpy(found).float()
    return logits


def _model(train: Labeled, c: float, standardize: bool, max_iter: int) -> tuple[Any, Any]:
    """Return scikit-learn's model that is fitted to labeled rows, and its scaler or None."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    model, scaler = LogisticRegression(C=c, max_iter=max_iter), None
    x = train.features.double().cpu().numpy()
    if standardize:
        scaler = StandardScaler().fit(x)
        x = scaler.transform(x)
    with threadpool_limits(1), warnings.catch_warnings():  # its threads and torch's slow each other down
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, train.labels.cpu().numpy())
    return model, scaler

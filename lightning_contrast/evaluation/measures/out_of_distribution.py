"""How well a score separates images of the training distribution from others."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_contrast._checks import check_interval, require


def ood_metrics(in_scores: Tensor, out_scores: Tensor, *, tpr: float = 0.95) -> dict[str, float]:
    """Compute the measures of out-of-distribution (OOD) detection; scikit-learn's curves.

    Two rates of false positives are in use, and they differ. Most papers call images of the training distribution
    positive: ``fpr95_id_positive`` is the share of OOD images accepted where 95 % of the others are. OpenOOD
    (https://arxiv.org/abs/2306.09301) calls OOD images positive: ``fpr_ood_positive`` is the share of images of the
    training distribution that is rejected where 95 % of the OOD images are.

    Args:
        in_scores: Scores of images of the training distribution, ``(N,)``; higher means more like it.
        out_scores: Scores of other images, ``(M,)``.
        tpr: Rate of true positives at which the rates of false ones are read, in (0, 1].

    Returns:
        ``auroc``; ``aupr_in`` and ``aupr_out``, areas under precision and recall by trapezoids; ``fpr_ood_positive``;
        and ``fpr95_id_positive``, named after ``tpr`` in percent. All in 0..1.

    Raises:
        ValueError: If one of the two is empty, not one-dimensional or not finite, or ``tpr`` is out of range.

    Example:
        >>> round(ood_metrics(torch.tensor([2.0, 3.0, 0.5]), torch.tensor([0.0, 1.0]))["auroc"], 3)
        0.833
    """
    from sklearn.metrics import auc, precision_recall_curve, roc_curve

    check_interval("tpr", tpr, "(0, 1]", "0.95 is usual")
    for name, given in (("in_scores", in_scores), ("out_scores", out_scores)):
        fits = given.ndim == 1 and len(given) > 0 and bool(torch.isfinite(given).all())
        require(fits, name, "be finite scores (N,), N >= 1", tuple(given.shape), "Give one score per image")
    scores = np.concatenate([in_scores.double().cpu().numpy(), out_scores.double().cpu().numpy()])
    inside = np.concatenate([np.ones(len(in_scores), dtype=int), np.zeros(len(out_scores), dtype=int)])

    def rate(positive: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[float, float]:
        false, true, _ = roc_curve(positive, values)
        return float(auc(false, true)), float(false[np.argmax(true >= tpr)])

    auroc, ood_positive = rate(1 - inside, -scores)
    found = {"auroc": auroc}
    for name, positive, values in (("aupr_in", inside, scores), ("aupr_out", 1 - inside, -scores)):
        precision, recall, _ = precision_recall_curve(positive, values)
        found[name] = float(auc(recall, precision))
    return found | {"fpr_ood_positive": ood_positive, f"fpr{100 * tpr:g}_id_positive": rate(inside, scores)[1]}

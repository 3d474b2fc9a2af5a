"""Clustering: k-means on the features, compared with the classes."""

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.evaluation.protocols.inputs import labeled
from lightning_contrast.seeding import derived_seed


def cluster_scores(
    features: Tensor, labels: Tensor, *, clusters: int | None = None, restarts: int = 10, seed: int = 0
) -> dict[str, float]:
    """Cluster L2-normalized features by k-means (scikit-learn), and compare the clusters with the classes.

    Args:
        features: ``(N, F)``, floating; L2-normalized here.
        labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        clusters: Number of clusters, 2 to N; None is the number of classes.
        restarts: Runs of k-means, >= 1; the one with the smallest distances counts.
        seed: Seed of k-means, >= 0.

    Returns:
        ``nmi``, the normalized mutual information, in 0..1; ``ari``, the adjusted Rand index, 0 for random clusters and
        1 at most; ``accuracy`` of the best one-to-one assignment of clusters to classes (Hungarian), in 0..1.

    Raises:
        ValueError: If a number is out of range, shapes do not match, or there is one class only.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from threadpoolctl import threadpool_limits

    known = labeled(features, labels)
    classes = known.labels.unique()  # type: ignore[no-untyped-call]
    require(len(classes) > 1, "labels", "hold two classes or more", classes.tolist(), "Clusters are compared with them")
    number = len(classes) if clusters is None else clusters
    check_at_least("clusters", number, 2)
    require(number <= len(known.labels), "clusters", f"be <= {len(known.labels)}", number, "Use more images")
    check_at_least("restarts", restarts, 1)
    truth = known.labels.cpu().numpy()
    with threadpool_limits(1):
        means = KMeans(number, n_init=restarts, random_state=derived_seed(seed, 5) % 2**32)
        found = means.fit_predict(F.normalize(known.features, dim=1).double().cpu().numpy())
    counts = np.zeros((number, int(truth.max()) + 1), dtype=np.int64)
    np.add.at(counts, (found, truth), 1)
    rows, columns = linear_sum_assignment(-counts)
    return {
        "nmi": float(normalized_mutual_info_score(truth, found)),
        "ari": float(adjusted_rand_score(truth, found)),
        "accuracy": float(counts[rows, columns].sum() / len(truth)),
    }

"""Evaluation of frozen features: k-NN, linear classification and retrieval."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.metrics import KNNAccuracy
from lightning_contrast.metrics.zero_shot import eval_mode


@torch.no_grad()
def encode(
    model: nn.Module, images: Tensor, preprocess: Callable[[Tensor], Tensor], *, batch_size: int = 512
) -> Tensor:
    """Return the features of images, computed in eval mode; the mode of every submodule is restored.

    Args:
        model: Module from images to features (B, F): a method, a backbone or any other module.
        images: Input of ``preprocess``, (N, C, H, W).
        preprocess: Maps a batch of images to the model's input: ``policy.eval_transform`` of its training views.
        batch_size: Images per forward pass, >= 1.

    Returns:
        Features (N, F), float32, on the CPU.
    """
    check_at_least("batch_size", batch_size, 1)
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else images.device
    with eval_mode(model):
        batches = torch.split(images, batch_size)
        return torch.cat([model(preprocess(batch.to(device))).float().cpu() for batch in batches])


def pixel_features(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return raw pixels as baseline features, centered at the mean of the training images.

    Args:
        train: Training images (N, C, H, W), uint8 or float.
        test: Test images (M, C, H, W), of the same dtype.

    Returns:
        Features (N, C H W) and (M, C H W).
    """
    train, test = train.flatten(1).float(), test.flatten(1).float()
    return train - train.mean(0), test - train.mean(0)


def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the accuracy of a k-NN vote with the weight exp(cosine / temperature) per neighbor.

    Args:
        bank: Reference features (N, F).
        bank_labels: Their classes (N,).
        queries: Features (M, F) to classify.
        labels: Their classes (M,).
        num_classes: Number of classes.
        k: Number of neighbors.
        temperature: Temperature of the vote, > 0.

    Returns:
        Top-1 accuracy in 0..1.
    """
    metric = KNNAccuracy(num_classes=num_classes, k=k, temperature=temperature)
    metric.update_bank(bank, bank_labels)
    metric.update(queries, labels)
    return float(metric.compute())


def linear_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, c: float = 0.1) -> float:
    """Return the accuracy of multinomial logistic regression on standardized features (scikit-learn, L-BFGS).

    Args:
        bank: Training features (N, F).
        bank_labels: Their classes (N,).
        queries: Features (M, F) to classify.
        labels: Their classes (M,).
        c: Inverse of the L2 penalty, > 0.

    Returns:
        Top-1 accuracy in 0..1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
    with threadpool_limits(1):  # its threads and torch's slow each other down in many small products
        classifier.fit(bank.numpy(), bank_labels.numpy())
        return float(classifier.score(queries.numpy(), labels.numpy()))


def recall_at_1(queries: Tensor, gallery: Tensor) -> float:
    """Return the share of queries whose nearest gallery row (cosine) is their counterpart.

    Args:
        queries: Features (N, F).
        gallery: Features (N, F); row i is the counterpart of query i.

    Returns:
        Recall at 1 in 0..1.
    """
    same = queries.shape == gallery.shape
    shapes = (tuple(queries.shape), tuple(gallery.shape))
    require(same, "gallery", "have one row per query", shapes, "Encode matching images for both")
    nearest = (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).argmax(dim=1)
    return float((nearest == torch.arange(len(queries))).float().mean())

"""Evaluation of frozen features: k-NN, linear classification and retrieval."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.contracts import split_batch
from lightning_contrast.metrics import KNNAccuracy
from lightning_contrast.metrics.zero_shot import eval_mode


@torch.no_grad()
def encode(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    preprocess: Callable[[Tensor], Tensor] | None = None,
    *,
    batch_size: int = 512,
) -> Tensor:
    """Return the features of images, computed in eval mode; the mode of every submodule is restored.

    Args:
        model: Module from images to features (B, F): a method, a backbone or any other module.
        images: Images (N, C, H, W), or a loader of batches that follow the batch contract, encoded in its order.
        preprocess: Maps a batch of images to the model's input: ``policy.eval_transform`` of its training views. None:
            the images are the input.
        batch_size: Images per forward pass, >= 1; a loader has its own.

    Returns:
        Features (N, F), float32, on the CPU.

    Raises:
        TypeError: If ``images`` is neither a tensor nor a loader, or one of its batches has no images.
        ValueError: If a batch holds views, or there are no images.
    """
    check_at_least("batch_size", batch_size, 1)
    if not isinstance(images, Iterable):
        fail("images", "be a tensor or a loader", type(images).__name__, "Give images (N, C, H, W)", TypeError)
    parameter = next(model.parameters(), None)
    features = []
    with eval_mode(model):
        for batch in torch.split(images, batch_size) if isinstance(images, Tensor) else images:
            given, _ = split_batch(batch)
            if not isinstance(given, Tensor):
                hint = "Give a loader without views, such as that of the validation"
                fail("images", "be one tensor per batch", f"{len(given)} views", hint)
            given = given.to(given.device if parameter is None else parameter.device)
            features.append(model(given if preprocess is None else preprocess(given)).float().cpu())
    require(len(features) > 0, "images", "hold at least one image", 0, "Check the loader")
    return torch.cat(features)


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

"""How good frozen features are: k-NN, a linear classifier, retrieval of a counterpart."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.metrics import KNNAccuracy


@torch.no_grad()
def encode(
    model: nn.Module, images: Tensor, preprocess: Callable[[Tensor], Tensor], *, batch_size: int = 512
) -> Tensor:
    """Return the features of images, in eval mode; every submodule's mode is put back afterwards.

    Args:
        model: Maps images to features (B, F): a method of ours, a backbone, any module.
        images: What ``preprocess`` takes, (N, C, H, W).
        preprocess: Maps a batch of images to the model's input: ``policy.eval_transform`` of its training views.
        batch_size: Images a pass.

    Returns:
        Features (N, F), float32, on the CPU.
    """
    check_at_least("batch_size", batch_size, 1)
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else images.device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        batches = torch.split(images, batch_size)
        return torch.cat([model(preprocess(batch.to(device))).float().cpu() for batch in batches])
    finally:
        for module, training in modes.items():
            module.training = training


def pixel_features(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return raw pixels as features, centred on the mean of the training images: the baseline of all baselines.

    Args:
        train: Training images (N, C, H, W), uint8 or float.
        test: Test images (M, C, H, W), of the same kind.

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
    """Return the accuracy of a weighted k-NN vote, each neighbour's weight exp(cosine / temperature).

    Args:
        bank: Features (N, F) that vote.
        bank_labels: Their classes (N,).
        queries: Features (M, F) to classify.
        labels: Their classes (M,).
        num_classes: Number of classes.
        k: Neighbours that vote.
        temperature: Of the vote, > 0.

    Returns:
        Top-1 accuracy in 0..1.
    """
    metric = KNNAccuracy(num_classes=num_classes, k=k, temperature=temperature)
    metric.update_bank(bank, bank_labels)
    metric.update(queries, labels)
    return float(metric.compute())


def linear_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, c: float = 0.1) -> float:
    """Return the accuracy of multinomial logistic regression on standardised features (scikit-learn, L-BFGS).

    Args:
        bank: Features (N, F) to fit on.
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

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
    classifier.fit(bank.numpy(), bank_labels.numpy())
    return float(classifier.score(queries.numpy(), labels.numpy()))


def recall_at_1(queries: Tensor, gallery: Tensor) -> float:
    """Return how often the gallery's nearest row (cosine) is the query's own counterpart.

    Args:
        queries: Features (N, F).
        gallery: Features (N, F); row i is the counterpart of query i.

    Returns:
        Share of the queries in 0..1.
    """
    same = queries.shape == gallery.shape
    shapes = (tuple(queries.shape), tuple(gallery.shape))
    require(same, "gallery", "have one row for each query", shapes, "Encode the same things for both")
    nearest = (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).argmax(dim=1)
    return float((nearest == torch.arange(len(queries))).float().mean())

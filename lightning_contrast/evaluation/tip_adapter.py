"""Few-shot classification of a frozen image-text model by a cache of labeled features: Tip-Adapter."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_not_negative, check_positive, fail, require
from lightning_contrast.precision import full_precision


@full_precision
def tip_adapter_logits(
    features: Tensor,
    cache_keys: Tensor,
    cache_labels: Tensor,
    class_weights: Tensor,
    *,
    weight: float,
    sharpness: float,
    logit_scale: float = 100.0,
) -> Tensor:
    """Compute the logits of Tip-Adapter: those of the zero-shot classifier, and a vote of labeled images.

    Implements Eq. 6 of Tip-Adapter (https://arxiv.org/abs/2111.03930) as its reference implementation:
    ``logit_scale f W + weight exp(-sharpness (1 - f keys')) one_hot(labels)``. There is no training. Choose ``weight``
    and ``sharpness`` on validation images: the reference implementation tries 0.1 to 3 and 0.1 to 7, from 1.17 and 1.
    All rows and columns are used as they are, as there: pass unit vectors. In the paper a key is the normalized mean of
    the features of ten augmented views of an image.

    Args:
        features: Image features to classify, unit rows ``(B, D)``.
        cache_keys: Features of the labeled images, unit rows ``(N, D)``.
        cache_labels: Their classes, ``(N,)`` integers in 0 .. C - 1.
        class_weights: Text features of the classes as columns, ``(D, C)``: the transpose of `zero_shot_weights`.
        weight: Weight of the vote, >= 0; 0 is the zero-shot classifier.
        sharpness: How much only the nearest images count, > 0.
        logit_scale: Factor of the zero-shot cosines, > 0; CLIP's is 100.

    Returns:
        ``(B, C)``.

    Raises:
        ValueError: If shapes do not match, or a number is out of range.
        TypeError: If the labels are not an integer tensor.
    """
    check_not_negative("weight", weight)
    check_positive("sharpness", sharpness)
    check_positive("logit_scale", logit_scale)
    width = features.shape[-1]
    for name, rows in (("features", features), ("cache_keys", cache_keys), ("class_weights", class_weights.mT)):
        shape, kind = tuple(rows.shape), "columns" if name == "class_weights" else "rows"
        ok = rows.ndim == 2 and rows.shape[1] == width
        require(ok, name, f"have {kind} of width {width}", shape, "Encode images and texts with one model")
    if cache_labels.is_floating_point():
        fail("cache_labels", "be an integer tensor", cache_labels.dtype, "Pass one class per key", TypeError)
    sizes = tuple(cache_labels.shape), len(cache_keys)
    require(cache_labels.shape == cache_keys.shape[:1], "cache_labels", "have one class per key", sizes, "Pass both")
    votes = F.one_hot(cache_labels.long(), class_weights.shape[1]).to(features.dtype)  # (N, C)
    nearness = (-sharpness * (1 - features @ cache_keys.T)).exp()  # (B, N)
    return logit_scale * features @ class_weights + weight * nearness @ votes


@full_precision
def fit_tip_adapter_keys(
    features: Tensor,
    labels: Tensor,
    cache_keys: Tensor,
    cache_labels: Tensor,
    class_weights: Tensor,
    *,
    weight: float,
    sharpness: float,
    logit_scale: float = 100.0,
    validation: tuple[Tensor, Tensor] | None = None,
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Train the keys of Tip-Adapter, from those of the cache: Tip-Adapter-F.

    As in Tip-Adapter (https://arxiv.org/abs/2111.03930) the keys alone are trained, with cross entropy, AdamW and a
    cosine to 0. Pass the result as ``cache_keys`` to `tip_adapter_logits`, and choose ``weight`` and
    ``sharpness`` again, on validation images; its rows are no unit vectors. Differs from the reference implementation:
    the epoch is that of the best validation accuracy or the last one, while there it is the best on the test set; the
    images are not augmented again in each epoch.

    Args:
        features: Image features to train on, unit rows ``(M, D)``; in the paper those of the cached images.
        labels: Their classes, ``(M,)`` integers in 0 .. C - 1.
        cache_keys: See `tip_adapter_logits`, as for the following arguments, ``(N, D)``.
        cache_labels: ``(N,)``.
        class_weights: ``(D, C)``.
        weight: Weight of the vote, > 0.
        sharpness: > 0.
        logit_scale: > 0.
        validation: Features ``(V, D)`` and classes ``(V,)`` of other images: the keys of the epoch with the best
            accuracy on them are returned, the earliest of equal ones, or the given keys if none is better. None
            returns those of the last epoch.
        epochs: Number of epochs, >= 1.
        batch_size: Images per step, >= 1.
        lr: Peak learning rate, > 0.
        seed: Seed of the order of the images; the global generators are not used.

    Returns:
        Keys ``(N, D)``, float32 or float64, without gradient.

    Raises:
        ValueError: If shapes do not match, or a number is out of range.
        TypeError: If labels are not integers.
    """
    check_positive("weight", weight)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_at_least(name, value, 1)
    check_positive("lr", lr)
    for name, rows, classes in (
        ("labels", features, labels),
        *([] if validation is None else [("validation", *validation)]),
    ):
        if classes.is_floating_point():
            fail(name, "hold integer classes", classes.dtype, "Pass one class per image", TypeError)
        require(len(rows) == len(classes) > 0, name, "have one class per image", (len(rows), len(classes)), "Pass both")

    def logits(images: Tensor, keys: Tensor) -> Tensor:
        """Return the scores (B, classes) of embeddings (B, D)."""
        options = {"weight": weight, "sharpness": sharpness, "logit_scale": logit_scale}
        return tip_adapter_logits(images, keys, cache_labels, class_weights, **options)

    def accuracy(keys: Tensor) -> float:
        return 0.0 if validation is None else float((logits(validation[0], keys).argmax(1) == validation[1]).sum())

    steps = -(-len(features) // batch_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        keys = cache_keys.detach().clone().requires_grad_()
        images, fixed = features.detach().clone(), labels.detach().clone().long()
        optimizer = torch.optim.AdamW([keys], lr=lr, eps=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        best, found = accuracy(keys.detach()), keys.detach().clone()
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).to(images.device).split(batch_size):  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
                F.cross_entropy(logits(images[rows], keys), fixed[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            reached = accuracy(keys.detach())
            if validation is None or reached > best:
                best, found = reached, keys.detach().clone()
    return found

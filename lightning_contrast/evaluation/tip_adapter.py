"""Few-shot classification of a frozen image-text model by a cache of labeled features: Tip-Adapter."""

import torch.nn.functional as F
from torch import Tensor

from lightning_contrast._checks import check_not_negative, check_positive, fail, require
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

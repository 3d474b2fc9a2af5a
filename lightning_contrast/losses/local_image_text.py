"""Losses of GLoRIA: images against texts, and words against the regions of an image that they attend to."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_positive, fail, require
from lightning_contrast.losses.checks import check_floating, check_groups, check_labels
from lightning_contrast.losses.image_text import clip_loss
from lightning_contrast.losses.labels import separate_unknown
from lightning_contrast.precision import full_precision

_EPSILON = 1e-8  # least product of the lengths in a cosine, as in the reference implementation
_CHUNK = 2**24
"""Largest number of elements of a tensor over pairs of images and texts, 64 MB in float32."""


def gloria_global_loss(
    image: Tensor, text: Tensor, *, logit_scale: float = 10.0, groups: Tensor | None = None
) -> Tensor:
    """Compute GLoRIA's global loss: the sum of the cross entropies from images to texts and from texts to images.

    Implements the global objective of GLoRIA (ICCV 2021, https://doi.org/10.1109/ICCV48922.2021.00391; reference
    implementation: marshuang80/gloria) over the batch of all ranks: twice `clip_loss`. Inputs are L2-normalized here.

    Args:
        image: Embeddings of the images, ``(B, D)``.
        text: Embeddings of their texts, ``(B, D)``.
        logit_scale: Multiplier of the cosine similarities, > 0.
        groups: See `clip_loss`.

    Returns:
        The sum of both means over the pairs of all ranks, a scalar in nats; ``2 ln B`` where all are alike.

    Raises:
        ValueError: If shapes differ, the batch is smaller than 2, or a number is out of range.
        TypeError: If the embeddings are not floating point.
    """
    return 2 * clip_loss(image, text, logit_scale=logit_scale, groups=groups)


@full_precision
def attend_regions(
    words: Tensor, regions: Tensor, *, attention_scale: float = 4.0, lengths: Tensor | None = None
) -> Tensor:
    """Return for each word the mean of the regions of its image, weighted by the word's attention.

    Equations 3 and 4 of GLoRIA; see `region_attention` for the weights.

    Args:
        words: Word vectors of the text of each image, ``(B, D, T)``.
        regions: Region vectors, ``(B, D, H, W)``.
        attention_scale: As in `region_attention`.
        lengths: As in `region_attention`.

    Returns:
        One region vector per word, ``(B, D, T)``.

    Raises:
        ValueError: If shapes do not fit or a number is out of range.
        TypeError: If words or regions are not floating point.
    """
    attention = region_attention(words, regions, attention_scale=attention_scale, lengths=lengths)
    attended: Tensor = torch.einsum("btr,bdr->bdt", attention.flatten(2), regions.flatten(2))
    return attended


@full_precision
def region_attention(
    words: Tensor, regions: Tensor, *, attention_scale: float = 4.0, lengths: Tensor | None = None
) -> Tensor:
    """Return the attention of words to the regions of their image, which is also the picture of a word in it.

    Dot products of regions and words, without scale; a softmax over the words of each region, by which words compete
    for regions; then a softmax over the regions of ``attention_scale`` times that.

    Args:
        words: Word vectors of the text of each image, ``(B, D, T)``.
        regions: Region vectors, ``(B, D, H, W)``.
        attention_scale: Multiplier of the shares before the second softmax, > 0.
        lengths: Number of words of each text, ``(B,)`` integers in 1..T: later ones do not compete; None: T.

    Returns:
        Weights that sum to 1 over the regions, ``(B, T, H, W)``; those of words beyond the length are uniform.

    Raises:
        ValueError: If shapes do not fit or a number is out of range.
        TypeError: If words or regions are not floating point.
    """
    _check_inputs(words, regions, lengths)
    check_positive("attention_scale", attention_scale)
    scores = torch.einsum("bdr,bdt->brt", regions.flatten(2), words)
    mask = None if lengths is None else _beyond(lengths, words.shape[2])[:, None]  # (B, 1, T)
    return _weights(scores, mask, attention_scale).reshape(*words.shape[::2], *regions.shape[2:])


@full_precision
def gloria_local_loss(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    *,
    attention_scale: float = 4.0,
    word_scale: float = 5.0,
    logit_scale: float = 10.0,
    groups: Tensor | None = None,
) -> Tensor:
    """Compute GLoRIA's local loss: every text is matched with every image by its words' attention to the regions.

    Implements the local objective of GLoRIA (reference implementation: marshuang80/gloria, ``agg="sum"``). With c_t the
    regions of image i that word w_t of text j attends to (`attend_regions`), the pair has the logit
    ``logit_scale * ln sum_t exp(word_scale * cos(w_t, c_t))``; the loss is the sum of the cross entropies of images
    against all texts, and of texts against all images. The sum over words favors long texts.

    Differs from it: the batch is that of all ranks. Pairs are computed in chunks of at most 64 MB, which backward
    computes again if there are several.

    Args:
        regions: Region vectors of the images, ``(B, D, H, W)``.
        words: Word vectors of their texts, ``(B, D, T)``; ranks may have different T.
        lengths: Number of words of each text, ``(B,)`` integers in 1..T; later ones are ignored.
        attention_scale: Multiplier in the attention, > 0.
        word_scale: Multiplier of the cosines of words and regions, > 0.
        logit_scale: Multiplier of the logits, > 0.
        groups: Group of each pair, ``(B,)`` integers: pairs of the same group are not negatives of each other; below
            0: in no group; None: every other pair is a negative.

    Returns:
        The sum of both means over the pairs of all ranks, a scalar in nats; ``2 ln B`` where all are alike.

    Raises:
        ValueError: If shapes do not fit, a length is not in 1..T (checked on the CPU only), the batch is smaller than
            2, or a number is out of range.
        TypeError: If words or regions are not floating point, or lengths or groups no integers.
    """
    _check_inputs(words, regions, lengths)
    for name, scale in (("attention_scale", attention_scale), ("word_scale", word_scale), ("logit_scale", logit_scale)):
        check_positive(name, scale)
    check_groups(groups, len(words))
    words, padding = _of_all_ranks(words, _beyond(lengths, words.shape[2]))  # (N, D, T), (N, T)
    check_batch("regions", len(words))

    def logits(part: Tensor) -> Tensor:
        return _logits(part, words, padding, attention_scale, word_scale)

    flat = regions.flatten(2)  # (B, D, R)
    largest = len(words) * words.shape[2] * max(flat.shape[1:])  # elements for each image
    parts = torch.split(flat, max(1, _CHUNK // largest))
    again = len(parts) > 1 and torch.is_grad_enabled()
    rows = [
        checkpoint(logits, part, use_reentrant=False, preserve_rng_state=False) if again else logits(part)
        for part in parts
    ]
    scores = logit_scale * distributed.gather_with_gradient(torch.cat(rows))  # (N, N): equal on every rank
    if groups is not None:
        ids = distributed.gather(separate_unknown(groups))
        same = (ids[:, None] == ids).fill_diagonal_(False)
        scores = scores.masked_fill(same, -torch.inf)
    match = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, match) + F.cross_entropy(scores.T, match)


def _logits(regions: Tensor, words: Tensor, padding: Tensor, attention_scale: float, word_scale: float) -> Tensor:
    """Return the logits (b, N) of images with regions (b, D, R) and texts with words (N, D, T), without their scale."""
    scores = torch.einsum("bdr,ndt->bnrt", regions, words)
    weights = _weights(scores, padding[None, :, None], attention_scale)  # (b, N, T, R)
    attended = torch.einsum("bntr,bdr->bntd", weights, regions)
    dots = torch.einsum("bntd,ndt->bnt", attended, words)
    lengths = attended.norm(dim=3) * words.norm(dim=1)  # (b, N, T)
    cosines = dots / lengths.clamp_min(_EPSILON)
    logits: Tensor = (word_scale * cosines).masked_fill(padding, -torch.inf).logsumexp(2)
    return logits


def _weights(scores: Tensor, mask: Tensor | None, attention_scale: float) -> Tensor:
    """Return the weights (..., T, R) of scores (..., R, T): words compete, then regions."""
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    weights: Tensor = (attention_scale * scores.softmax(-1)).softmax(-2)
    return weights.transpose(-1, -2)


def _beyond(lengths: Tensor, count: int) -> Tensor:
    """Return which of ``count`` words lie beyond the length of their text, (B, count) bool."""
    return torch.arange(count, device=lengths.device) >= lengths[:, None]


def _of_all_ranks(words: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Return the words (N, D, T) and their padding (N, T) of all ranks, padded to the largest T."""
    if not distributed.is_distributed():
        return words, padding
    longest = max(distributed.batch_sizes(words.shape[2], words.device))
    more = longest - words.shape[2]
    words, padding = F.pad(words, (0, more)), F.pad(padding, (0, more), value=True)
    return distributed.gather_with_gradient(words), distributed.gather(padding)


def _check_inputs(words: Tensor, regions: Tensor, lengths: Tensor | None) -> None:
    """Check words (B, D, T), regions (B, D, H, W) and lengths (B,)."""
    check_floating("words", words)
    check_floating("regions", regions)
    hint = "Give one vector per word, and a map of vectors of the same width per image"
    if words.ndim != 3:
        fail("words", "have shape (B, D, T)", tuple(words.shape), hint)
    if regions.ndim != 4 or regions.shape[:2] != words.shape[:2]:
        fail("regions", f"have shape ({words.shape[0]}, {words.shape[1]}, H, W)", tuple(regions.shape), hint)
    if lengths is None:
        return
    check_labels(lengths, len(words), "lengths")
    if lengths.device.type == "cpu" and len(lengths):  # elsewhere it would wait for the device
        low, high = int(lengths.min()), int(lengths.max())
        rule = f"lie in 1..{words.shape[2]}"
        require(low >= 1 and high <= words.shape[2], "lengths", rule, (low, high), "Count the words of each text")

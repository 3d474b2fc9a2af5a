"""The losses as in their papers: plain loops over anchors and pairs, in the dtype of the input."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def same(a: Sequence[int], i: int, b: Sequence[int], j: int) -> bool:
    """Return whether image ``i`` of ``a`` is of the class of image ``j`` of ``b``; one below 0 is of no other's."""
    return a[i] == b[j] and (a[i] >= 0 or (a is b and i == j))


def unit(x: Tensor) -> list[Tensor]:
    return [row / row.norm() for row in x]


def _log_sum_exp(terms: Sequence[Tensor]) -> Tensor:
    peak = max(float(term.detach()) for term in terms)
    return sum(((term - peak).exp() for term in terms), torch.zeros((), dtype=terms[0].dtype)).log() + peak


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0]) / len(terms)


def uniform(positive: Tensor, negatives: list[Tensor], t: Tensor) -> Tensor:
    return _log_sum_exp([positive / t, *(n / t for n in negatives)]) - positive / t


def decoupled(positive: Tensor, negatives: list[Tensor], t: Tensor) -> Tensor:
    return _log_sum_exp([n / t for n in negatives]) - positive / t


def hard(tau_plus: float, beta: float) -> Callable[..., Tensor]:
    def anchor(positive: Tensor, negatives: list[Tensor], t: Tensor) -> Tensor:
        count = len(negatives)
        terms = [(n / t).exp() for n in negatives]
        weights = [(beta * n / t).exp() for n in negatives]
        total = sum(w * e for w, e in zip(weights, terms, strict=True)) / (sum(weights) / count)
        corrected = (total - tau_plus * count * (positive / t).exp()) / (1 - tau_plus)
        floor = count * (-1 / t).exp()
        corrected = torch.maximum(corrected, floor)
        return -((positive / t).exp() / ((positive / t).exp() + corrected)).log()

    return anchor


def top_k(k: int) -> Callable[..., Tensor]:
    def anchor(positive: Tensor, negatives: list[Tensor], t: Tensor) -> Tensor:
        return uniform(positive, sorted(negatives, key=lambda n: float(n.detach()), reverse=True)[:k], t)

    return anchor


def heated(heat: float) -> Callable[..., Tensor]:
    def anchor(positive: Tensor, negatives: list[Tensor], t: Tensor) -> Tensor:
        terms = [n / (t * (1 - heat * (1 + n) / 2)) for n in negatives]
        return _log_sum_exp([positive / t, *terms]) - positive / t

    return anchor


Anchor = Callable[..., Tensor]


def nt_xent(
    z_a: Tensor, z_b: Tensor, t: Tensor, anchor: Anchor = uniform, groups: Sequence[int] | None = None
) -> Tensor:
    z, n = unit(z_a) + unit(z_b), len(z_a)
    group = list(groups if groups is not None else range(n))
    losses = []
    for i in range(2 * n):
        negatives = [z[i] @ z[j] for j in range(2 * n) if not same(group, j % n, group, i % n)]
        losses.append(anchor(z[i] @ z[(i + n) % (2 * n)], negatives, t))
    return _mean(losses)


def decoupled_weighted(z_a: Tensor, z_b: Tensor, t: Tensor, sigma: float) -> Tensor:
    a, b = unit(z_a), unit(z_b)
    exponentials = [math.exp(float((x @ y).detach()) / sigma) for x, y in zip(a, b, strict=True)]
    weights = [2 - len(a) * e / sum(exponentials) for e in exponentials]
    corrections = [(1 - w) * (x @ y) / t for w, x, y in zip(weights, a, b, strict=True)]
    return nt_xent(z_a, z_b, t, decoupled) + _mean(corrections)


def bilinear(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    losses = []
    for i in range(len(query)):
        logits = [sum(q * weight[a, b] * k for a, q in enumerate(query[i]) for b, k in enumerate(row)) for row in key]
        losses.append(torch.stack(logits).logsumexp(0) - logits[i])
    return _mean(losses)


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    t: Tensor,
    anchor: Anchor = uniform,
    mask: Sequence[bool] | None = None,
    groups: tuple[Sequence[int], Sequence[int]] | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    q, k = unit(query), unit(key)
    losses = []
    for i in range(len(q)):
        if negatives is None:
            alike = same if groups is not None else (lambda _a, j, _b, i: j == i)
            own = [] if groups is None else groups[0]
            chosen = [k[j] for j in range(len(k)) if not alike(own, j, own, i)]
        else:
            bank = unit(negatives)
            chosen = [
                bank[j]
                for j in range(len(bank))
                if (mask is None or mask[j]) and (groups is None or not same(groups[0], i, groups[1], j))
            ]
        if extra is not None:
            chosen += unit(extra[i])
        losses.append(anchor(q[i] @ k[i], [q[i] @ c for c in chosen], t))
    return _mean(losses)


def sup_con(views: Sequence[Tensor], labels: Sequence[int], t: Tensor) -> Tensor:
    z, n = [row for view in views for row in unit(view)], len(labels)
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        normalizer = _log_sum_exp([z[i] @ z[j] / t for j in others])
        terms = [normalizer - z[i] @ z[p] / t for p in others if same(labels, p % n, labels, i % n)]
        losses.append(_mean(terms) if terms else 0 * normalizer)
    return _mean(losses)


def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return (info_nce(image, text, None, 1 / scale) + info_nce(text, image, None, 1 / scale)) / 2


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    x, y = unit(image), unit(text)
    total = torch.zeros((), dtype=image.dtype)
    for i in range(len(x)):
        for j in range(len(y)):
            logit = scale * (x[i] @ y[j]) + bias
            sign = 1 if i == j else -1
            total = total + torch.log1p((-sign * logit).exp())
    return total / len(x)


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return -_mean([p @ t for p, t in zip(unit(prediction), unit(target.detach()), strict=True)])


def moco_v3(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, t: Tensor) -> Tensor:
    return 2 * t * (info_nce(q1, k2.detach(), None, t) + info_nce(q2, k1.detach(), None, t))


def alignment(z_a: Tensor, z_b: Tensor, alpha: float = 2.0) -> Tensor:
    return _mean([(a - b).norm() ** alpha for a, b in zip(unit(z_a), unit(z_b), strict=True)])


def uniformity(z: Tensor, t: float = 2.0) -> Tensor:
    rows = unit(z)
    terms = [(-t * (rows[i] - rows[j]).square().sum()).exp() for i in range(len(rows)) for j in range(i)]
    return _mean(terms).log()


def spectral(z_a: Tensor, z_b: Tensor, mu: float) -> Tensor:
    a, b = (
        [row / row.norm() * math.sqrt(mu) if float(row.detach().norm()) > math.sqrt(mu) else row for row in z]
        for z in (z_a, z_b)
    )
    n = len(a)
    pull = _mean([a[i] @ b[i] for i in range(n)])
    push = _mean([(a[i] @ b[j]) ** 2 for i in range(n) for j in range(n) if i != j])
    return (-2 * pull + push) / mu


def triplet(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    losses = []
    for a, p, n in zip(unit(anchor), unit(positive), unit(negative), strict=True):
        losses.append(((a - p).square().sum() - (a - n).square().sum() + margin).clamp_min(0))
    return _mean(losses)


def margin_contrastive(z_a: Tensor, z_b: Tensor, same: Sequence[bool], margin: float) -> Tensor:
    losses = []
    for a, b, s in zip(z_a, z_b, same, strict=True):
        distance = (a - b).norm()
        losses.append(0.5 * distance**2 if s else 0.5 * (margin - distance).clamp_min(0) ** 2)
    return _mean(losses)

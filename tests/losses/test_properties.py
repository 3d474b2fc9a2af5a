"""Random shapes, dtypes, temperatures and tile sizes against the dense formula."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_contrast import losses
from tests.losses.cases import value_and_gradients
from tests.tolerances import CANCELLING, FORMULA, f32, f64

ROWS, DIMS = st.integers(2, 23), st.integers(1, 9)
TILES, TEMPERATURES = st.sampled_from([None, 1, 2, 5, 16]), st.floats(0.02, 5.0)
DTYPES = st.sampled_from([torch.float32, torch.float64])
SEEDS = st.integers(0, 2**16)


def _normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _check(loss, dense, tensors: list[Tensor], temperature: float = 1.0) -> None:
    found = value_and_gradients(loss, tensors)
    expected = value_and_gradients(dense, [t.double() for t in tensors])
    exact = tensors[0].dtype == torch.float64
    for mine, theirs in zip(found, expected, strict=True):
        # One-dimensional rows are +1 or -1, so their gradient is rounding only, scaled by 1 / T.
        size = 1 + float(theirs.abs().max()) + 1 / temperature**2
        close = f64(CANCELLING, size=size) if exact else f32(FORMULA, size=size)
        torch.testing.assert_close(mine.double(), theirs, **close)


def _dense_nt_xent(a: Tensor, b: Tensor, t: float) -> Tensor:
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / t).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


def _dense_rows(q: Tensor, k: Tensor, t: float) -> Tensor:
    return F.cross_entropy(F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / t, torch.arange(len(q)))


@settings(deadline=None, max_examples=30)
@given(ROWS, DIMS, TILES, TEMPERATURES, DTYPES, SEEDS)
def test_nt_xent(rows, dim, tile, temperature, dtype, seed) -> None:
    tensors = [_normal(seed + i, rows, dim, dtype=dtype) for i in range(2)]
    _check(
        lambda a, b: losses.nt_xent(a, b, temperature=temperature, tile_size=tile),
        lambda a, b: _dense_nt_xent(a, b, temperature),
        tensors,
        temperature,
    )


@settings(deadline=None, max_examples=30)
@given(ROWS, ROWS, DIMS, TILES, TEMPERATURES, DTYPES, SEEDS, st.booleans())
def test_info_nce(rows, count, dim, tile, temperature, dtype, seed, masked) -> None:
    q, k = (_normal(seed + i, rows, dim, dtype=dtype) for i in range(2))
    queue = _normal(seed + 2, count, dim, dtype=dtype)
    mask = _normal(seed + 3, count, dtype=dtype) > 0 if masked else None

    def dense(q: Tensor, k: Tensor, n: Tensor) -> Tensor:
        q, k, n = (F.normalize(x, dim=1) for x in (q, k, n))
        far = q @ n.T if mask is None else (q @ n.T).masked_fill(~mask, -math.inf)
        logits = torch.cat([(q * k).sum(1, keepdim=True), far], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    _check(
        lambda q, k, n: losses.info_nce(q, k, n, temperature=temperature, negatives_mask=mask, tile_size=tile),
        dense,
        [q, k, queue],
        temperature,
    )
    _check(
        lambda q, k: losses.info_nce(q, k, temperature=temperature, tile_size=tile),
        lambda q, k: _dense_rows(q, k, temperature),
        [q, k],
        temperature,
    )


@settings(deadline=None, max_examples=30)
@given(ROWS, DIMS, TILES, TEMPERATURES, DTYPES, SEEDS, st.integers(1, 5))
def test_sup_con(rows, dim, tile, temperature, dtype, seed, classes) -> None:
    tensors = [_normal(seed + i, rows, dim, dtype=dtype) for i in range(2)]
    labels = torch.randint(-2, classes, (rows,), generator=torch.Generator().manual_seed(seed))

    def dense(a: Tensor, b: Tensor) -> Tensor:
        known = torch.where(labels < 0, -1 - torch.arange(rows), labels)  # an unknown image is a class of its own
        z, label = F.normalize(torch.cat([a, b]), dim=1), known.repeat(2)
        me = torch.eye(len(z), dtype=torch.bool)
        positive = (label[:, None] == label) & ~me
        log_share = (z @ z.T / temperature).masked_fill(me, -math.inf).log_softmax(1)
        return -(log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()

    _check(
        lambda a, b: losses.sup_con(a, b, labels, temperature=temperature, tile_size=tile), dense, tensors, temperature
    )


@settings(deadline=None, max_examples=30)
@given(ROWS, DIMS, TILES, TEMPERATURES, DTYPES, SEEDS, st.floats(-12, 3))
def test_clip_and_siglip(rows, dim, tile, temperature, dtype, seed, bias) -> None:
    tensors = [_normal(seed + i, rows, dim, dtype=dtype) for i in range(2)]
    scale, offset = torch.tensor([1 / temperature], dtype=dtype), torch.tensor(bias, dtype=dtype)

    def dense_clip(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        logits = s * (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T)
        target = torch.arange(len(a))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def dense_siglip(a: Tensor, b: Tensor, s: Tensor, c: Tensor) -> Tensor:
        logits = s * (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T) + c
        sign = 2 * torch.eye(len(a), dtype=a.dtype) - 1
        return -F.logsigmoid(sign * logits).sum() / len(a)

    _check(
        lambda a, b, s: losses.clip_loss(a, b, logit_scale=s, tile_size=tile),
        dense_clip,
        [*tensors, scale],
        temperature,
    )
    _check(
        lambda a, b, s, c: losses.siglip_loss(a, b, logit_scale=s, logit_bias=c, tile_size=tile),
        dense_siglip,
        [*tensors, scale, offset],
        temperature / rows,
    )


@settings(deadline=None, max_examples=40)
@given(ROWS, DIMS, TILES, DTYPES, SEEDS, st.floats(0.1, 5.0))
def test_distances(rows, dim, tile, dtype, seed, mu) -> None:
    a, b, c = (_normal(seed + i, rows, dim, dtype=dtype) for i in range(3))

    def dense_uniformity(z: Tensor) -> Tensor:
        return F.pdist(F.normalize(z, dim=1)).square().mul(-mu).exp().mean().log()

    def dense_spectral(a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.normalize(z, dim=1) * z.norm(dim=1, keepdim=True).clamp(max=mu**0.5) for z in (a, b))
        inner = a @ b.T
        away = inner.square().masked_fill(torch.eye(len(a), dtype=torch.bool), 0).sum() / (len(a) * (len(a) - 1))
        return (away - 2 * inner.diag().mean()) / mu

    def dense_triplet(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a, b, c = (F.normalize(z, dim=1) for z in (a, b, c))
        return ((a - b).square().sum(1) - (a - c).square().sum(1) + mu).relu().mean()

    _check(lambda a, b: losses.spectral_contrastive_loss(a, b, mu=mu), dense_spectral, [a, b])
    _check(lambda *x: losses.triplet_loss(*x, margin=mu), dense_triplet, [a, b, c])
    _check(lambda a, b: losses.byol_loss(a, b.detach()) + 0 * b.sum(), lambda a, b: _dense_byol(a, b), [a, b])
    if dim > 1:  # on a line all distances are 0 or 2, where the slope of the peer's root is not defined
        _check(lambda z: losses.uniformity(z, t=mu, tile_size=tile), dense_uniformity, [a])


def _dense_byol(prediction: Tensor, target: Tensor) -> Tensor:
    target = target.detach() + 0 * target
    return 2 - 2 * F.cosine_similarity(prediction, target.detach()).mean() + 0 * target.sum()

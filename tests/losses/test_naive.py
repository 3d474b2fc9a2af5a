"""The tiled losses against the naive forms of their formulas, with values and gradients in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import losses
from lightning_contrast.losses import Negatives, contrastive, geometric, image_text, redundancy
from lightning_contrast.losses.kernels.normalization import normalize_rows
from lightning_contrast.losses.negatives import naive_anchor_losses
from tests.losses.cases import value_and_gradients
from tests.tolerances import CANCELLING, f64

ROWS, DIM, TILE = 9, 6, 4
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 5, 2])


def normal(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, QUEUE = normal(ROWS, 0), normal(ROWS, 1), normal(7, 2)
SCALE, BIAS = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
TEMPERATURE = torch.tensor(0.2, dtype=torch.float64)  # a learned one: logits without a known bound

PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
    "nt_xent": (
        partial(losses.nt_xent, temperature=0.1, tile_size=TILE),
        partial(contrastive.naive_nt_xent, temperature=0.1),
        [A, B],
    ),
    "nt_xent, learned": (
        lambda a, b, t: losses.nt_xent(a, b, temperature=t, tile_size=TILE),
        lambda a, b, t: contrastive.naive_nt_xent(a, b, temperature=t),
        [A, B, TEMPERATURE],
    ),
    "info_nce": (
        partial(losses.info_nce, temperature=0.1, tile_size=TILE),
        partial(contrastive.naive_info_nce, temperature=0.1),
        [A, B],
    ),
    "info_nce, queue": (
        lambda q, k, n, t: losses.info_nce(q, k, n, temperature=t, tile_size=TILE),
        lambda q, k, n, t: contrastive.naive_info_nce(q, k, n, temperature=t),
        [A, B, QUEUE, TEMPERATURE],
    ),
    "sup_con": (
        lambda a, b: losses.sup_con(a, b, LABELS, temperature=0.1, tile_size=TILE),
        lambda a, b: contrastive.naive_sup_con(a, b, LABELS, temperature=0.1),
        [A, B],
    ),
    "clip": (
        lambda a, b, s: losses.clip_loss(a, b, logit_scale=s, tile_size=TILE),
        lambda a, b, s: image_text.naive_clip_loss(a, b, logit_scale=s),
        [A, B, SCALE],
    ),
    "siglip": (
        lambda a, b, s, c: losses.siglip_loss(a, b, logit_scale=s, logit_bias=c, tile_size=TILE),
        lambda a, b, s, c: image_text.naive_siglip_loss(a, b, logit_scale=s, logit_bias=c),
        [A, B, SCALE, BIAS],
    ),
    "uniformity": (partial(losses.uniformity, t=3.0, tile_size=TILE), partial(geometric.naive_uniformity, t=3.0), [A]),
    "spectral": (
        partial(losses.spectral_contrastive_loss, mu=5.0),
        partial(geometric.naive_spectral_contrastive_loss, mu=5.0),
        [A, B],
    ),
    "barlow twins": (
        partial(losses.barlow_twins_loss, off_diagonal_weight=0.01),
        partial(redundancy.naive_barlow_twins_loss, off_diagonal_weight=0.01),
        [A, B],
    ),
    "barlow twins, wide": (  # fewer rows than dimensions
        partial(losses.barlow_twins_loss, off_diagonal_weight=0.01),
        partial(redundancy.naive_barlow_twins_loss, off_diagonal_weight=0.01),
        [A[:4], B[:4]],
    ),
    "vicreg": (
        partial(losses.vicreg_loss, variance_weight=20.0, covariance_weight=3.0),
        partial(redundancy.naive_vicreg_loss, variance_weight=20.0, covariance_weight=3.0),
        [A, B],
    ),
    "vicreg, epsilon": (
        partial(losses.vicreg_loss, epsilon=0.3),
        partial(redundancy.naive_vicreg_loss, epsilon=0.3),
        [0.1 * A, 0.1 * B],
    ),
    "log det": (losses.log_det_loss, redundancy.naive_log_det_loss, [A]),
    "log det, wide": (
        partial(losses.log_det_loss, distortion=0.1),
        partial(redundancy.naive_log_det_loss, distortion=0.1),
        [A[:4]],
    ),
    "vicreg, wide": (losses.vicreg_loss, redundancy.naive_vicreg_loss, [A[:4], B[:4]]),
}


def assert_same(fast: Callable[..., Tensor], naive: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    for found, expected in zip(value_and_gradients(fast, tensors), value_and_gradients(naive, tensors), strict=True):
        torch.testing.assert_close(found, expected, **f64(CANCELLING))


@pytest.mark.parametrize("name", PAIRS)
def test_fast_form_equals_naive_form(name: str) -> None:
    assert_same(*PAIRS[name])


WEIGHTINGS = [
    Negatives("uniform"),
    Negatives("debiased", tau_plus=0.02),
    Negatives("hard", tau_plus=0.02, beta=0.7),
    Negatives("decoupled"),
    Negatives("decoupled_weighted", sigma=0.4),
    Negatives("top_k", k=3),
    Negatives("heated", heat=0.6),
]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda weighting: weighting.kind)
def test_weighted_nt_xent_equals_naive_form(weighting: Negatives) -> None:
    def naive(a: Tensor, b: Tensor) -> Tensor:
        z = F.normalize(torch.cat([a, b]), dim=1)
        image = torch.arange(ROWS).repeat(2)
        other = image[:, None] != image  # (2N, 2N)
        negatives = (z @ z.T)[other].view(2 * ROWS, -1)
        positive = (z * z.roll(ROWS, 0)).sum(1)
        return naive_anchor_losses(positive, negatives, temperature=0.4, weighting=weighting).mean()

    assert_same(partial(losses.nt_xent, temperature=0.4, weighting=weighting, tile_size=TILE), naive, [A, B])


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda weighting: weighting.kind)
def test_weighted_queue_equals_naive_form(weighting: Negatives) -> None:
    def naive(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        query, key, queue = (F.normalize(x, dim=1) for x in (query, key, queue))
        positive = (query * key).sum(1)
        return naive_anchor_losses(positive, query @ queue.T, temperature=0.4, weighting=weighting).mean()

    fast = partial(losses.info_nce, temperature=0.4, weighting=weighting, tile_size=TILE)
    assert_same(fast, naive, [A, B, QUEUE])


def test_debiasing_is_clamped_in_both_forms() -> None:
    weighting = Negatives("debiased", tau_plus=0.9)
    found = losses.nt_xent(A, A + 0.01 * B, temperature=0.2, weighting=weighting)
    z = F.normalize(torch.cat([A, A + 0.01 * B]), dim=1)
    image = torch.arange(ROWS).repeat(2)
    negatives = (z @ z.T)[image[:, None] != image].view(2 * ROWS, -1)
    positive = (z * z.roll(ROWS, 0)).sum(1)
    expected = naive_anchor_losses(positive, negatives, temperature=0.2, weighting=weighting)
    torch.testing.assert_close(found, expected.mean(), **f64(CANCELLING))
    floor = torch.tensor(2 * ROWS - 2).double().log() - 5
    torch.testing.assert_close(expected, torch.logaddexp(5 * positive, floor) - 5 * positive, **f64(CANCELLING))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 599.0), (torch.float32, 59.0)])
def test_negatives_opposite_to_the_query(dtype: torch.dtype, scale: float) -> None:
    """The smallest bounded log-sum-exp, about minus the scale, whose exponential is not clamped."""

    def naive(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        query, key, queue = (F.normalize(x, dim=1) for x in (query, key, queue))
        similarities = (query * key).sum(1), query @ queue.T
        return naive_anchor_losses(*similarities, temperature=1 / scale, weighting="decoupled").mean()

    query = A[:1].repeat(4, 1) + 1e-3 * B[:4]
    tensors = [query.to(dtype), B[:4].to(dtype), (-A[:1] + 1e-3 * QUEUE).to(dtype)]
    found = value_and_gradients(partial(losses.info_nce, temperature=1 / scale, weighting="decoupled"), tensors)
    expected = value_and_gradients(naive, tensors)
    for mine, theirs in zip(found, expected, strict=True):
        bound = f64(CANCELLING) if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(mine, theirs, **bound)


@pytest.mark.parametrize("size", [1.0, 1e3, 3e-13, 1e-20])  # the last two are below the epsilon
def test_normalization_of_the_tiled_losses_equals_torch(size: float) -> None:
    x, weights = size * A.float(), B.float()
    x[0] = 0
    found = value_and_gradients(lambda x: (normalize_rows(x) * weights).sum(), [x])
    expected = value_and_gradients(lambda x: (F.normalize(x, dim=1) * weights).sum(), [x])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_sup_con_takes_views_in_one_tensor_and_labels_by_name() -> None:
    views = [A, B, A + B]
    expected = losses.sup_con(*views, LABELS, temperature=0.1)
    torch.testing.assert_close(losses.sup_con(torch.stack(views, dim=1), LABELS, temperature=0.1), expected)
    torch.testing.assert_close(losses.sup_con(*views, labels=LABELS, temperature=0.1), expected)
    with pytest.raises(TypeError, match=r"`labels` must be given, got 'None'\. Pass the class of each image"):
        losses.sup_con(A, temperature=0.1)
    with pytest.raises(ValueError, match="`embeddings` must have at least one view, got 0"):
        losses.sup_con(labels=LABELS, temperature=0.1)
    with pytest.raises(TypeError, match="`labels` must be an integer tensor"):
        losses.sup_con(A, B, temperature=0.1)


def test_epsilon_of_vicreg_is_checked() -> None:
    with pytest.raises(ValueError, match="`epsilon` must be > 0, got 0"):
        losses.vicreg_loss(A, B, epsilon=0.0)

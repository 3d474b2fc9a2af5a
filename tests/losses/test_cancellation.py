"""Losses that are small, of embeddings that are separated already: no difference of large numbers may drown them.

The same inputs in float64 are the oracle. A bound is a number of roundings of the largest logit, 1 / temperature.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import losses
from lightning_contrast.losses import Negatives
from lightning_contrast.losses.mining import mine
from tests.losses.cases import value_and_gradients
from tests.tolerances import FORMULA, ROUNDED, bound

ROWS, DIM = 32, 64
LABELS = torch.arange(ROWS)

LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "nt_xent": lambda a, b, t: losses.nt_xent(a, b, temperature=t),
    "nt_xent, learned": lambda a, b, t: losses.nt_xent(a, b, temperature=a.new_tensor(t)),
    "nt_xent, tiles": lambda a, b, t: losses.nt_xent(a, b, temperature=t, tile_size=7),
    "nt_xent, groups": lambda a, b, t: losses.nt_xent(a, b, temperature=t, groups=LABELS // 2),
    "nt_xent, top_k": lambda a, b, t: losses.nt_xent(a, b, temperature=t, weighting=Negatives("top_k", k=5)),
    "nt_xent, heated": lambda a, b, t: losses.nt_xent(a, b, temperature=t, weighting=Negatives("heated", heat=0.1)),
    "nt_xent, debiased": lambda a, b, t: losses.debiased_nt_xent(a, b, temperature=t, tau_plus=0.01),
    "info_nce": lambda a, b, t: losses.info_nce(a, b, temperature=t),
    "info_nce, queue": lambda a, b, t: losses.info_nce(a[:8], b[:8], b[8:], temperature=t),
    "info_nce, extra": lambda a, b, t: losses.info_nce(
        a[:8], b[:8], b[8:20], temperature=t, extra_negatives=b[20:28].expand(8, 8, DIM)
    ),
    "moco_v3": lambda a, b, t: losses.moco_v3_loss(a, b, a, b, temperature=t),
    "clip": lambda a, b, t: losses.clip_loss(a, b, logit_scale=1 / t),
    "clip, groups": lambda a, b, t: losses.clip_loss(a, b, logit_scale=1 / t, groups=LABELS // 2),
    "sup_con": lambda a, b, t: losses.sup_con(a, b, LABELS, temperature=t),
    "sup_con, one view": lambda a, b, t: losses.sup_con(torch.cat([a, b]), LABELS.repeat(2), temperature=t),
    "siglip": lambda a, b, t: losses.siglip_loss(a, b, logit_scale=1 / t, logit_bias=-0.5 / t),
}


def separated(noise: float, seed: int = 0) -> list[Tensor]:
    """Return two noisy copies of orthonormal rows, ``(ROWS, DIM)`` each."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0][:ROWS]
    return [rows + noise * torch.randn(ROWS, DIM, generator=generator) for _ in range(2)]


@pytest.mark.parametrize(("temperature", "noise"), [(0.1, 0.02), (0.07, 0.02), (0.03, 0.08), (0.01, 0.12)])
@pytest.mark.parametrize("name", LOSSES)
def test_small_losses_and_their_gradients_keep_their_digits(name: str, temperature: float, noise: float) -> None:
    inputs = separated(noise)
    narrow = value_and_gradients(lambda a, b: LOSSES[name](a, b, temperature), inputs)
    wide = value_and_gradients(lambda a, b: LOSSES[name](a, b, temperature), [x.double() for x in inputs])
    share = bound(ROUNDED) * (1 + 1 / temperature)
    assert 0 < float(wide[0]) < 20
    if float(wide[0]) < torch.finfo(torch.float32).tiny:  # debiasing at a low temperature leaves no negatives
        assert 0 <= float(narrow[0]) < torch.finfo(torch.float32).tiny
        return
    assert abs(float(narrow[0]) / float(wide[0]) - 1) < share
    for found, expected in zip(narrow[1:], wide[1:], strict=True):
        if expected is not None:
            assert float((found - expected).norm() / expected.norm()) < share


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_negative(name: str) -> None:
    for seed in range(5):
        for noise in (0.0, 0.02):
            assert float(LOSSES[name](*separated(noise, seed), 0.01)) >= 0


def test_a_separated_class_of_several_images_has_the_loss_of_its_positives() -> None:
    """Two positives more than one: the loss is log 3 and not small, to the same digits."""
    a, _ = separated(0.0)
    rows = a[LABELS // 2]
    found = losses.sup_con(rows, rows, LABELS // 2, temperature=0.05)
    assert float(found) == pytest.approx(float(torch.tensor(3.0).log()), rel=bound(ROUNDED) * 20)


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_byol_of_similar_rows(distance: float) -> None:
    a, b = separated(distance)
    share = bound(ROUNDED) / (8 * distance)  # elements of size 1/8 are rounded, their differences are compared
    wide = value_and_gradients(lambda p, t: 2 + 2 * losses.negative_cosine(p, t), [a.double(), b.double()])
    narrow = value_and_gradients(losses.byol_loss, [a, b])
    assert float(narrow[0]) == pytest.approx(float(wide[0]), rel=share)
    assert float((narrow[1] - wide[1]).norm() / wide[1].norm()) < share
    assert float(losses.byol_loss(a, 3 * a)) >= 0


@pytest.mark.parametrize("rows", [8, 64])
def test_decorrelated_dimensions_have_no_off_diagonal_loss(rows: int) -> None:
    signs = torch.ones(1, 1)
    while len(signs) < rows:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    columns = 3.3 * signs[:, 1:8]  # orthogonal, with mean 0
    weights = {"invariance_weight": 0.0, "variance_weight": 0.0}
    assert 0 <= float(losses.vicreg_loss(columns, columns, **weights)) < bound(FORMULA) ** 2
    without, heavy = (losses.barlow_twins_loss(columns, columns, off_diagonal_weight=w) for w in (0.0, 1e4))
    assert float(heavy - without) >= 0
    assert float(heavy - without) < 1e4 * bound(FORMULA) ** 2


def test_the_entropy_term_of_msn_near_its_minimum() -> None:
    """Anchors spread evenly over orthogonal prototypes, up to a small shift: log K minus the entropy is 7e-7."""
    prototypes = torch.eye(16)
    anchors = prototypes + 0.01 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))

    def term(dtype: torch.dtype) -> float:
        options = {"temperature": 0.2, "target_sharpen_temperature": 0.25, "sinkhorn": False}
        values = [
            losses.msn_loss(*(x.to(dtype) for x in (anchors, anchors, prototypes)), me_max_weight=w, **options)
            for w in (0.0, 1e6)
        ]
        return float(values[1].double() - values[0].double()) / 1e6

    assert 0 < term(torch.float64) < bound(ROUNDED)
    assert term(torch.float32) == pytest.approx(term(torch.float64), rel=0, abs=bound(1))


def test_mining_far_from_the_origin() -> None:
    """The distances of unnormalized embeddings with a large mean are those of the embeddings without it."""
    anchors, candidates = (F.normalize(x, dim=1) for x in separated(0.1))
    own = torch.arange(ROWS)
    same = own[:, None] // 4 == own // 4
    expected = mine(anchors, candidates, same, own, miner="hardest")
    found = mine(anchors + 1000, candidates + 1000, same, own, miner="hardest")
    exact = mine((anchors + 1000).double(), (candidates + 1000).double(), same, own, miner="hardest")
    for shifted, right, wide in zip(found, expected, exact, strict=True):
        assert torch.equal(shifted, wide)
        assert float((wide == right).float().mean()) > 0.8  # the shift itself rounds the embeddings

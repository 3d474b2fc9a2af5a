"""Weighting of negatives: masks, groups, synthetic negatives, and limits in which two weightings are equal."""

import pytest
import torch

from lightning_contrast import losses
from lightning_contrast.losses import Negatives
from lightning_contrast.losses.negatives import KINDS
from tests.losses import oracles
from tests.losses.cases import value_and_gradients
from tests.tolerances import CANCELLING, f64

WEIGHTINGS = {kind: Negatives(kind, tau_plus=0.02, k=2) for kind in KINDS}
ANCHORS = {
    "uniform": oracles.uniform,
    "debiased": oracles.hard(0.02, 0.0),
    "hard": oracles.hard(0.02, 1.0),
    "decoupled": oracles.decoupled,
    "top_k": oracles.top_k(2),
    "heated": oracles.heated(0.5),
}


def _rows(count: int, seed: int = 0, dim: int = 5) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _assert_same(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **f64(CANCELLING))


@pytest.mark.parametrize("kind", ANCHORS)
def test_masked_rows_of_a_queue_do_not_exist(kind: str) -> None:
    mask = torch.tensor([True, False, True, True, False, False, True, False])
    t = torch.tensor(0.4, dtype=torch.float64)

    def loss(q: torch.Tensor, k: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return losses.info_nce(q, k, n, temperature=0.4, negatives_mask=mask, weighting=WEIGHTINGS[kind], tile_size=3)

    def oracle(q: torch.Tensor, k: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return oracles.info_nce(q, k, n, t, ANCHORS[kind], mask=mask.tolist())

    tensors = [_rows(4), _rows(4, 1), _rows(8, 2)]
    found = value_and_gradients(loss, tensors)
    _assert_same(found, value_and_gradients(oracle, tensors))
    assert torch.equal(found[3][~mask], torch.zeros_like(found[3][~mask]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 0.001])
def test_an_empty_queue_gives_no_loss_and_no_gradient(kind: str, temperature: float) -> None:
    tensors = [_rows(4), _rows(4, 1), _rows(8, 2)]
    mask = torch.zeros(8, dtype=torch.bool)
    weighting = WEIGHTINGS[kind]
    found = value_and_gradients(
        lambda *x: losses.info_nce(*x, temperature=temperature, negatives_mask=mask, weighting=weighting), tensors
    )
    for value in found:
        torch.testing.assert_close(value, torch.zeros_like(value))


@pytest.mark.parametrize("kind", KINDS)
def test_an_anchor_whose_group_is_the_whole_batch_counts_nothing(kind: str) -> None:
    views, one_group = [_rows(4), _rows(4, 1)], torch.zeros(4, dtype=torch.int64)
    for value in value_and_gradients(
        lambda a, b: losses.nt_xent(a, b, temperature=0.5, weighting=WEIGHTINGS[kind], groups=one_group), views
    ):
        torch.testing.assert_close(value, torch.zeros_like(value))


@pytest.mark.parametrize("kind", ANCHORS)
def test_groups_are_no_negatives_of_each_other(kind: str) -> None:
    groups, theirs = torch.tensor([5, -1, 5, 2]), torch.tensor([2, 5, 7, 8, -1, 9, 5, 3])
    t = torch.tensor(0.4, dtype=torch.float64)
    weighting, anchor = WEIGHTINGS[kind], ANCHORS[kind]
    views, queue = [_rows(4), _rows(4, 1)], _rows(8, 2)
    _assert_same(
        value_and_gradients(
            lambda a, b: losses.nt_xent(a, b, temperature=0.4, weighting=weighting, groups=groups), views
        ),
        value_and_gradients(lambda a, b: oracles.nt_xent(a, b, t, anchor, groups.tolist()), views),
    )
    _assert_same(
        value_and_gradients(
            lambda q, k, n: losses.info_nce(
                q, k, n, temperature=0.4, weighting=weighting, groups=groups, negatives_groups=theirs
            ),
            [*views, queue],
        ),
        value_and_gradients(
            lambda q, k, n: oracles.info_nce(q, k, n, t, anchor, groups=(groups.tolist(), theirs.tolist())),
            [*views, queue],
        ),
    )
    _assert_same(
        value_and_gradients(
            lambda a, b: losses.clip_loss(a, b, logit_scale=2.5, weighting=weighting, groups=groups), views
        ),
        value_and_gradients(
            lambda a, b: (
                (
                    oracles.info_nce(a, b, None, t, anchor, groups=(groups.tolist(),) * 2)
                    + oracles.info_nce(b, a, None, t, anchor, groups=(groups.tolist(),) * 2)
                )
                / 2
            ),
            views,
        ),
    )


@pytest.mark.parametrize(
    ("weighting", "same_as"),
    [
        (Negatives("debiased", tau_plus=0.0), "uniform"),
        (Negatives("hard", tau_plus=0.1, beta=0.0), Negatives("debiased", tau_plus=0.1)),
        (Negatives("top_k", k=1000), "uniform"),
        (Negatives("heated", heat=0.0), "uniform"),
        (Negatives("decoupled_weighted", sigma=1e9), "decoupled"),
    ],
)
def test_limits_in_which_two_weightings_are_equal(weighting: Negatives, same_as: Negatives | str) -> None:
    views = [_rows(6), _rows(6, 1)]
    found = value_and_gradients(lambda a, b: losses.nt_xent(a, b, temperature=0.5, weighting=weighting), views)
    expected = value_and_gradients(lambda a, b: losses.nt_xent(a, b, temperature=0.5, weighting=same_as), views)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **f64(CANCELLING))


@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.005])
@pytest.mark.parametrize("tau_plus", [0.1, 0.9])
def test_debiasing_stays_finite_where_the_correction_exceeds_the_sum(temperature: float, tau_plus: float) -> None:
    views = [_rows(6).float(), _rows(6).float()]  # equal views: the positive is as large as it can be
    found = value_and_gradients(
        lambda a, b: losses.hard_negative_nt_xent(a, b, temperature=temperature, tau_plus=tau_plus, beta=1.0), views
    )
    assert all(torch.isfinite(value).all() for value in found)
    assert found[0] >= 0


def test_heat_keeps_the_order_of_similarities() -> None:
    cosines = torch.linspace(-1, 1, 201, dtype=torch.float64)
    for heat in (0.1, 0.5, 0.99):
        logits = cosines / (1 - heat * (1 + cosines) / 2)
        assert (logits.diff() > 0).all()


def test_synthetic_negatives_are_mixes_of_each_querys_own_hardest() -> None:
    queue, query = torch.eye(12, dtype=torch.float64), _rows(3, dim=12)
    generator = torch.Generator().manual_seed(0)
    made = losses.mochi_negatives(query, queue, hardest=3, pair_mixes=40, query_mixes=50, generator=generator)
    assert made.shape == (3, 90, 12)
    assert not made.requires_grad
    torch.testing.assert_close(made.norm(dim=2), torch.ones(3, 90, dtype=torch.float64))
    for row, own in zip(query, made, strict=True):
        hardest = set(row.topk(3).indices.tolist())
        used = {int(i) for i in own[:40].nonzero()[:, 1]}
        assert used == hardest
        assert ((own[:40] > 0).sum(1) <= 2).all()
        unit = row / row.norm()
        # A mix is b q + (1 - b) n up to its length, with b < 1/2: the queue row that was mixed in dominates.
        for mix in own[40:]:
            others = [i for i in range(12) if i not in hardest]
            share = (mix[others] @ unit[others]) / unit[others].square().sum()  # b / length
            rest = (mix - share * unit).clamp(-1, 1)
            assert int(rest.argmax()) in hardest
            assert 0 <= share <= rest.max() + 1e-12


def test_synthetic_negatives_use_filled_rows_only() -> None:
    mask = torch.arange(12) < 2
    made = losses.mochi_negatives(
        _rows(3, dim=12), torch.eye(12).double(), hardest=8, pair_mixes=60, query_mixes=0, negatives_mask=mask
    )
    assert torch.equal(made[:, :, 2:], torch.zeros(3, 60, 10, dtype=torch.float64))


def test_extra_negatives_of_each_query() -> None:
    t = torch.tensor(0.3, dtype=torch.float64)
    tensors = [_rows(4), _rows(4, 1), _rows(6, 2)]
    extra = _rows(12, 3).view(4, 3, 5)
    _assert_same(
        value_and_gradients(lambda *x: losses.info_nce(*x, temperature=0.3, extra_negatives=extra), tensors),
        value_and_gradients(lambda *x: oracles.info_nce(*x, t, extra=extra), tensors),
    )
    _assert_same(
        value_and_gradients(
            lambda q, k, n, t: losses.info_nce(q, k, n, temperature=t, extra_negatives=extra), [*tensors, t]
        ),
        value_and_gradients(lambda q, k, n, t: oracles.info_nce(q, k, n, t, extra=extra), [*tensors, t]),
    )
    _assert_same(
        value_and_gradients(lambda *x: losses.info_nce(*x, temperature=0.3, extra_negatives=extra), tensors[:2]),
        value_and_gradients(lambda *x: oracles.info_nce(*x, None, t, extra=extra), tensors[:2]),
    )

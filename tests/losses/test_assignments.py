"""Sinkhorn's sums and extremes, multi-crop shapes, and the Gram form of the covariance losses."""

import pytest
import torch
from torch import Tensor

from lightning_contrast import losses
from tests.launch import run_processes
from tests.losses.cases import value_and_gradients
from tests.tolerances import CANCELLING, CONVERGED, NETWORK, f64


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sinkhorn_rows_sum_to_one_and_columns_come_near_their_share() -> None:
    scores = _normal(40, 8)
    near = losses.sinkhorn(scores, epsilon=0.5, iterations=3)
    far = losses.sinkhorn(scores, epsilon=0.5, iterations=500)
    torch.testing.assert_close(near.sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(far.sum(0), torch.full((8,), 5.0, dtype=torch.float64), rtol=CONVERGED, atol=0)
    assert (near.sum(0) - 5).abs().max() < 1.0
    assert not losses.sinkhorn(scores.requires_grad_(), epsilon=0.5, iterations=3).requires_grad


def test_sinkhorn_equals_the_iteration_on_exponentials() -> None:
    scores = _normal(9, 4)
    codes = (scores / 0.3).exp()
    for _ in range(3):
        codes = codes / codes.sum(0) / 4
        codes = codes / codes.sum(1, keepdim=True) / 9
    found = losses.sinkhorn(scores, epsilon=0.3, iterations=3)
    torch.testing.assert_close(found, codes * 9, **f64(NETWORK))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_up_to_ten_thousand_stay_finite(dtype: torch.dtype) -> None:
    scores = (_normal(8, 6) * 1e4 / 3).clamp(-1e4, 1e4).to(dtype)
    codes = losses.sinkhorn(scores, epsilon=0.05, iterations=3)
    assert codes.isfinite().all()
    # at logits of 2e5 a float32 has steps of 0.016
    torch.testing.assert_close(codes.sum(1), torch.ones(8), rtol=0, atol=0.05)
    views = [scores.float(), scores.float().flip(1)]
    for loss in (
        lambda a, b: losses.swav_loss([a, b], temperature=0.1, epsilon=0.05, iterations=3),
        lambda a, b: losses.dino_loss([a, b], [a, b], None, student_temperature=0.1, teacher_temperature=0.04),
    ):
        assert all(value.isfinite().all() for value in value_and_gradients(loss, views))


@pytest.mark.dist
def test_sinkhorn_on_unequal_ranks_equals_one_process() -> None:
    scores = _normal(9, 4)
    parts = [scores[:2], scores[2:]]
    expected = losses.sinkhorn(scores, epsilon=0.1, iterations=3)
    found = run_processes(lambda rank: losses.sinkhorn(parts[rank], epsilon=0.1, iterations=3), 2)
    torch.testing.assert_close(torch.cat(found), expected, **f64(CANCELLING, size=0.01))


@pytest.mark.parametrize("local_views", [0, 1, 3])
def test_multi_crop_is_the_mean_over_pairs_of_different_views(local_views: int) -> None:
    views = [_normal(6, 5, seed=seed) for seed in range(2 + local_views)]
    codes = [losses.sinkhorn(view, epsilon=0.2, iterations=3) for view in views[:2]]
    chances = [(view - 0.1).div(0.07).softmax(1) for view in views[:2]]
    swav, dino = [], []
    for v, view in enumerate(views):
        for a in range(2):
            if a != v:
                swav.append(-(codes[a] * (view / 0.1).log_softmax(1)).sum(1).mean())
                dino.append(-(chances[a] * (view / 0.1).log_softmax(1)).sum(1).mean())
    found = losses.swav_loss(views, temperature=0.1, epsilon=0.2, iterations=3)
    torch.testing.assert_close(found, torch.stack(swav).mean())
    center = torch.full((1, 5), 0.1, dtype=torch.float64)
    found = losses.dino_loss(views, views[:2], center, student_temperature=0.1, teacher_temperature=0.07)
    torch.testing.assert_close(found, torch.stack(dino).mean())


def test_queue_scores_take_part_in_the_codes_only() -> None:
    views, queue = [_normal(4, 5), _normal(4, 5, seed=1)], [_normal(7, 5, seed=2), _normal(7, 5, seed=3)]
    found = losses.swav_loss(views, temperature=0.1, epsilon=0.2, iterations=3, queue_scores=queue)
    total = 0.0
    for a in range(2):
        codes = losses.sinkhorn(torch.cat([queue[a], views[a]]), epsilon=0.2, iterations=3)[7:]
        total = total - (codes * (views[1 - a] / 0.1).log_softmax(1)).sum(1).mean() / 2
    torch.testing.assert_close(found, total)


@pytest.mark.parametrize(("rows", "dims"), [(12, 5), (5, 12), (6, 6)])
def test_covariance_losses_equal_the_formed_matrices(rows: int, dims: int) -> None:
    a, b = _normal(rows, dims), _normal(rows, dims, seed=1)
    off = ~torch.eye(dims, dtype=torch.bool)

    def barlow(a: Tensor, b: Tensor) -> Tensor:
        norm = torch.nn.BatchNorm1d(dims, affine=False).double()
        c = norm(a).T @ norm(b) / rows
        return (c.diagonal() - 1).square().sum() + 0.01 * c[off].square().sum()

    def vicreg(a: Tensor, b: Tensor) -> Tensor:
        loss = 25 * (a - b).square().mean()
        for z in (a, b):
            loss = loss + 25 * 0.5 * (1 - (z.var(0) + 1e-4).sqrt()).relu().mean()
            loss = loss + z.T.cov()[off].square().sum() / dims
        return loss

    for mine, theirs in (
        (lambda a, b: losses.barlow_twins_loss(a, b, off_diagonal_weight=0.01), barlow),
        (losses.vicreg_loss, vicreg),
    ):
        for found, expected in zip(value_and_gradients(mine, [a, b]), value_and_gradients(theirs, [a, b]), strict=True):
            torch.testing.assert_close(found, expected, **f64(CANCELLING))


def test_constant_embeddings_give_vicregs_floor() -> None:
    z = torch.ones(6, 4, dtype=torch.float64)
    torch.testing.assert_close(losses.vicreg_loss(z, z), torch.tensor(24.75, dtype=torch.float64))


def test_koleo_looks_for_the_nearest_other_row() -> None:
    z = torch.nn.functional.normalize(_normal(7, 3), dim=1)
    nearest = [min(float((z[i] - z[j]).norm()) for j in range(7) if j != i) for i in range(7)]
    expected = -torch.tensor(nearest, dtype=torch.float64).log().mean()
    torch.testing.assert_close(losses.koleo_loss(3 * z), expected, rtol=CONVERGED, atol=0)


def test_ibot_counts_masked_patches_only_and_images_without_any_as_zero() -> None:
    student, teacher = _normal(3, 4, 5), _normal(3, 4, 5, seed=1)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return losses.ibot_patch_loss(s, t, None, mask, student_temperature=0.1, teacher_temperature=0.05)

    value, gradient, none = value_and_gradients(loss, [student, teacher])
    entropy = -((teacher / 0.05).softmax(2) * (student / 0.1).log_softmax(2)).sum(2)
    torch.testing.assert_close(value, ((entropy[0, 0] + entropy[0, 2]) / 2 + entropy[2, 3]) / 3)
    assert torch.equal(gradient.abs().sum(2) > 0, mask)
    assert none is None


Z, K = torch.randn(4, 3), torch.randn(4, 1)
ERRORS = {
    "epsilon": (lambda: losses.sinkhorn(Z, epsilon=0.0, iterations=3), "`epsilon` must be > 0"),
    "iterations": (lambda: losses.sinkhorn(Z, epsilon=0.1, iterations=0), "`iterations` must be >= 1"),
    "one prototype": (lambda: losses.sinkhorn(K, epsilon=0.1, iterations=3), "`prototypes` must be at least 2"),
    "one view": (
        lambda: losses.swav_loss([Z], temperature=0.1, epsilon=0.1, iterations=3),
        "`scores` must be a list of at least 2 tensors, got 1",
    ),
    "a tensor": (
        lambda: losses.swav_loss(Z, temperature=0.1, epsilon=0.1, iterations=3),
        r"`scores` must be a list .*one tensor \(4, 3\)",
    ),
    "views of two sizes": (
        lambda: losses.swav_loss([Z, Z[:2]], temperature=0.1, epsilon=0.1, iterations=3),
        "`scores` must have one shape for all views",
    ),
    "more teachers": (
        lambda: losses.dino_loss([Z, Z], [Z, Z, Z], None, student_temperature=0.1, teacher_temperature=0.04),
        "`student` must be a list of at least 3 tensors, got 2",
    ),
    "student temperature": (
        lambda: losses.dino_loss([Z, Z], [Z], None, student_temperature=0.0, teacher_temperature=0.04),
        "`student_temperature` must be > 0",
    ),
    "center": (
        lambda: losses.dino_loss([Z, Z], [Z], Z[:2], student_temperature=0.1, teacher_temperature=0.04),
        "`center` must have 3 numbers",
    ),
    "weight": (lambda: losses.barlow_twins_loss(Z, Z, off_diagonal_weight=-1.0), "`off_diagonal_weight` must be >= 0"),
    "one row": (lambda: losses.vicreg_loss(Z[:1], Z[:1]), "`z_a` must have a batch of at least 2"),
    "koleo of one": (lambda: losses.koleo_loss(Z[:1]), "`z` must have a batch of at least 2"),
    "ijepa shapes": (lambda: losses.ijepa_loss(Z, Z[:2]), r"`prediction` must have the target's shape"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()

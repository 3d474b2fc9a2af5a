"""SIGReg, LeJEPA, VISReg, TiCo, W-MSE and MMCR: official values, the formulas in loops, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_contrast import losses
from tests.tolerances import CANCELLING, FORMULA, NETWORK, bound, f32, f64, near, near64

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parent / "official_objectives.json").read_text(encoding="utf-8"))
}


def _tico(detach: bool) -> Callable[..., Tensor]:
    return lambda view_a, view_b, covariance, **p: losses.tico_loss(
        view_a, view_b, covariance, detach_covariance=detach, **p
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigreg": losses.sigreg_loss,
    "sigreg_views": losses.sigreg_loss,
    "lejepa": losses.lejepa_loss,
    "visreg": losses.visreg_loss,
    "sliced_wasserstein": losses.sliced_gaussian_loss,
    "tico": _tico(True),
    "tico_attached": _tico(False),
    "w_mse": lambda views, permutations, **p: losses.w_mse_loss(views, permutations.long(), **p),
    "mmcr": losses.mmcr_loss,
    "mmcr_momentum": losses.mmcr_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_reference_implementation(name: str) -> None:
    record = RECORDS[name]
    inputs = {key: torch.tensor(value) for key, value in record["inputs"].items()}
    for key in record["grad_norm"]:
        inputs[key].requires_grad_()
    loss = LOSSES[name](**inputs, **record["params"])
    loss.backward()
    assert float(loss.detach()) == near(record["loss"])
    for key, norm in record["grad_norm"].items():
        assert float(inputs[key].grad.norm()) == near(norm, NETWORK), key


def test_epps_pulley_equals_the_reference_implementation() -> None:
    record = RECORDS["epps_pulley"]
    found = losses.epps_pulley(torch.tensor(record["inputs"]["x"]), **record["params"])
    torch.testing.assert_close(found, torch.tensor(record["value"]), **f32(FORMULA))


def test_every_record_is_used() -> None:
    assert {*LOSSES, "epps_pulley"} == set(RECORDS)


def _rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _directions(dim: int, slices: int = 3) -> Tensor:
    return losses.draw_directions(_rows(1, dim), slices=slices, generator=torch.Generator().manual_seed(2))


def test_directions_are_unit_columns_and_those_of_the_generator() -> None:
    drawn = [losses.draw_directions(_rows(2, 5).float(), slices=400, generator=_seeded(s)) for s in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.testing.assert_close(drawn[0].norm(dim=0), torch.ones(400), **f32(FORMULA))
    assert drawn[0].mean(1).abs().max() < 0.1  # 4 standard errors of 1 / sqrt(5 * 400)
    assert losses.draw_directions(_rows(2, 5), slices=2).dtype == torch.float64
    assert losses.draw_directions(_rows(2, 5).bfloat16(), slices=2).dtype == torch.float32


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (2, 1.5), (5, 4.0)])
def test_sigreg_in_loops(knots: int, t_max: float) -> None:
    z, directions = _rows(2, 6, 4), _directions(4)
    total, step = 0.0, t_max / (knots - 1)
    for view in z:
        for a in directions.T:
            x = [float(row @ a) for row in view]
            for k in range(knots):
                t = k * step
                real = sum(math.cos(t * v) for v in x) / len(x) - math.exp(-t * t / 2)
                imaginary = sum(math.sin(t * v) for v in x) / len(x)
                weight = step if k in (0, knots - 1) else 2 * step
                total += len(x) * weight * math.exp(-t * t / 2) * (real**2 + imaginary**2)
    found = losses.sigreg_loss(z, directions, knots=knots, t_max=t_max)
    assert float(found) == near64(total / 6)


def test_sigreg_of_known_embeddings() -> None:
    gaussian, zeros = _rows(100, 256, 8), torch.zeros(512, 8, dtype=torch.float64)
    directions = _directions(8, 16)
    assert float(losses.sigreg_loss(gaussian, directions)) == pytest.approx(1.05, abs=0.05)
    assert float(losses.sigreg_loss(zeros, directions)) == pytest.approx(0.402 * 512, rel=2e-3)
    assert float(losses.sigreg_loss(2 * gaussian, directions)) == pytest.approx(0.239 * 256, rel=5e-2)


def test_visreg_of_known_embeddings() -> None:
    directions = _directions(64, 256)
    assert float(losses.visreg_loss(_rows(1, 256, 64), directions)) == pytest.approx(0.013, abs=4e-3)
    assert float(losses.visreg_loss(torch.zeros(1, 256, 64, dtype=torch.float64), directions)) == pytest.approx(
        1.96, abs=2e-2
    )


def test_the_gradient_of_visreg_grows_near_a_collapse_and_that_of_sigreg_vanishes() -> None:
    directions = _directions(64, 128)

    def norm(loss: Callable[[Tensor], Tensor], scale: float) -> float:
        z = (scale * _rows(1, 256, 64)).requires_grad_()
        loss(z).backward()
        return float(z.grad.norm())

    visreg = [norm(lambda z: losses.visreg_loss(z, directions), scale) for scale in (1, 0.1, 0.01)]
    sigreg = [norm(lambda z: losses.sigreg_loss(z, directions), scale) for scale in (0.1, 0.01)]
    assert visreg[0] < visreg[1] < visreg[2]
    assert sigreg[1] < sigreg[0] / 5


def test_invariance_is_the_distance_from_the_mean_of_global_views() -> None:
    global_views, local_views = _rows(2, 5, 3), _rows(3, 5, 3, seed=1)
    every, center = torch.cat([global_views, local_views]), (global_views[0] + global_views[1]) / 2
    expected = sum(float((view - center).square().mean()) for view in every) / 5
    assert float(losses.view_invariance(global_views, local_views)) == near64(expected)
    pair = float((global_views[0] - global_views[1]).square().mean()) / 4
    assert float(losses.view_invariance(global_views)) == near64(pair)


def test_lejepa_without_local_views_is_the_sum_of_its_terms() -> None:
    z, directions = _rows(2, 6, 4), _directions(4)
    expected = 0.2 * losses.sigreg_loss(z, directions) + 0.8 * losses.view_invariance(z)
    found = losses.lejepa_loss(z, None, directions, regularizer_weight=0.2)
    torch.testing.assert_close(found, expected, **f64(FORMULA))


def test_tico_in_loops() -> None:
    query, key, before = _rows(5, 4), _rows(5, 4, seed=1), _rows(4, 4, seed=2)
    before = before @ before.T
    q, k = (x / x.norm(dim=1, keepdim=True) for x in (query, key))
    moved = 0.8 * before + 0.2 * sum(torch.outer(row, row) for row in q) / 5
    expected = sum(float(3 * (a @ moved @ a) - a @ b) for a, b in zip(q, k, strict=True)) / 5
    settings = {"covariance_momentum": 0.8, "covariance_weight": 3.0}
    assert float(losses.tico_loss(query, key, before, **settings)) == near64(expected)
    assert float(losses.tico_loss(query, key, before, detach_covariance=True, **settings)) == near64(expected + 1)


def test_w_mse_in_loops() -> None:
    z, permutations = _rows(3, 9, 2), torch.tensor([[4, 1, 0, 8, 2, 6, 3, 5, 7], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
    total, count, eps = 0.0, 0, 0.1
    for order in permutations:
        for start in (0, 4):  # the ninth image is left over
            white = []
            for view in z:
                rows = view[order[start : start + 4]]
                centered = rows - rows.mean(0)
                covariance = (1 - eps) * rows.T.cov() + eps * torch.eye(2, dtype=torch.float64)
                whitened = centered @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T
                white.append(whitened / whitened.norm(dim=1, keepdim=True))
            for a, b in ((0, 1), (0, 2), (1, 2)):
                total += float((2 - 2 * (white[a] * white[b]).sum(1)).sum())
                count += 4
    found = losses.w_mse_loss(z, permutations, whitening_size=4, eps=eps)
    torch.testing.assert_close(found, torch.tensor(total / count, dtype=torch.float64), **f64(CANCELLING))


def test_w_mse_of_equal_and_of_unrelated_views() -> None:
    order = losses.draw_permutations(64, iterations=1, generator=_seeded(0))
    z = _rows(64, 4)
    assert abs(float(losses.w_mse_loss(torch.stack([z, z]), order, whitening_size=32))) < bound(FORMULA)
    other = torch.stack([z, _rows(64, 4, seed=1)])
    assert float(losses.w_mse_loss(other, order, whitening_size=32)) == pytest.approx(2, abs=0.4)


def test_w_mse_does_not_see_linear_maps_of_a_view() -> None:
    order = losses.draw_permutations(12, iterations=2, generator=_seeded(0))
    z, lower = _rows(2, 12, 3), torch.tril(_rows(3, 3, seed=1)) + 3 * torch.eye(3, dtype=torch.float64)
    moved = torch.stack([z[0] @ lower.T + 5, z[1]])
    expected = losses.w_mse_loss(z, order, whitening_size=6)
    torch.testing.assert_close(losses.w_mse_loss(moved, order, whitening_size=6), expected, **f64(CANCELLING))


def test_a_covariance_without_full_rank_gives_nan() -> None:
    z = _rows(2, 8, 1).expand(2, 8, 3)
    order = losses.draw_permutations(8, iterations=1)
    assert losses.w_mse_loss(torch.zeros_like(z), order, whitening_size=8).isnan()
    assert losses.w_mse_loss(torch.zeros_like(z), order, whitening_size=8, eps=0.1).isfinite()


def test_permutations_are_those_of_the_generator() -> None:
    first, same, other = (losses.draw_permutations(9, iterations=2, generator=_seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort(1).values, torch.arange(9).expand(2, 9))


def test_mmcr_of_orthonormal_centroids() -> None:
    views = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 3, 4)
    assert float(losses.mmcr_loss(7 * views)) == near64(-4)
    assert float(losses.mmcr_loss(views, local_weight=0.5)) == near64(-4 + 0.5 * math.sqrt(3))
    disagreeing = torch.stack([torch.eye(4), -torch.eye(4)], dim=1).double()
    assert float(losses.mmcr_loss(disagreeing)) == near64(0.0)


Z, V, E = torch.randn(4, 3), torch.randn(2, 4, 3), torch.eye(3)
ORDER = torch.arange(4)[None]
VALUE_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no slice": (lambda: losses.draw_directions(Z, slices=0), "`slices` must be >= 1"),
    "no direction": (lambda: losses.sigreg_loss(Z, E[:, :0]), r"`directions` must have the shape \(3, slices\)"),
    "other width": (lambda: losses.visreg_loss(V, torch.eye(4)), r"`directions` must have the shape \(3, slices\)"),
    "one view": (lambda: losses.visreg_loss(Z, E), r"`z` must have the shape \(views, N, D\)"),
    "one row": (lambda: losses.visreg_loss(V[:, :1], E), "`z` must have a batch of at least 2"),
    "one knot": (lambda: losses.epps_pulley(Z, knots=1), "`knots` must be >= 2"),
    "t_max": (lambda: losses.epps_pulley(Z, t_max=0.0), "`t_max` must be > 0"),
    "dimensions": (lambda: losses.sigreg_loss(Z[0], E), "`z` must have the shape"),
    "local views": (
        lambda: losses.view_invariance(V, V[:, :3]),
        r"`local_projection` must .* \(views, 4, 3\)",
    ),
    "share": (
        lambda: losses.lejepa_loss(V, None, E, regularizer_weight=1.5),
        "`regularizer_weight` must",
    ),
    "covariance": (lambda: losses.tico_loss(Z, Z, torch.eye(4)), "`covariance` must have shape"),
    "not square": (lambda: losses.tico_loss(Z, Z, Z), r"`covariance` must be square, \(3, 3\), got \(4, 3\)"),
    "rho": (lambda: losses.tico_loss(Z, Z, E, covariance_weight=-1.0), "`covariance_weight` must be >= 0"),
    "beta": (lambda: losses.tico_loss(Z, Z, E, covariance_momentum=2.0), "`covariance_momentum` must"),
    "whitening": (
        lambda: losses.w_mse_loss(V, ORDER, whitening_size=3),
        "`whitening_size` must be >= 4, got 3",
    ),
    "small batch": (lambda: losses.w_mse_loss(V, ORDER, whitening_size=5), "`views` must have a batch of at least 5"),
    "one sample": (
        lambda: losses.w_mse_loss(V[:1], ORDER, whitening_size=4),
        r"`views` must .* \(views >= 2",
    ),
    "order": (
        lambda: losses.w_mse_loss(V, ORDER[:, :3], whitening_size=4),
        r"`permutations` must .*4\)",
    ),
    "no permutation": (lambda: losses.draw_permutations(4, iterations=0), "`iterations` must be >= 1"),
    "views": (lambda: losses.mmcr_loss(Z), r"`views` must have the shape \(B, views, D\)"),
    "momentum views": (lambda: losses.mmcr_loss(V, V[:1]), "`views` and `momentum_views` must have the same"),
    "local weight": (lambda: losses.mmcr_loss(V, local_weight=-1.0), "`local_weight` must be >= 0"),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_bad_values_are_refused(name: str) -> None:
    call, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.sigreg_loss(Z.long(), E),
        lambda: losses.mmcr_loss(V.long()),
        lambda: losses.w_mse_loss(V, ORDER.float(), whitening_size=4),
        lambda: losses.tico_loss(Z.long(), Z.long(), E),
    ],
)
def test_other_types_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="must be a"):
        call()

"""Values and gradients of every loss equal those of plain loops, for any tile size; and their invariances."""

import pytest
import torch

from tests.losses.cases import CASES, Case, make_inputs, value_and_gradients
from tests.tolerances import CANCELLING, NETWORK, f64

NAMES = sorted(CASES)
TILED = [name for name in NAMES if CASES[name].tiled]
SYMMETRIC = [
    name
    for name in NAMES
    if name.startswith(("nt_xent", "clip", "sup_con", "alignment", "spectral", "siglip")) and CASES[name].inputs > 1
]


def _assert_equal(case: Case, found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if index - 1 in case.no_gradient:
            assert mine is None
            continue
        assert mine is not None
        torch.testing.assert_close(mine, theirs, **f64(CANCELLING))


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_equal_plain_loops(name: str, rows: int) -> None:
    case = CASES[name]
    if "groups" in name and rows == 2:
        rows = 3
    tensors = make_inputs(case, rows)
    _assert_equal(case, value_and_gradients(case.loss, tensors), value_and_gradients(case.oracle, tensors))


@pytest.mark.parametrize("tile_size", [1, 3, 4, 100])
@pytest.mark.parametrize("name", TILED)
def test_tile_size_changes_nothing(name: str, tile_size: int) -> None:
    case = CASES[name]
    tensors = make_inputs(case, 5, seed=1)
    found = value_and_gradients(case.loss, tensors, tile_size=tile_size)
    _assert_equal(case, found, value_and_gradients(case.oracle, tensors))


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_batch_does_not_matter(name: str) -> None:
    case = CASES[name]
    tensors = make_inputs(case, 5, seed=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = [t[order] if t.ndim and len(t) == 5 else t for t in tensors]
    found, expected = value_and_gradients(case.loss, turned), value_and_gradients(case.loss, tensors)
    torch.testing.assert_close(found[0], expected[0], **f64(NETWORK))
    torch.testing.assert_close(found[1], expected[1][order], **f64(CANCELLING, size=0.1))


@pytest.mark.parametrize("name", SYMMETRIC)
def test_views_can_be_swapped(name: str) -> None:
    case = CASES[name]
    first, second, *rest = make_inputs(case, 5, seed=3)
    found, expected = case.loss(second, first, *rest), case.loss(first, second, *rest)
    torch.testing.assert_close(found, expected, **f64(NETWORK))


def test_collapsed_embeddings_give_the_logarithm_of_the_candidates() -> None:
    z = torch.ones(6, 4, dtype=torch.float64)
    from lightning_contrast import losses

    log = torch.tensor([11.0, 6.0], dtype=torch.float64).log()
    torch.testing.assert_close(losses.nt_xent(z, z, temperature=0.1), log[0])
    torch.testing.assert_close(losses.info_nce(z, z, temperature=0.1), log[1])
    torch.testing.assert_close(losses.clip_loss(z, z, logit_scale=100.0), log[1])
    torch.testing.assert_close(losses.sup_con(z, z, torch.arange(6), temperature=0.1), log[0])
    torch.testing.assert_close(losses.uniformity(z), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(losses.alignment(z, -z), torch.full((), 4.0, dtype=torch.float64))
    torch.testing.assert_close(losses.moco_v3_loss(z, z, z, z, temperature=0.2), 0.8 * log[1])

"""Prototypes: scores, lengths, gradients, freezing."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lightning_contrast import losses, nn


@pytest.fixture
def prototypes():
    torch.manual_seed(0)
    return nn.Prototypes(dim=5, count=7)


def test_scores_are_cosines_of_unit_embeddings(prototypes):
    rows = F.normalize(torch.randn(3, 5), dim=1)
    expected = [[float(row @ w / w.norm()) for w in prototypes.weight.detach()] for row in rows]
    torch.testing.assert_close(prototypes(rows).detach(), torch.tensor(expected))
    torch.testing.assert_close(prototypes(3 * rows).detach(), 3 * torch.tensor(expected))  # linear in the embedding


def test_rows_start_with_length_one_and_normalize_restores_it_in_place(prototypes):
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(7))
    before, scores = prototypes.weight.detach().clone(), prototypes(torch.ones(1, 5)).detach()
    parameter = prototypes.weight
    with torch.no_grad():
        parameter.mul_(torch.linspace(0.1, 9, 7)[:, None])
    torch.testing.assert_close(prototypes(torch.ones(1, 5)).detach(), scores)  # lengths do not matter
    prototypes.normalize()
    assert prototypes.weight is parameter
    torch.testing.assert_close(parameter.detach(), before)


def test_gradient_is_that_of_a_linear_layer_on_unit_rows(prototypes):
    rows, target = torch.randn(4, 5), torch.randn(4, 7)
    plain = prototypes.weight.detach().clone().requires_grad_()
    (F.linear(rows, plain) * target).sum().backward()
    (prototypes(rows) * target).sum().backward()
    torch.testing.assert_close(prototypes.weight.grad, plain.grad)


def test_a_row_of_zeros_scores_zero(prototypes):
    with torch.no_grad():
        prototypes.weight[2] = 0
    prototypes.normalize()
    scores = prototypes(torch.randn(2, 5))
    assert scores.isfinite().all()
    assert (scores[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_in_full_precision_under_autocast(prototypes, dtype):
    rows = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prototypes(rows), prototypes(rows.float()))
        half = prototypes(rows.to(dtype))
    assert half.dtype == torch.float32
    assert torch.equal(half, prototypes(rows.to(dtype).float()))
    assert prototypes.double()(rows).dtype == torch.float64


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_drop_gradient_keeps_decay_and_momentum_away_too(prototypes, optimizer):
    steps = optimizer(prototypes.parameters())
    prototypes(torch.randn(3, 5)).sum().backward()
    steps.step()
    before = prototypes.weight.detach().clone()
    prototypes(torch.randn(3, 5)).sum().backward()
    prototypes.drop_gradient()
    steps.step()
    assert torch.equal(prototypes.weight, before)


def test_copies_are_apart(prototypes):
    twin = copy.deepcopy(prototypes)
    with torch.no_grad():
        twin.weight.zero_()
    assert (prototypes.weight.norm(dim=1) > 0.9).all()
    assert repr(prototypes) == "Prototypes(dim=5, count=7)"


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`prototypes` must be >= 2, got 1. Give at least 2"):
        nn.Prototypes(4, 1)
    with pytest.raises(ValueError, match="`dim` must be >= 1, got 0"):
        nn.Prototypes(0, 4)
    with pytest.raises(TypeError, match="`prototypes` must be a whole number"):
        nn.Prototypes(4, 2.5)


def test_sinkhorn_is_the_one_of_the_losses():
    assert nn.sinkhorn is losses.sinkhorn

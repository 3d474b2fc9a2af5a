"""Weights by group."""

import pytest
import torch

from lightning_contrast.data import balanced_weights
from tests.tolerances import FORMULA, f32


def test_every_group_has_the_same_share_and_the_mean_is_one():
    groups = torch.tensor([3, 0, 0, 7, 0, 3, 0, -1, 0])
    weights = balanced_weights(groups)
    shares = torch.stack([weights[groups == group].sum() for group in (0, 3, 7)])
    torch.testing.assert_close(shares, torch.full((3,), 8 / 3), **f32(FORMULA))
    assert weights[7] == 0
    assert len({round(float(w), 6) for w in weights[groups == 0]}) == 1


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ([0, 1], TypeError, "`groups` must be an integer tensor"),
        (torch.tensor([0.0]), TypeError, "`groups` must be an integer tensor"),
        (torch.tensor([[0]]), ValueError, r"`groups` must have shape \(N,\)"),
        (torch.tensor([-1]), ValueError, "`groups` must hold at least one group"),
    ],
)
def test_bad_input(groups, error, words):
    with pytest.raises(error, match=words):
        balanced_weights(groups)

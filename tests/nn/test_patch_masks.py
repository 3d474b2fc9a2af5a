"""Mask samplers of masked prediction: counts, shapes of what is hidden, randomness, splits, and bad input."""

import math
import pickle

import pytest
import torch

from lightning_contrast.nn import (
    MASKS,
    block_masks,
    build_masks,
    grid_masks,
    inverse_block_masks,
    random_masks,
    split_masks,
    tubelet_masks,
)

RATIOS = {"random": 0.6, "grid": 0.75, "block": 0.6, "inverse_block": 0.8}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MASKS)
def test_every_sampler_hides_the_same_number_and_depends_on_its_generator_only(name):
    sampler, grid = MASKS[name], (6, 8)
    torch.manual_seed(0)
    first = sampler(5, grid, ratio=RATIOS[name], generator=seeded())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(sampler(5, grid, ratio=RATIOS[name], generator=seeded()), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (5, 48)
    assert first.dtype == torch.bool
    assert set(first.sum(1).tolist()) == {math.ceil(RATIOS[name] * 48)}
    other = sampler(5, grid, ratio=RATIOS[name], generator=seeded(1))
    assert torch.equal(other, first) == (name == "grid")
    torch.manual_seed(3)
    globally = sampler(5, grid, ratio=RATIOS[name])
    torch.manual_seed(3)
    assert torch.equal(sampler(5, grid, ratio=RATIOS[name]), globally)


@pytest.mark.parametrize("name", ["random", "block", "inverse_block"])
def test_every_patch_can_be_hidden_and_visible(name):
    mask = MASKS[name](400, (5, 4), ratio=0.6, generator=seeded())
    assert ((mask.float().mean(0) > 0.2) & (mask.float().mean(0) < 0.95)).all()


def test_random_patches_are_hidden_alike():
    mask = random_masks(4000, (4, 4), ratio=0.75, generator=seeded())
    assert (mask.float().mean(0) - 0.75).abs().max() < 0.03  # four deviations


def test_published_numbers():
    assert int((~random_masks(1, (14, 14), ratio=0.75)).sum()) == 49  # MAE
    assert int(random_masks(1, (14, 14), ratio=0.6, unit=2).sum()) == 30 * 4  # SimMIM at 224 pixels
    assert int(random_masks(1, (12, 12), ratio=0.6, unit=2).sum()) == 22 * 4  # at 192
    assert int(block_masks(1, (14, 14), ratio=120 / 196).sum()) == 120  # data2vec
    assert int((~inverse_block_masks(1, (14, 14), ratio=0.8)).sum()) == 39  # data2vec 2.0


def test_units_are_hidden_as_one():
    mask = random_masks(3, (4, 6), ratio=0.5, unit=2, generator=seeded()).view(3, 2, 2, 3, 2)
    assert (mask == mask[:, :, :1, :, :1]).all()


def test_the_grid_shows_one_of_each_square():
    shown = ~grid_masks(2, (4, 6)).view(2, 4, 6)
    assert shown.nonzero().remainder(torch.tensor([3, 2, 2]))[:, 1:].eq(0).all()
    assert shown.sum() == 2 * 6
    assert (~grid_masks(1, (6, 6), ratio=8 / 9)).sum() == 4


def _neighbors(mask):
    """Return the share of vertical and horizontal neighbors that agree."""
    return (mask[:, 1:] == mask[:, :-1]).float().mean() + (mask[:, :, 1:] == mask[:, :, :-1]).float().mean()


def test_blocks_hang_together():
    grids = [
        MASKS[name](200, (14, 14), ratio=0.6, generator=seeded()).view(-1, 14, 14)
        for name in ("random", "block", "inverse_block")
    ]
    random, block, inverse = map(_neighbors, grids)
    assert block > random + 0.4
    assert inverse > random + 0.4


def test_a_visible_block_without_overlap_is_a_square():
    mask = inverse_block_masks(50, (8, 8), ratio=1 - 9 / 64, adjust=0.0, generator=seeded()).view(50, 8, 8)
    rows, columns = (~mask).any(2).sum(1), (~mask).any(1).sum(1)
    inner = (rows == 3) & (columns == 3)  # blocks at the border are cut, and single patches added
    assert inner.float().mean() > 0.3
    assert (~mask)[inner].sum() == 9 * inner.sum()


def test_tubelets_hide_a_union_of_blocks_over_all_times():
    mask = tubelet_masks(40, (4, 6, 6), blocks=1, scale=(0.25, 0.25), aspect=(1.0, 1.0), generator=seeded())
    frames = mask.view(40, 4, 6, 6)
    assert (frames == frames[:, :1]).all()
    assert (frames[:, 0].flatten(1).sum(1) == 9).all()
    assert frames[:, 0].any(0).all()  # the last row and column as well: offsets are inclusive
    short = tubelet_masks(40, (4, 6, 6), blocks=1, time_scale=(0.5, 0.5), generator=seeded()).view(40, 4, 36)
    assert (short.any(2).sum(1) == 2).all()
    many = tubelet_masks(40, (4, 6, 6), blocks=8, generator=seeded()).sum(1)
    assert many.unique().numel() > 3
    assert (many < 144).all()


def test_a_split_orders_visible_and_hidden_patches():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    split = split_masks(mask, torch.device("cpu"))
    assert split.visible.tolist() == [[1, 3], [0, 1]]
    assert split.hidden.tolist() == [[0, 2], [2, 3]]
    mask[0, 1] = True
    cut = split_masks(mask, torch.device("cpu"), cut=True)
    assert cut.visible.tolist() == [[3], [0]]
    assert cut.hidden.tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="`mask` must hide as many patches in every image"):
        split_masks(mask, torch.device("cpu"))


ERRORS = {
    "ratio 0": (lambda: random_masks(2, (4, 4), ratio=0.0), r"`ratio` must lie in \(0, 1\)"),
    "ratio 1": (lambda: block_masks(2, (4, 4), ratio=1.0), r"`ratio` must lie in \(0, 1\)"),
    "all": (lambda: inverse_block_masks(2, (3, 3), ratio=0.95), "`ratio` must leave one of 9 visible"),
    "unit": (lambda: random_masks(2, (7, 7), unit=2), "`grid` must be a multiple of the squares of 2 x 2"),
    "no grid": (lambda: grid_masks(2, (5, 4)), "`grid` must be a multiple of the squares of 2 x 2"),
    "no square": (lambda: grid_masks(2, (4, 4), ratio=0.6), r"`ratio` must be 1 - 1 / k\^2"),
    "block": (lambda: inverse_block_masks(2, (2, 4)), "`block` must fit into the grid of 2 x 4"),
    "smallest": (lambda: block_masks(2, (4, 4), smallest=0), "`smallest` must be >= 1"),
    "clip": (
        lambda: tubelet_masks(2, (2, 4, 4), scale=(0.9, 1.0)),
        "`scale` must leave something visible of 2 x 4 x 4 tubelets",
    ),
    "one row": (lambda: tubelet_masks(2, (4, 1, 1)), "`scale` must leave something visible of 4 x 1 x 1 tubelets"),
    "one time": (
        lambda: tubelet_masks(2, (1, 4, 4), scale=(1.0, 1.0), aspect=(1.0, 1.0), time_scale=(0.5, 0.5)),
        "`scale` must leave something visible of 1 x 4 x 4 tubelets",
    ),
    "blocks": (
        lambda: tubelet_masks(1, (1, 2, 2), blocks=200, scale=(0.25, 0.25)),
        "`blocks` must leave something visible of 1 x 2 x 2 tubelets, got 200",
    ),
    "time": (lambda: tubelet_masks(2, (2, 4, 4), time_scale=(0.0, 1.0)), "`time_scale` must start above 0"),
    "name": (lambda: build_masks("blocks", (4, 4), ratio=0.5), "`mask` must be one of .* Did you mean 'block'"),
    "nothing hidden": (
        lambda: build_masks(lambda n, grid, generator: torch.zeros(n, 16, dtype=torch.bool), (4, 4)),
        "`mask` must hide some of the 16 patches of every image, and not all, got",
    ),
    "other grid": (
        lambda: build_masks(lambda n, grid, generator: torch.ones(n, 9, dtype=torch.bool), (4, 4)),
        r"`mask` must give bool masks \(2, 16\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def rarely(images, grid, generator=None):
    """Hide nothing in the third image."""
    return torch.arange(16).expand(images, -1) < torch.tensor([4, 8, 0, 2])[:images, None]


def test_masks_of_your_own_sampler_are_checked_at_every_call():
    sampler = pickle.loads(pickle.dumps(build_masks(rarely, (4, 4))))
    assert sampler(2, (4, 4)).sum(1).tolist() == [4, 8]
    with pytest.raises(ValueError, match=r"hide some of the 16 patches of every image, and not all, got \[0"):
        sampler(3, (4, 4))
    with pytest.raises(ValueError, match=r"`mask` must give bool masks \(2, 36\)"):
        sampler(2, (6, 6))


def test_other_objects_are_no_masks():
    with pytest.raises(TypeError, match="`mask` must be a name or a callable"):
        build_masks(0.75, (4, 4))


@pytest.mark.parametrize("scale", [0.3, 0.6, 0.9])
def test_whatever_sizes_are_accepted_something_stays_visible(scale):
    for grid in ((1, 2, 2), (2, 3, 5), (3, 4, 4)):
        for seed in range(20):
            try:
                mask = tubelet_masks(3, grid, blocks=2, scale=(scale, scale), generator=seeded(seed))
            except ValueError:
                break
            assert (~mask).any(1).all()

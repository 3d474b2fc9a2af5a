"""The mask samplers against the references' loops on arrays."""

import math
import random

import numpy as np
import pytest
import torch

from lightning_contrast.nn import dinov2_masks, ibot_masks, masked_patches

GRID = (14, 14)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same_draws(seed):
    """Return what the sampler draws from, given its torch generator."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator(seed))))


def program_blocks(rng, grid, target, low, largest):
    """BEiT's loop on a boolean array, as iBOT's and DINOv2's programs have it."""
    height, width = grid
    mask, count = np.zeros(grid, dtype=bool), 0
    while count < target:
        most, delta = min(target - count, largest), 0
        for _ in range(10):
            area = rng.uniform(low, most)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                masked = mask[top : top + h, left : left + w].sum()
                if 0 < h * w - masked <= most:
                    for i in range(top, top + h):
                        for j in range(left, left + w):
                            if not mask[i, j]:
                                mask[i, j], delta = True, delta + 1
            if delta > 0:
                break
        if delta == 0:
            break
        count += delta
    return mask


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 4), (2, 2), (6, 10)])
def test_ibot_equals_the_reference(grid):
    for seed in range(5):
        rng, expected = same_draws(seed), []
        for _ in range(12):
            ratio = rng.choice([0.0, rng.uniform(0.3 - 0.2, 0.3 + 0.2)])
            low = (min(grid) // 3) ** 2
            expected.append(program_blocks(rng, grid, ratio * grid[0] * grid[1], low, math.inf).reshape(-1))
        drawn = ibot_masks(12, grid, generator=generator(seed))
        assert drawn.dtype == torch.bool
        assert np.array_equal(drawn.numpy(), np.stack(expected))


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 4), (6, 10)])
def test_dinov2_equals_the_reference(grid):
    patches = grid[0] * grid[1]
    for seed in range(5):
        rng, expected = same_draws(seed), [np.zeros(grid, dtype=bool)] * 6
        edges = np.linspace(0.1, 0.5, 7)
        for i in range(6):
            target = int(patches * rng.uniform(edges[i], edges[i + 1]))
            expected.append(program_blocks(rng, grid, target, 4, 0.5 * patches))
        rng.shuffle(expected)
        drawn = dinov2_masks(12, grid, generator=generator(seed))
        assert np.array_equal(drawn.numpy(), np.stack(expected).reshape(12, -1))


def test_shares():
    drawn = ibot_masks(2000, GRID, generator=generator())
    shares = drawn.float().mean(1)
    assert 0.45 < (shares == 0).float().mean() < 0.55
    assert shares.max() <= 0.5
    assert shares[shares > 0].mean() == pytest.approx(0.29, abs=0.02)  # blocks may fall a little short
    drawn = dinov2_masks(200, GRID, generator=generator())
    counts = drawn.sum(1)
    assert (counts > 0).sum() == 100  # always half of the images
    ordered = counts[counts > 0].sort().values / 196
    assert (ordered <= torch.linspace(0.1, 0.5, 101)[1:] + 1e-6).all()
    assert ordered.mean() == pytest.approx(0.3, abs=0.02)


def test_random_patches_have_the_exact_number():
    drawn = ibot_masks(50, (4, 4), ratios=(0.3,), spreads=(0.0,), shape="random", generator=generator())
    assert (drawn.sum(1) == 4).all()  # 4.8 rounded down
    assert (drawn.float().mean(0) > 0.05).all()
    assert ibot_masks(3, (4, 4), ratios=(1.0,), spreads=(0.0,), shape="random").all()
    assert not dinov2_masks(3, (4, 4), probability=0.0).any()


def test_draws_come_from_torchs_generator_alone():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(7)
    first = ibot_masks(8, GRID), dinov2_masks(8, GRID)
    torch.manual_seed(7)
    random.seed(2)
    np.random.seed(2)
    before = random.getstate()
    second = ibot_masks(8, GRID), dinov2_masks(8, GRID)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert random.getstate() == before
    assert not torch.equal(ibot_masks(8, GRID), second[0])


def test_masked_patches():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    found = masked_patches(mask, torch.device("cpu"))
    assert torch.equal(found.mask, mask)
    assert found.rows.tolist() == [1, 3, 8]
    assert found.images.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratios": ()}, "`mask_ratios` must hold at least one ratio"),
        ({"ratios": (0.3,), "spreads": (0.1, 0.1)}, "`mask_spreads` must have 1 numbers"),
        ({"ratios": (0.3,), "spreads": (0.4,)}, r"`mask_ratios` must stay in \[0, 1\]"),
        ({"ratios": (0.9,), "spreads": (0.2,)}, r"`mask_ratios` must stay in \[0, 1\]"),
        ({"ratios": (0.3,), "spreads": (-0.1,)}, r"`mask_ratios` must stay in \[0, 1\]"),
        ({"shape": "blocks"}, "`mask_shape` must be one of 'block', 'random', got 'blocks'"),
    ],
)
def test_bad_ibot_masks(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ibot_masks(4, GRID, **kwargs)


def test_bad_sizes_and_shares():
    with pytest.raises(ValueError, match="`images` must be >= 1"):
        ibot_masks(0, GRID)
    with pytest.raises(ValueError, match="`grid` must be >= 1"):
        dinov2_masks(2, (0, 4))
    with pytest.raises(ValueError, match="`probability` must lie in"):
        dinov2_masks(2, GRID, probability=1.5)
    with pytest.raises(ValueError, match="`ratio` must be an ordered pair"):
        dinov2_masks(2, GRID, ratio=(0.5, 0.1))

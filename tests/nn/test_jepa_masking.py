"""I-JEPA's masks against the authors' algorithm in plain loops, and its predictor."""

import copy
import math
import pickle
from collections import Counter

import pytest
import torch
from lightly.models.utils import get_2d_sine_cosine_positional_embedding
from torch import nn

from lightning_contrast.nn import JepaMaskSampler, JepaPredictor, sincos_positions
from tests.plain_transformer import blocks, linear, norm
from tests.tolerances import FORMULA, f32

PAPER = (14, 14)


def block_of(indices, grid):
    """Return top, left, height and width of a list of patches, which must be a full rectangle in raster order."""
    rows, columns = [i // grid[1] for i in indices], [i % grid[1] for i in indices]
    top, left = min(rows), min(columns)
    height, width = max(rows) - top + 1, max(columns) - left + 1
    assert indices == [r * grid[1] + c for r in range(top, top + height) for c in range(left, left + width)]
    return top, left, height, width


def published_size(grid, share, scale, aspect):
    """The size of a block, as the reference computes it."""
    height, width = grid
    area = int(height * width * (scale[0] + share * (scale[1] - scale[0])))
    ratio = aspect[0] + share * (aspect[1] - aspect[0])
    h, w = int(round(math.sqrt(area * ratio))), int(round(math.sqrt(area / ratio)))  # noqa: RUF046
    while h >= height:
        h -= 1
    while w >= width:
        w -= 1
    return h, w


@pytest.mark.parametrize("grid", [PAPER, (16, 16), (8, 8), (8, 12)])
def test_masks_are_those_of_the_references_rules(grid):
    sampler = JepaMaskSampler(grid)
    for seed in range(20):
        torch.manual_seed(seed)
        shares = torch.rand(2).tolist()
        torch.manual_seed(seed)
        masks = sampler(6)
        size = published_size(grid, shares[0], (0.15, 0.2), (0.75, 1.5))
        context = published_size(grid, shares[1], (0.85, 1.0), (1.0, 1.0))
        assert masks.targets.shape == (6, 4, size[0] * size[1])
        assert masks.context.shape[0] == 6
        shortest = None
        for row, targets, relaxed in zip(masks.context.tolist(), masks.targets.tolist(), masks.relaxed, strict=True):
            for target in targets:
                top, left, height, width = block_of(target, grid)
                assert (height, width) == size
                assert top < grid[0] - height and left < grid[1] - width  # noqa: PT018
            assert row == sorted(set(row))
            assert len(row) > 10
            taken = {patch for target in targets for patch in target}
            assert relaxed or not taken & set(row)
            # The patches are those of one square without the targets, but for the bottom ones that were cut.
            corners = [
                block - taken if not relaxed else block for block in squares(grid, context) if not set(row) - block
            ]
            cut = [sorted(block)[: len(row)] == row for block in corners]
            assert any(cut) or relaxed
            whole = any(sorted(block) == row for block in corners)
            shortest = whole or shortest
        assert shortest or masks.relaxed.any(), "the shortest context is whole"


def squares(grid, size):
    """Return all square blocks that may be drawn, as sets of patches."""
    for top in range(max(grid[0] - size[0], 1)):
        for left in range(max(grid[1] - size[1], 1)):
            yield {r * grid[1] + c for r in range(top, top + size[0]) for c in range(left, left + size[1])}


def program_masks(grid, batch_size, min_keep):
    """The authors' collator in plain loops, for one batch: context sets, target sets, whether a rule was relaxed."""
    share_p, share_e = torch.rand(2).tolist()
    p_size = published_size(grid, share_p, (0.15, 0.2), (0.75, 1.5))
    e_size = published_size(grid, share_e, (0.85, 1.0), (1.0, 1.0))

    def draw(size):
        top = int(torch.randint(0, grid[0] - size[0], (1,)))
        left = int(torch.randint(0, grid[1] - size[1], (1,)))
        return {r * grid[1] + c for r in range(top, top + size[0]) for c in range(left, left + size[1])}

    contexts, all_targets, relaxed = [], [], []
    for _ in range(batch_size):
        targets = [draw(p_size) for _ in range(4)]
        tries, timeout = 0, 20
        while True:
            context = draw(e_size)
            for target in targets[: max(4 - tries, 0)]:
                context = context - target
            if len(context) > min_keep:
                break
            timeout -= 1
            if timeout == 0:
                tries, timeout = tries + 1, 20
        contexts.append(sorted(context))
        all_targets.append(targets)
        relaxed.append(tries > 0)
    length = min(map(len, contexts))
    return [context[:length] for context in contexts], all_targets, relaxed


@pytest.mark.slow
def test_distribution_is_that_of_the_reference():
    """How often each patch is seen or predicted, the length of the context, and how often the rule was relaxed."""
    grid, min_keep, batches, batch_size = (8, 8), 16, 500, 4
    sampler = JepaMaskSampler(grid, min_keep=min_keep)
    torch.manual_seed(0)
    ours, theirs = Counter(), Counter()
    for _ in range(batches):
        masks = sampler(batch_size)
        ours.update(f"context {i}" for i in masks.context.flatten().tolist())
        ours.update(f"target {i}" for i in masks.targets.flatten().tolist())
        ours.update({"length": masks.context.shape[1], "relaxed": int(masks.relaxed.sum())})
        contexts, targets, relaxed = program_masks(grid, batch_size, min_keep)
        theirs.update(f"context {i}" for row in contexts for i in row)
        theirs.update(f"target {i}" for row in targets for target in row for i in target)
        theirs.update({"length": len(contexts[0]), "relaxed": sum(relaxed)})
    images = batches * batch_size
    assert 0.02 * images < theirs["relaxed"] < 0.98 * images, "the case says something about the rule"
    assert ours["relaxed"] / images == pytest.approx(theirs["relaxed"] / images, abs=0.05)
    assert ours["length"] / batches == pytest.approx(theirs["length"] / batches, rel=0.03)
    for i in range(64):
        assert ours[f"context {i}"] / images == pytest.approx(theirs[f"context {i}"] / images, abs=0.06)
        assert ours[f"target {i}"] / images == pytest.approx(theirs[f"target {i}"] / images, abs=0.12)
        if i // 8 == 7 or i % 8 == 7:
            assert ours[f"context {i}"] == ours[f"target {i}"] == 0, "the last row and column are never drawn"


def test_targets_are_given_up_from_the_last_to_the_first():
    """On this grid the context block is always the same, so the longest list of targets that fits is what is left."""
    sampler = JepaMaskSampler(
        (4, 4), targets=3, target_scale=(0.25, 0.25), target_aspect=(1, 1), context_scale=(1, 1), min_keep=2
    )
    square, given_up = {0, 1, 2, 4, 5, 6, 8, 9, 10}, Counter()
    for seed in range(100):
        torch.manual_seed(seed)
        masks = sampler(1)
        targets = [set(target) for target in masks.targets[0].tolist()]
        left = [square.difference(*targets[:count]) for count in (3, 2, 1)]
        number = next(i for i, patches in enumerate(left) if len(patches) > 2)
        assert set(masks.context[0].tolist()) == left[number]
        assert bool(masks.relaxed) is (number > 0)
        given_up[number] += 1
    assert given_up.keys() == {0, 1, 2}


def test_a_share_of_one_is_cut_to_the_grid_and_ends():
    masks = JepaMaskSampler((4, 4), min_keep=8, target_scale=(1, 1), target_aspect=(1, 1), context_scale=(1, 1))(3)
    square = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert masks.context.tolist() == [square] * 3
    assert masks.targets.tolist() == [[square] * 4] * 3
    assert masks.relaxed.all()


def test_draws_come_from_the_cpu_generator_and_from_nothing_else():
    sampler = JepaMaskSampler(PAPER)
    torch.manual_seed(3)
    first, second = sampler(4), sampler(4)
    torch.manual_seed(3)
    again = copy.deepcopy(pickle.loads(pickle.dumps(sampler)))(4)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))
    state = torch.get_rng_state()
    own = [sampler(4, torch.Generator().manual_seed(9)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*own, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_are_made_on_the_cpu_whatever_the_default_device_is():
    sampler = JepaMaskSampler((8, 8))
    with torch.device("meta"):
        masks = sampler(2)
    assert {part.device.type for part in masks} == {"cpu"}
    moved = masks.to(torch.device("meta"))
    assert (moved.context.device.type, moved.targets.device.type, moved.relaxed.device.type) == ("meta", "meta", "cpu")
    assert masks.to(torch.device("cpu")).context is masks.context


def test_masks_do_not_depend_on_the_default_dtype():
    sampler, masks = JepaMaskSampler((8, 8)), []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(1)
        torch.set_default_dtype(dtype)  # which Lightning does for 64-true
        try:
            masks.append(sampler(3))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (1, 8)}, r"`grid` must be >= 2, got 1"),
        ({"targets": 0}, r"`targets` must be >= 1"),
        ({"target_scale": (0.2, 0.15)}, r"`target_scale` must be an ordered pair inside \[0\.0, 1\.0\], got \(0\.2"),
        ({"context_scale": (0.5, 1.5)}, r"`context_scale` must be an ordered pair"),
        ({"target_scale": (0.0, 0.15)}, r"`target_scale` must start above 0"),
        ({"target_aspect": (1.5, 0.75)}, r"`target_aspect` must be an ordered pair"),
        ({"min_keep": -1}, r"`min_keep` must be >= 0"),
        ({"grid": (4, 4)}, r"`min_keep` must be below the 9 patches of the smallest context block on a grid of 4 x 4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        JepaMaskSampler(**({"grid": PAPER} | arguments))


def test_bad_batch_size():
    with pytest.raises(ValueError, match="`batch_size` must be >= 1"):
        JepaMaskSampler(PAPER)(0)


@pytest.mark.parametrize(("width", "side"), [(8, 3), (64, 7), (384, 14)])
def test_positions_equal_the_reference(width, side):
    expected = torch.from_numpy(get_2d_sine_cosine_positional_embedding(width, side, cls_token=False))
    torch.testing.assert_close(sincos_positions(width, (side, side)), expected, **f32(FORMULA))


def test_positions_of_an_oblong_grid():
    positions = sincos_positions(8, (2, 5)).view(2, 5, 8)
    assert torch.equal(positions[0, :, :4], positions[1, :, :4]), "the first half tells the column"
    assert torch.equal(positions[:, 0, 4:], positions[:, 3, 4:]), "the second half tells the row"
    torch.testing.assert_close(positions[1, 3, 0].item(), math.sin(3.0))


def small_predictor(**kwargs):
    torch.manual_seed(0)
    return JepaPredictor(10, (4, 4), **({"width": 16, "depth": 2, "heads": 2} | kwargs)).double()


def test_predictor_equals_plain_matrices_for_each_image_and_block():
    predictor = small_predictor()
    nn.init.normal_(predictor.leave.bias)
    tokens = torch.randn(2, 5, 10, dtype=torch.float64)
    context = torch.tensor([[0, 1, 2, 5, 6], [3, 4, 8, 9, 15]])
    targets = torch.tensor([[[10, 11], [3, 7], [12, 13]], [[0, 1], [1, 2], [5, 6]]])
    found = predictor(tokens, context, targets)
    assert found.shape == (2, 3, 2, 10)
    weights, positions = dict(predictor.named_parameters()), sincos_positions(16, (4, 4)).double()
    for b in range(2):
        seen = linear(tokens[b], weights, "enter") + positions[context[b]]
        for t in range(3):
            x = blocks(torch.cat([seen, predictor.mask_token + positions[targets[b, t]]]), weights, heads=2)
            torch.testing.assert_close(found[b, t], linear(norm(x[5:], weights, "norm"), weights, "leave"))


def test_predictor_starts_as_the_reference_does_and_trains_everything():
    predictor = JepaPredictor(96, (8, 8), width=64, depth=3, heads=4)
    for name, parameter in predictor.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name  # no division by depth
            assert parameter.abs().max() <= 2, name
    assert len(predictor.blocks) == 3
    out = predictor(torch.randn(2, 4, 96), torch.arange(8).view(2, 4), torch.arange(16).view(2, 2, 4))
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())
    assert "positions" not in predictor.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "`depth` must be >= 1"),
        ({"heads": 0}, "`heads` must be >= 1"),
        ({"heads": 3}, "`width` must be a multiple of the 3 heads, got 16"),
        ({"width": 18}, "`width` must be a multiple of 4, got 18"),
    ],
)
def test_bad_arguments_of_the_predictor(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_predictor(**arguments)


@pytest.mark.parametrize("contexts", [2, 3])
def test_several_contexts_of_an_image(contexts):
    torch.manual_seed(0)
    masks = JepaMaskSampler(PAPER, contexts=contexts, context_scale=(0.5, 0.6))(5)
    assert masks.context.shape[:2] == (5, contexts)
    assert masks.relaxed.shape == (5,)
    for image, targets, relaxed in zip(masks.context.tolist(), masks.targets.tolist(), masks.relaxed, strict=True):
        hidden = {patch for target in targets for patch in target}
        assert len({tuple(context) for context in image}) > 1, "contexts are drawn independently"
        for context in image:
            assert context == sorted(set(context))
            assert len(context) > 10
            assert relaxed or not hidden & set(context)


@pytest.mark.parametrize("grid", [PAPER, (8, 12)])
def test_disjoint_targets_share_no_patch_where_the_grid_has_space(grid):
    options = {"target_scale": (0.08, 0.1), "min_keep": 1}
    torch.manual_seed(0)
    overlapping = JepaMaskSampler(grid, **options)(50).targets.flatten(1)
    torch.manual_seed(0)
    masks = JepaMaskSampler(grid, disjoint_targets=True, **options)(50)
    disjoint = [len(set(row)) == len(row) for row in masks.targets.flatten(1).tolist()]
    assert sum(disjoint) >= 48  # a first three may leave no space for the fourth
    assert sum(len(set(row)) == len(row) for row in overlapping.tolist()) < 35
    for targets in masks.targets.tolist():
        for target in targets:
            top, left, height, width = block_of(target, grid)
            assert top < grid[0] - height and left < grid[1] - width  # noqa: PT018
    assert len({tuple(row) for row in masks.targets[:, 0].tolist()}) > 10, "positions are random"


def test_targets_that_do_not_fit_overlap_as_little_as_possible():
    masks = JepaMaskSampler((4, 4), targets=3, target_scale=(0.25, 0.25), target_aspect=(1.0, 1.0), min_keep=0,
                            disjoint_targets=True)(20)  # fmt: skip
    for first, second, _ in masks.targets.tolist():  # blocks of 2 x 2 with corners in 0..1 share at least one patch
        assert len(set(first) & set(second)) == 1


@pytest.mark.parametrize("contexts", [0, -1])
def test_the_number_of_contexts_is_checked(contexts):
    with pytest.raises(ValueError, match="`contexts` must be >= 1"):
        JepaMaskSampler(PAPER, contexts=contexts)

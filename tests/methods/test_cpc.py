"""CPC: what a context may see, the four directions, drawn negatives, patches without their neighbors, bad inputs."""

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.nn import GridContext, PatchGrid, replace_batchnorm
from lightning_contrast.nn.patch_grid import turn_grid
from tests.methods.cases import GRID, TinyBackbone
from tests.methods.test_contract import run_step
from tests.tolerances import FORMULA, NETWORK, assert_same_bits, f32

BATCH = [torch.rand(4, 3, 24, 20, generator=torch.Generator().manual_seed(0)), torch.arange(4)]  # 5 x 4 patches


def model(**kwargs):
    torch.manual_seed(0)
    return lc.CPC(TinyBackbone(), **(GRID | {"steps": 2, "optimizer": "sgd", "lr": 0.05} | kwargs))


def test_a_context_sees_its_row_and_rows_above_and_no_other():
    torch.manual_seed(0)
    context = GridContext(3, 4, layers=2, hidden_dim=5).double()
    maps = torch.randn(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    for row in range(6):
        (gradient,) = torch.autograd.grad(context(maps)[:, :, row].sum(), maps)
        seen = gradient.abs().sum((0, 1, 3)) > 0
        assert seen.tolist() == [row - 2 <= other <= row for other in range(6)], row
    (gradient,) = torch.autograd.grad(context(maps)[:, :, 5, 3].sum(), maps)
    assert (gradient.abs().sum((0, 1, 2)) > 0).tolist() == [1 <= column <= 5 for column in range(7)]


def test_patches_are_those_of_the_image_and_are_encoded_alone():
    grid = PatchGrid(nn.Flatten(), 8, 4, feature_dim=192)
    images = BATCH[0]
    maps = grid.maps(images)
    assert maps.shape == (4, 192, 5, 4)
    for row in range(5):
        for column in range(4):
            patch = images[:, :, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8]
            assert_same_bits(maps[:, :, row, column], patch.flatten(1))
    torch.testing.assert_close(grid(images), maps.mean((2, 3)), **f32(FORMULA))


def test_dropped_channels_leave_one():
    grid = PatchGrid(nn.Flatten(), 8, 4, feature_dim=192)
    torch.manual_seed(0)
    maps = grid.maps(BATCH[0] + 1, drop_channels=0.5).permute(0, 2, 3, 1).unflatten(3, (3, 64))
    left = (maps != 0).any(4).sum(3).flatten()
    assert {*left.tolist()} == {1, 3}
    assert 25 < (left == 1).sum() < 55  # of 80
    channel = (maps != 0).any(4).flatten(0, 2)[left == 1].float().argmax(1)
    assert {*channel.tolist()} == {0, 1, 2}


def losses_down(module, maps, targets, place=0):
    made = module.predictors[place](maps)
    offsets = range(module.skip + 1, module.skip + 1 + len(made))
    each = [losses.cpc_loss(made[k], targets, offset=offset) for k, offset in enumerate(offsets)]
    return torch.stack(each).mean()


def test_step_is_the_mean_over_offsets_and_directions():
    module = model(directions="all", skip=1, steps=2)
    maps = module.backbone.maps(BATCH[0])
    targets = module.target(maps)
    turns = [
        lambda x: x,
        lambda x: x.flip(2),
        lambda x: x.rot90(1, (3, 2)).flip(3),  # rows run from left to right
        lambda x: x.rot90(1, (2, 3)),  # from right to left
    ]
    with pytest.raises(ValueError, match=r"`images` must give more than 3 rows of patches, got \(3, 4\)"):
        run_step(module, [BATCH[0][:, :, :16], BATCH[1]])
    wide = torch.rand(4, 3, 24, 24)
    maps = module.backbone.maps(wide)
    targets = module.target(maps)
    expected = torch.stack([losses_down(module, turn(maps), turn(targets), i) for i, turn in enumerate(turns)]).mean()
    torch.testing.assert_close(run_step(module, [wide, BATCH[1]])["loss"], expected, **f32(NETWORK))


def test_turns_bring_each_side_to_the_lower_edge():
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 3], maps[0, 0, 0], maps[0, 0, 1:3, 3], maps[0, 0, 1:3, 0] = 1, 2, 3, 4  # lower, upper, right, left
    assert [float(turn_grid(maps, turn)[0, 0, 3, 1]) for turn in range(4)] == [1, 2, 3, 4]


def test_drawn_negatives():
    module = model(negatives=6)
    torch.manual_seed(3)
    loss = run_step(module, BATCH)["loss"]
    torch.manual_seed(3)
    maps = module.backbone.maps(BATCH[0])
    index = losses.draw_row_negatives(maps, steps=2, negatives=6, skip=0)
    context, weights = module.predictors[0](maps)
    assert weights.shape == (2, 8, 8)
    expected = losses.cpc_sampled_loss(context, maps, weights, index, negatives=6, skip=0)
    torch.testing.assert_close(loss, expected, **f32(NETWORK))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_batchnorm_is_replaced_where_the_backbone_is_a_name():
    def norms(module):
        return {type(part) for part in module.modules() if isinstance(part, nn.BatchNorm2d | nn.GroupNorm)}

    with torch.device("meta"):
        assert norms(lc.CPC("resnet18", **GRID)) == {nn.GroupNorm}
        assert nn.BatchNorm2d in norms(lc.CPC("resnet18", layer_norm=False, **GRID))
        assert nn.BatchNorm2d in norms(lc.CPC(TinyBackbone(norm=True), **GRID))
    patches = torch.rand(6, 3, 8, 8)
    network = replace_batchnorm(TinyBackbone(norm=True))
    alone = torch.cat([network(patch[None]) for patch in patches])
    torch.testing.assert_close(network(patches), alone, **f32(NETWORK))


def test_an_activation_inside_a_norm_of_timm_is_kept():
    from timm.layers import BatchNormAct2d

    replaced = replace_batchnorm(nn.Sequential(BatchNormAct2d(4)))
    assert (replaced(torch.randn(2, 4, 3, 3)) >= 0).all()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in replaced.modules())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "`steps` must be >= 1"),
        ({"skip": -1}, "`skip` must be >= 0"),
        ({"patch_size": 0}, "`patch_size` must be >= 1"),
        ({"stride": 0}, "`stride` must be >= 1"),
        ({"directions": "up"}, "`directions` must be one of 'down', 'all'"),
        ({"negatives": 0}, "`negatives` must be >= 1"),
        ({"drop_channels": 1.5}, r"`drop_channels` must lie in \[0, 1\]"),
        ({"logit_scale": 0.0}, "`logit_scale` must be > 0"),
        ({"context_layers": 0}, "`layers` must be >= 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


def test_a_grid_of_other_patches_is_refused():
    with pytest.raises(ValueError, match=r"`backbone` must cut patches \(8, 4\), got \(8, 8\)"):
        lc.CPC(PatchGrid(TinyBackbone(), 8, 8), **GRID)


def test_images_smaller_than_a_patch():
    with pytest.raises(ValueError, match=r"`images` must be at least 8 pixels wide and high, got \(7, 24\)"):
        model()(torch.rand(2, 3, 7, 24))

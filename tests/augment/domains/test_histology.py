"""Stain jitter, turns and the views of histology: distributions, what stays, bad inputs."""

import pytest
import torch

from lightning_contrast import augment
from lightning_contrast.augment.domains import histology_views
from lightning_contrast.augment.fused import FusedStainJitter, FusedTurn
from tests.tolerances import FORMULA, NETWORK, bound, f32


def tiles(count: int, edge: int = 8):
    """Tiles of tissue: random amounts of hematoxylin and eosin, (count, 3, edge, edge) in 0..1."""
    generator = torch.Generator().manual_seed(1)
    stains = torch.rand(count, 3, edge, edge, generator=generator) * torch.tensor([0.1, 0.1, 0.02]).view(3, 1, 1)
    return augment.hed_to_rgb(stains + 0.02)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_stain_jitter_has_the_given_rate_and_range(p):
    """Seen on the stains: of each tile a factor in 0.8..1.2 and an amount of at most 0.01, uniform in both."""
    torch.manual_seed(0)
    images = tiles(2000, 2)
    before = augment.rgb_to_hed(images).flatten(2)
    after = augment.rgb_to_hed(FusedStainJitter(0.2, 0.01, p=p)(images)).flatten(2)
    factor = (after[..., 0] - after[..., 1]) / (before[..., 0] - before[..., 1])
    clear = (before[..., 0] - before[..., 1]).abs() > 5e-3  # else a quotient of roundings
    changed = ((after - before).abs().amax((1, 2)) > bound(FORMULA)).float()
    assert changed.mean().item() == pytest.approx(p, abs=0.03)
    if p == 1:
        for stain in range(3):
            drawn = factor[clear[:, stain], stain]
            assert 0.79 < drawn.min() < 0.82
            assert 1.18 < drawn.max() < 1.21
            quartiles = drawn.quantile(torch.tensor([0.25, 0.5, 0.75]))
            torch.testing.assert_close(quartiles, torch.tensor([0.9, 1.0, 1.1]), atol=0.02, rtol=0)
        amount = after[..., 0] - factor * before[..., 0]
        amount = amount[clear.all(1)]
        assert amount.abs().max() < 0.0102
        assert amount.mean().abs() < 1e-3
        assert amount.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.07)
        assert torch.corrcoef(amount.T)[0, 1].abs() < 0.2  # one draw per stain
        factor = factor[clear.all(1)]
        assert torch.corrcoef(torch.stack([factor[:, 0], amount[:, 0]]))[0, 1].abs() < 0.2


def test_stain_jitter_equals_the_function():
    torch.manual_seed(0)
    images = tiles(6)
    jitter = FusedStainJitter(0.1, 0.01, p=0.5)
    views = jitter(images)
    params = jitter._params
    for image, view, jittered, factor, amount in zip(
        images, views, params["jittered"], params["factor"], params["amount"], strict=True
    ):
        expected = augment.stain_jitter(image[None], scale=factor.tolist(), shift=amount.tolist())[0]
        torch.testing.assert_close(view, expected if jittered else image, **f32(NETWORK))


def test_all_eight_orientations_are_equally_likely():
    torch.manual_seed(0)
    image = torch.arange(16.0).view(1, 1, 4, 4) / 16
    kinds = [torch.rot90(flipped, turns, (-2, -1)) for flipped in (image, image.flip(-2)) for turns in range(4)]
    views = FusedTurn(0.5)(image.expand(4000, -1, -1, -1))
    same = torch.stack([(views == kind).flatten(1).all(1) for kind in kinds], 1)
    assert same.sum(1).eq(1).all()
    torch.testing.assert_close(same.float().mean(0), torch.full((8,), 1 / 8), atol=0.02, rtol=0)
    only = FusedTurn(0.2, quarter_turns=False)(image.expand(4000, -1, -1, -1))
    rates = torch.stack([(only == kind).flatten(1).all(1) for kind in kinds], 1).float().mean(0)
    torch.testing.assert_close(rates, torch.tensor([0.8, 0, 0, 0, 0.2, 0, 0, 0]), atol=0.02, rtol=0)


def test_the_matrix_of_a_turn_maps_its_pixels():
    torch.manual_seed(0)
    images = torch.zeros(40, 1, 5, 5)
    images[:, :, 0, 3] = 1  # x = 3, y = 0: on no axis of symmetry
    turn = FusedTurn()
    views = turn(images)
    moved = (turn.transform_matrix @ torch.tensor([3.0, 0.0, 1.0]))[:, :2]
    places = views.flatten(1).argmax(1)
    assert torch.equal(moved, torch.stack([places % 5, places // 5], 1).float())
    assert len(places.unique()) == 8


@pytest.mark.parametrize("fused", [True, False])
def test_views_keep_the_stains_apart(fused):
    """The order of the tiles by hematoxylin survives two views, and each view differs from the tile."""
    torch.manual_seed(0)
    amounts = torch.linspace(0.02, 0.12, 32)
    stains = torch.zeros(32, 3, 16, 16)
    stains[:, 0], stains[:, 1] = amounts.view(-1, 1, 1), 0.05
    images = augment.hed_to_rgb(stains)
    for view in histology_views(16, fused=fused)(images):
        found = augment.rgb_to_hed(view.clamp(0, 1)).mean((2, 3))
        assert torch.corrcoef(torch.stack([found[:, 0], amounts]))[0, 1] > 0.9
        assert (view - images).abs().mean((1, 2, 3)).gt(1e-3).float().mean() > 0.7


def test_strengths_reach_the_operation():
    policy = histology_views(16, crop=(0.5, 0.9), stain_scale=0.3, stain_shift=0.02, stain_p=0.4)
    crop, turn, stain, *_ = policy.views[0].operations
    assert (crop.scale, stain.scale, stain.shift, stain.probability) == ((0.5, 0.9), 0.3, 0.02, 0.4)
    assert (turn.vertical_flip, turn.quarter_turns) == (0.5, True)


def test_a_spec_can_be_used_by_two_policies():
    """Every policy sets the backend of its own copies."""
    spec = augment.ViewSpec(8, (0.5, 1.0), first_operations=(FusedStainJitter(),))
    first, second = (augment.make_policy([spec], backend=backend) for backend in ("cpu", "accelerator"))
    assert [policy.views[0].operations[1].backend for policy in (first, second)] == ["cpu", "accelerator"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: histology_views(8, channels=1), "`channels` must be 3 for stains"),
        (lambda: histology_views(8, locations=True), "`locations` must be False with turns"),
        (lambda: histology_views(8, stain_scale=1.5), r"`scale` must lie in \[0, 1\]"),
        (lambda: histology_views(8, stain_shift=-0.1), "`shift` must be >= 0"),
        (lambda: histology_views(8, stain_p=2), r"`p` must lie in \[0, 1\]"),
        (lambda: histology_views(8, crop=(1.0, 0.4)), "`scale` must be an ordered pair"),
        (lambda: augment.ViewSpec(8, (0.5, 1), vertical_flip=2), r"`vertical_flip` must lie in \[0, 1\]"),
        (lambda: FusedTurn()(torch.rand(1, 3, 4, 5)), "`images` must be square"),
        (lambda: FusedStainJitter()(torch.rand(1, 4, 4, 4)), "have 3 channels for the stain jitter"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()

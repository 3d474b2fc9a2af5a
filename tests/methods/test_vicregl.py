"""VICRegL's own properties, and views that remember their places."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.augment import LocatedView, WholeImages, cell_locations
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import Data, run_step, step_batch, trainer

CASE = CASES["VICRegL"]


def coordinates(size):
    """Return images whose first two channels are the row and the column of each pixel's center, in 0..1."""
    at = (torch.arange(size) + 0.5) / size
    return torch.stack([at[:, None].expand(size, size), at.expand(size, size), torch.zeros(size, size)])[None]


@pytest.mark.parametrize("backend", ["cpu", "accelerator"])
def test_locations_are_where_the_pixels_come_from(backend):
    images = coordinates(40).expand(12, 3, 40, 40)
    policy = lc.VICRegL.views(24, local_views=1, backend=backend, color=False)
    for view in policy.views:
        view.operations = view.operations[:1]  # the crop alone
    torch.manual_seed(0)
    views = policy(images)
    assert [type(view) for view in views] == [LocatedView] * 3
    flipped = torch.cat([view.boxes[:, 4] for view in views])
    assert 0 < flipped.mean() < 1
    for view in views:
        size = view.shape[-1]
        places = cell_locations(view.boxes, size, size) / 40  # (B, h, w, 2)
        inner = (slice(None), slice(3, -3), slice(3, -3))  # at the border a crop has no neighbors
        shown = view.as_subclass(torch.Tensor)[:, :2].permute(0, 2, 3, 1)
        assert (places[inner] - shown[inner]).abs().max() < 0.01


def test_views_are_those_of_vicreg():
    images = torch.rand(6, 3, 40, 40)
    made = []
    for policy in (lc.VICRegL.views(32), lc.VICReg.views(32)):
        torch.manual_seed(0)
        made.append(policy(images))
    assert all(torch.equal(a.as_subclass(torch.Tensor), b) for a, b in zip(*made, strict=True))


def test_places_of_stretched_images_are_in_their_own_pixels():
    whole = WholeImages(torch.rand(40, 3, 32, 32), np.array([[64, 32], [32, 64], [16, 16], [64, 96]] * 10))
    torch.manual_seed(0)
    view = lc.VICRegL.views(16)(whole)[0]
    assert (view.boxes[:, :2] + view.boxes[:, 2:4] <= torch.from_numpy(whole.sizes) + 1e-3).all()
    assert view.boxes[3::4, 3].max() > 40  # the stretched image has 32 columns


def test_copies_and_casts_keep_the_boxes():
    view = LocatedView(torch.rand(2, 3, 4, 4), torch.rand(2, 5))
    for one in (view.to(torch.float64), pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
        assert torch.equal(one.boxes, view.boxes)
    assert type(view + 1) is torch.Tensor


@pytest.mark.slow
def test_a_fit_matches_places(tmp_path):
    module = lc.VICRegL(
        TinyBackbone(), region_layer="layers.3", hidden_dim=16, projection_dim=8, matches=(2, 2), warmup_epochs=0
    )
    run = trainer(tmp_path, CASE, epochs=1, limit_val_batches=0, limit_train_batches=2)
    run.callbacks = [c for c in run.callbacks if not isinstance(c, lc.ViewAugmentation)]
    run.callbacks.insert(0, lc.ViewAugmentation(lc.VICRegL.views(16, local_views=1, local_size=8)))
    run.fit(module, Data(8))
    assert {"train/global_loss", "train/local_loss"} <= run.callback_metrics.keys()
    assert run.callback_metrics["train/loss"].isfinite()


def test_loss_is_the_weighted_sum():
    views, _ = batch = step_batch(CASE)
    for weight in (0.0, 0.75, 1.0):
        module = make("VICRegL", global_weight=weight, variance_weight=5.0)
        embeddings = [module.projector(module.backbone(view)) for view in views]
        cells = [module.backbone.layers[:4](view) for view in views]  # (B, C, h, w)
        maps = [module.map_projector(cell.permute(0, 2, 3, 1).flatten(0, 2)).view(8, 16, 6) for cell in cells]
        places = module.locations(views, [(4, 4)] * 3)
        whole = lc.losses.vicregl_global_loss(embeddings, variance_weight=5.0)
        local = lc.losses.vicregl_local_loss(maps, places, variance_weight=5.0, matches=(2, 1))
        torch.testing.assert_close(run_step(module, batch)["loss"], weight * whole + (1 - weight) * local)


def test_expander_of_the_cells_equals_the_reference():
    module = lc.VICRegL(TinyBackbone(), region_layer="layers.3", hidden_dim=4, projection_dim=4)
    linears = [m for m in module.map_projector.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in linears] == [
        (8, 512, True),
        (512, 512, True),
        (512, 512, False),
    ]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`global_weight` must lie in \[0, 1\]"):
        make("VICRegL", global_weight=1.5)
    with pytest.raises(ValueError, match="`matches` must be two numbers"):
        make("VICRegL", matches=(1, 2, 3))
    with pytest.raises(ValueError, match="`covariance_weight` must be >= 0"):
        make("VICRegL", covariance_weight=-1.0)
    plain = lc.VICRegL(TinyBackbone(), region_layer="layers.3", hidden_dim=4, projection_dim=4, matches=(2, 2))
    with pytest.raises(
        ValueError, match=r"`views` must know their places in the image, got '0 that do'. Give `VICRegL"
    ):
        run_step(plain, step_batch(CASE))
    with pytest.raises(ValueError, match="`locations` must be False with `fused=False`"):
        lc.VICRegL.views(32, fused=False)

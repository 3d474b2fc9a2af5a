"""DenseCL's own properties."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_contrast as lc
from tests.methods.cases import CASES, TinyBackbone, fill_queue, make
from tests.methods.test_contract import run_step, step_batch

CASE = CASES["DenseCL"]


def maps(backbone, images):
    return backbone.layers[:4](images).flatten(2)


def test_loss_is_the_weighted_sum_of_mocos_and_that_of_the_cells():
    (view_q, view_k), _ = batch = step_batch(CASE)
    for weight in (0.0, 0.5, 1.0):
        module = fill_queue(make("DenseCL", dense_weight=weight, temperature=0.3))
        for _, other in module.momentum_pairs():
            for parameter in other.parameters():
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        networks = (module.backbone, module.momentum_backbone)
        heads = (module.projector, module.momentum_projector)
        dense_heads = (module.dense_projector, module.momentum_dense_projector)
        cells = [maps(network, view) for network, view in zip(networks, (view_q, view_k), strict=True)]
        grids = [
            torch.stack([head(image.T).T for image in both]) for head, both in zip(dense_heads, cells, strict=True)
        ]
        query, key = (
            head(network(view)) for head, network, view in zip(heads, networks, (view_q, view_k), strict=True)
        )
        rows, mask = module.queue.features, module.queue.mask
        expected = (1 - weight) * lc.losses.info_nce(query, key, rows, temperature=0.3, negatives_mask=mask)
        rows, mask = module.dense_queue.features, module.dense_queue.mask
        dense = lc.losses.dense_info_nce(*grids, *cells, rows, temperature=0.3, queue_mask=mask)
        out = run_step(module, batch)
        torch.testing.assert_close(out["loss"], expected + weight * dense)
        torch.testing.assert_close(out["keys"], F.normalize(key, dim=1))
        torch.testing.assert_close(out["dense_keys"], F.normalize(grids[1].mean(2), dim=1))
        torch.testing.assert_close(out["features"], module.backbone(view_q).detach())


def test_cells_come_from_the_last_stage():
    for backbone, layer, channels in (("resnet10t", "layer4", 512), ("small_convnet", "stages", 192)):
        module = lc.DenseCL(backbone, queue_size=4)
        assert (module.maps.layer, module.momentum_maps.layer) == (layer, layer)
        linears = [m for m in module.dense_projector.modules() if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in linears] == [(channels, channels), (channels, 128)]


def test_shuffled_keys_come_back_in_order():
    module = lc.DenseCL(nn.Sequential(nn.Conv2d(3, 8, 4, 4)), feature_dim=8, queue_size=4, batchnorm_splits=2)
    images = torch.rand(6, 3, 8, 8)
    found = module._keys(images)
    module.shuffle = False
    for shuffled, plain in zip(found, module._keys(images), strict=True):
        torch.testing.assert_close(shuffled, plain)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`dense_weight` must lie in \[0, 1\], got 2"):
        lc.DenseCL(TinyBackbone(), dense_weight=2)
    with pytest.raises(
        ValueError, match=r"`region_layer` must be the name of a submodule of TinyBackbone, got 'layer9'"
    ):
        lc.DenseCL(TinyBackbone(), region_layer="layer9")
    with pytest.raises(ValueError, match=r"`region_dim` must be given"):
        lc.DenseCL(TinyBackbone(), region_layer="layers.4")
    with pytest.raises(ValueError, match=r"`region_layer` must return a map \(B, C, H, W\) from the backbone"):
        run_step(lc.DenseCL(TinyBackbone(), queue_size=4), step_batch(CASE))

"""BYOL's own properties."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.optim import LARS
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, Data, run_step, step_batch, trainer

CASE = CASES["BYOL"]


def test_loss_is_the_sum_of_both_squared_distances():
    module = make("BYOL").eval()  # batch statistics do not depend on which pass comes first
    (view_a, view_b), _ = batch = step_batch(CASE)

    def distance(one, other):
        prediction = module.predictor(module.projector(module.backbone(one)))
        target = module.momentum_projector(module.momentum_backbone(other))
        return (F.normalize(prediction, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()

    expected = distance(view_a, view_b) + distance(view_b, view_a)
    torch.testing.assert_close(run_step(module, batch)["loss"], expected)


def test_heads_equal_the_reference():
    module = lc.BYOL(TinyBackbone(), hidden_dim=16, projection_dim=4)
    for head, width in ((module.projector, 8), (module.predictor, 4)):
        linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features, m.bias is not None) for m in linears] == [
            (width, 16, True),
            (16, 4, False),
        ]
    assert not any(module.predictor is online for online, _ in module.momentum_pairs())


@pytest.mark.slow
def test_paper_defaults(tmp_path):
    module = lc.BYOL(TinyBackbone(), hidden_dim=16, warmup_epochs=1)
    fit = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    optimizer = fit.optimizers[0]
    assert isinstance(optimizer, LARS)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.2 * BATCH / 256)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1.5e-6, 0.0}
    update = next(c for c in fit.callbacks if isinstance(c, MomentumUpdate))
    assert (update.start, update.end, update.schedule, update.buffers) == (0.996, 1.0, "cosine", "none")


def test_target_network_keeps_batch_statistics_of_its_own(tmp_path):
    module = make("BYOL", momentum=1.0)
    trainer(tmp_path, CASE, epochs=1, limit_val_batches=0).fit(module, Data(BATCH))
    online, target = (
        next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)) for net in module.momentum_pairs()[0]
    )
    assert (target.running_mean != 0).any()
    assert not torch.equal(online.running_mean, target.running_mean)


def test_own_heads_replace_both():
    projector, predictor = nn.Linear(8, 5), nn.Linear(5, 5)
    module = make("BYOL", projector=projector, predictor=predictor)
    assert (module.projector, module.predictor) == (projector, predictor)
    torch.testing.assert_close(module.momentum_projector.weight, projector.weight)


@pytest.mark.parametrize("momentum", [-0.01, 1.01])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\]"):
        lc.BYOL(TinyBackbone(), momentum=momentum)

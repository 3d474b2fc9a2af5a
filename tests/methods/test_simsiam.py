"""SimSiam's own properties."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_contrast as lc
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, Data, run_step, step_batch, trainer
from tests.tolerances import NETWORK, near, near64

CASE = CASES["SimSiam"]


def test_loss_is_minus_the_mean_cosine_and_the_target_gets_no_gradient():
    module = make("SimSiam").eval()
    (view_a, view_b), _ = batch = step_batch(CASE)
    z_a, z_b = (module.projector(module.backbone(view)) for view in (view_a, view_b))
    cosines = [F.cosine_similarity(module.predictor(one), other.detach()) for one, other in ((z_a, z_b), (z_b, z_a))]
    expected = -(cosines[0].mean() + cosines[1].mean()) / 2
    loss = run_step(module, batch)["loss"]
    torch.testing.assert_close(loss, expected)
    weight = module.backbone.layers[0].weight
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0])


def test_heads_equal_the_reference():
    module = lc.SimSiam(TinyBackbone(), projection_dim=32, predictor_dim=4)
    linears = [m for m in module.projector.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(8, 8), (8, 8), (8, 32)]
    assert [m.bias is None for m in linears] == [True, True, False]
    assert not linears[-1].bias.requires_grad
    assert [m.affine for m in module.projector.modules() if isinstance(m, nn.BatchNorm1d)] == [True, True, False]
    linears = [m for m in module.predictor.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in linears] == [(32, 4, False), (4, 32, True)]


@pytest.mark.parametrize("fixed", [True, False])
def test_the_predictor_keeps_its_rate(fixed, tmp_path):
    module = make("SimSiam", lr=0.1, fix_predictor_lr=fixed)
    fit = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    rates = {}
    for group in fit.optimizers[0].param_groups:
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    predictor = {rates[id(parameter)] for parameter in module.predictor.parameters()}
    encoder = {rates[id(parameter)] for parameter in module.backbone.parameters()}
    assert max(encoder) == near64(0, size=1), "the cosine has come to its end"
    assert predictor == ({0.1} if fixed else encoder)


def test_logs_the_spread_of_projections_that_shows_a_collapse():
    module, logged = make("SimSiam"), {}
    module.log = lambda name, value, **_: logged.update({name: value.item()})
    batch = step_batch(CASE)
    module.training_step(batch, 0)
    with torch.no_grad():
        unit = F.normalize(module.projector(module.backbone(batch[0][0])), dim=1)
    assert logged["train/projection_std"] == near(float(unit.std(0, correction=0).mean()) * 8**0.5, NETWORK)
    batch[0][0][:] = batch[0][0][:1]  # all images alike
    module.eval().training_step(batch, 0)
    assert logged["train/projection_std"] == near(0, NETWORK, size=1)

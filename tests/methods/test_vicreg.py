"""VICReg's own properties."""

import inspect

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.optim import LARS
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, Data, run_step, step_batch, trainer

CASE = CASES["VICReg"]


@pytest.mark.parametrize("epsilon", [1e-4, 0.2])
def test_loss_equals_the_reference(epsilon):
    module = make("VICReg", invariance_weight=3.0, variance_weight=5.0, covariance_weight=7.0, epsilon=epsilon)
    (view_a, view_b), _ = batch = step_batch(CASE)
    z_a, z_b = (module.projector(module.backbone(view)) for view in (view_a, view_b))  # batch statistics of one view
    expected = 3 * (z_a - z_b).square().mean()
    for z in (z_a, z_b):
        expected = expected + 5 * (1 - (z.var(0) + epsilon).sqrt()).relu().mean() / 2
        c = z.T.cov()
        expected = expected + 7 * sum(c[i, j] ** 2 for i in range(8) for j in range(8) if i != j) / 8
    out = run_step(module, batch)
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(out["features"], module.backbone(view_a).detach())


def test_constant_embeddings_give_the_floor():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, features):
            return self.weight.expand(len(features), 8)

    out = run_step(make("VICReg", projector=Constant()), step_batch(CASE))
    torch.testing.assert_close(out["loss"], torch.tensor(24.75))


def test_expander_equals_the_reference():
    module = lc.VICReg(TinyBackbone(), hidden_dim=16, projection_dim=4)
    linears = [m for m in module.projector.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in linears] == [
        (8, 16, True),
        (16, 16, True),
        (16, 4, False),
    ]


def test_paper_defaults(tmp_path):
    defaults = {name: p.default for name, p in inspect.signature(lc.VICReg).parameters.items()}
    assert (defaults["hidden_dim"], defaults["projection_dim"], lc.VICReg.default_warmup_epochs) == (8192, 8192, 10)
    weights = [defaults[f"{term}_weight"] for term in ("invariance", "variance", "covariance")]
    assert weights == [25.0, 25.0, 1.0]

    module = lc.VICReg(TinyBackbone(), hidden_dim=16, projection_dim=8, warmup_epochs=1)
    fit = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    optimizer = fit.optimizers[0]
    assert isinstance(optimizer, LARS)
    adapted, vectors = optimizer.param_groups
    for group in (adapted, vectors):
        assert group["initial_lr"] == pytest.approx(0.2 * BATCH / 256)
    assert (adapted["weight_decay"], adapted["adapt"], adapted["trust_form"]) == (1e-6, True, "A")
    assert (vectors["weight_decay"], vectors["adapt"]) == (0.0, False)
    assert [module.lr_factor(step, 10, 100) for step in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1, 0.001])


def test_batch_too_small_for_the_covariance():
    views, _ = step_batch(CASE)
    with pytest.raises(ValueError, match=r"`views` must have a batch of at least 2, got 1. Raise `batch_size`"):
        run_step(make("VICReg"), [[view[:1] for view in views], torch.arange(1)])
    assert run_step(make("VICReg"), [[view[:2] for view in views], torch.arange(2)])["loss"].isfinite()


@pytest.mark.parametrize("term", ["invariance", "variance", "covariance"])
def test_negative_weights(term):
    with pytest.raises(ValueError, match=f"`{term}_weight` must be >= 0"):
        lc.VICReg(TinyBackbone(), hidden_dim=8, projection_dim=8, **{f"{term}_weight": -1.0})

"""Barlow Twins' own properties."""

import inspect

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.optim import LARS
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, Data, run_step, step_batch, trainer

CASE = CASES["BarlowTwins"]


def test_loss_equals_the_reference():
    module = make("BarlowTwins", off_diagonal_weight=0.03)
    (view_a, view_b), _ = batch = step_batch(CASE)
    z_a, z_b = (module.projector(module.backbone(view)) for view in (view_a, view_b))  # batch statistics of one view
    norm = nn.BatchNorm1d(8, affine=False)
    c = norm(z_a).T @ norm(z_b) / BATCH
    expected = sum((1 - c[i, j]) ** 2 if i == j else 0.03 * c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)))
    out = run_step(module, batch)
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(out["features"], module.backbone(view_a).detach())


def test_equal_views_leave_the_off_diagonal_terms_only():
    module = make("BarlowTwins", off_diagonal_weight=0.0)
    (view, _), _ = step_batch(CASE)
    # what the epsilon of the standardisation leaves below 1 on the diagonal
    assert run_step(module, [[view, view.clone()], torch.arange(BATCH)])["loss"].item() < 0.1
    assert run_step(make("BarlowTwins"), [[view, view.clone()], torch.arange(BATCH)])["loss"].item() > 0


def test_head_equals_the_reference():
    module = lc.BarlowTwins(TinyBackbone(), hidden_dim=16, projection_dim=4)
    linears = [m for m in module.projector.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in linears] == [
        (8, 16, False),
        (16, 16, False),
        (16, 4, False),
    ]


@pytest.mark.slow
def test_paper_defaults(tmp_path):
    defaults = {name: p.default for name, p in inspect.signature(lc.BarlowTwins).parameters.items()}
    assert (defaults["hidden_dim"], defaults["projection_dim"]) == (8192, 8192)
    assert (defaults["off_diagonal_weight"], lc.BarlowTwins.default_warmup_epochs) == (0.0051, 10)

    module = lc.BarlowTwins(TinyBackbone(), hidden_dim=16, projection_dim=8, warmup_epochs=1)
    fit = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    optimizer = fit.optimizers[0]
    assert isinstance(optimizer, LARS)
    weights, vectors = optimizer.param_groups
    assert (weights["initial_lr"], weights["weight_decay"], weights["adapt"]) == (pytest.approx(0.2 / 32), 1e-6, True)
    assert (vectors["initial_lr"], vectors["weight_decay"], vectors["adapt"]) == (pytest.approx(0.0048 / 32), 0, False)
    assert (weights["trust_coefficient"], weights["trust_form"]) == (0.001, "A")
    assert [module.lr_factor(step, 10, 100) for step in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1, 0.001])


def lars_with_options(groups, lr):
    return LARS(groups, lr=lr, trust_form="B")


@pytest.mark.parametrize(
    ("optimizer", "share"), [("lars", 0.5), (LARS, 0.5), (lars_with_options, 0.5), ("sgd", 1.0), ("adamw", 1.0)]
)
def test_norms_and_biases_have_their_own_rate_with_lars_at_every_step(optimizer, share, tmp_path):
    module = make("BarlowTwins", optimizer=optimizer, vector_lr=0.5, warmup_epochs=1)
    rates = []
    module.on_train_batch_start = lambda *_: rates.append([g["lr"] for g in module.trainer.optimizers[0].param_groups])
    trainer(tmp_path, CASE, epochs=2, limit_val_batches=0).fit(module, Data(BATCH))
    assert len({weights for weights, _ in rates}) > 4
    for weights, vectors in rates:
        assert vectors == pytest.approx(share * weights)


def test_loss_scale_multiplies_the_loss():
    losses = [run_step(make("BarlowTwins", loss_scale=scale), step_batch(CASE))["loss"].item() for scale in (1.0, 0.1)]
    assert losses[1] == pytest.approx(0.1 * losses[0])


def test_batch_too_small_to_correlate():
    batch = [[view[:1] for view in step_batch(CASE)[0]], torch.arange(1)]
    with pytest.raises(ValueError, match=r"`views` must have a batch of at least 2, got 1. Raise `batch_size`"):
        run_step(make("BarlowTwins"), batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"off_diagonal_weight": -0.1}, "`off_diagonal_weight` must be >= 0"),
        ({"vector_lr": 0.0}, "`vector_lr` must be > 0"),
        ({"loss_scale": 0.0}, "`loss_scale` must be > 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lc.BarlowTwins(TinyBackbone(), hidden_dim=8, projection_dim=8, **arguments)

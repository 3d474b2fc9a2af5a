"""The spectral method's own properties."""

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import run_step, step_batch
from tests.tolerances import near


def test_loss_equals_the_reference():
    module = make("SpectralContrastive", mu=0.5).eval()
    (view_a, view_b), _ = batch = step_batch(CASES["SpectralContrastive"])
    a, b = (module.projector(module.backbone(view)).double() for view in (view_a, view_b))
    a, b = (z * torch.clamp(0.5**0.5 / z.norm(dim=1, keepdim=True), max=1) for z in (a, b))
    size = len(a)
    others = sum((a[i] @ b[j]) ** 2 for i in range(size) for j in range(size) if i != j) / (size * (size - 1))
    expected = (others - 2 * sum(a[i] @ b[i] for i in range(size)) / size) / 0.5
    assert run_step(module, batch)["loss"].item() == near(expected.item())


def test_head_equals_the_reference():
    module = lc.SpectralContrastive(TinyBackbone(), head_layers=3, hidden_dim=16, projection_dim=4)
    leaves = [type(m).__name__ for m in module.projector.modules() if not list(m.children())]
    assert leaves == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(m.affine for m in module.projector.modules() if isinstance(m, nn.BatchNorm1d))


def test_mu_is_checked():
    with pytest.raises(ValueError, match="`mu` must be > 0, got 0"):
        lc.SpectralContrastive(TinyBackbone(), mu=0)

"""The own properties of alignment and uniformity."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import step_batch
from tests.tolerances import NETWORK, near


def test_loss_and_what_is_logged_are_the_papers():
    module, logged = make("AlignUniform", align_weight=0.98, uniform_weight=0.5, t=3.0, alpha=1.0), {}
    module.log = lambda name, value, **_: logged.update({name: value.item()})
    (view_a, view_b), _ = batch = step_batch(CASES["AlignUniform"])
    both = F.normalize(module.projector(module.backbone(torch.cat([view_a, view_b]))), dim=1).double()
    a, b = both.chunk(2)
    align = (a - b).norm(dim=1).mean().item()
    uniform = sum(torch.pdist(z).square().mul(-3).exp().mean().log() for z in (a, b)).item() / 2
    loss = module.training_step(batch, 0)["loss"].item()
    assert loss == near(0.98 * align + 0.5 * uniform, NETWORK)
    assert logged == {
        "train/loss": loss,
        "train/alignment": near(align, NETWORK),
        "train/uniformity": near(uniform, NETWORK),
    }


def test_schedule_is_the_references_at_its_length():
    module = lc.AlignUniform(TinyBackbone())
    steps = (0, 154, 155, 169, 170, 184, 185, 199)
    assert [module.lr_factor(step, 0, 200) for step in steps] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])
    assert module.lr_factor(5, 10, 200) == 0.5
    assert module.base_lr * 768 / 256 == pytest.approx(0.36)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("align_weight", -1.0, "be >= 0"),
        ("uniform_weight", -1.0, "be >= 0"),
        ("alpha", 0.0, "be > 0"),
        ("t", 0.0, "be > 0"),
    ],
)
def test_numbers_are_checked(name, value, rule):
    with pytest.raises(ValueError, match=f"`{name}` must {rule}"):
        lc.AlignUniform(TinyBackbone(), **{name: value})

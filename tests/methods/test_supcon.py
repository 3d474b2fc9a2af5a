"""SupCon's own properties."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import run_step, step_batch
from tests.tolerances import near

CASE = CASES["SupCon"]


def dense_sup_con(z, labels, temperature, base):
    """L_out of the paper in plain loops."""
    z, total = F.normalize(z.detach().double(), dim=1), 0.0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        logits = {j: float(z[i] @ z[j]) / temperature for j in others}
        denominator = torch.tensor(list(logits.values())).double().exp().sum().log().item()
        positives = [j for j in others if labels[j] == labels[i]]
        total -= sum(logits[j] - denominator for j in positives) / len(positives)
    return temperature / base * total / len(z)


def test_loss_equals_the_reference():
    module = make("SupCon", temperature=0.3, base_temperature=0.07)
    (view_a, view_b), labels = step_batch(CASE)
    projections = module.projector(module.backbone(torch.cat([view_a, view_b])))
    expected = dense_sup_con(projections, labels.repeat(2), 0.3, 0.07)
    assert run_step(module, [[view_a, view_b], labels])["loss"].item() == near(expected)


def test_defaults_equal_the_reference():
    module = lc.SupCon(TinyBackbone())
    assert (module.temperature, module.base_temperature) == (0.1, 0.07)
    assert module.base_lr * 1024 / 256 == 0.5
    assert [module.lr_factor(step, 10, 100) for step in (0, 10, 100)] == pytest.approx([0.02, 1.0, 0.001])


@pytest.mark.parametrize("batch", [lambda views: views, lambda views: [views], lambda views: {"image": views}])
def test_missing_labels_are_told(batch):
    views, _ = step_batch(CASE)
    with pytest.raises(ValueError, match=r"`batch` must hold labels for SupCon, got 'none'\. Yield \(images, labels\)"):
        run_step(make("SupCon"), batch(views))


def test_labels_of_a_dict_batch():
    views, labels = step_batch(CASE)
    module = make("SupCon").eval()
    as_dict = run_step(module, {"image": views, "label": labels})["loss"]
    torch.testing.assert_close(as_dict, run_step(module, [views, labels])["loss"])


@pytest.mark.parametrize("name", ["temperature", "base_temperature"])
def test_temperatures_are_checked(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be > 0"):
        lc.SupCon(TinyBackbone(), **{name: 0.0})

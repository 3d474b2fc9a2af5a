"""Exemplar-CNN's own properties."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast.methods.exemplar_cnn import ExemplarClassifier
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import run_step, step_batch
from tests.tolerances import CANCELLING, f64

CASE = CASES["ExemplarCNN"]


def test_loss_is_the_cross_entropy_of_all_images():
    module = make("ExemplarCNN", dropout=0.0)
    (view,), _, indices = batch = step_batch(CASE)
    logits = F.linear(module.backbone(view), module.classifier.weight, module.classifier.bias)
    out = run_step(module, batch)
    torch.testing.assert_close(out["loss"], F.cross_entropy(logits, indices))
    torch.testing.assert_close(out["features"], module.backbone(view).detach())


def test_drawn_classes_estimate_the_sum_over_all_others():
    torch.manual_seed(0)
    classifier = ExemplarClassifier(4, 40).double()
    features, indices = torch.randn(3, 4, dtype=torch.float64), torch.tensor([5, 0, 39])
    own, every = classifier(features, indices, None)
    drawn = torch.randint(40, (400_000,))
    again, others = classifier(features, indices, drawn)
    torch.testing.assert_close(again, own)
    assert (others.isinf() == (drawn == indices[:, None])).all()
    exact = every.exp().sum(1)
    assert ((others.exp().sum(1) - exact).abs() < 0.01 * exact).all()  # six standard deviations


def test_a_draw_of_only_the_own_class_gives_zero_and_a_gradient():
    module = make("ExemplarCNN", num_samples=2, num_negatives=1, dropout=0.0)
    batch = step_batch(CASE)
    batch[2] = torch.zeros(8, dtype=torch.int64)
    for seed in range(4):
        torch.manual_seed(seed)
        module.zero_grad()
        loss = run_step(module, batch)["loss"]
        loss.backward()
        assert module.classifier.weight.grad.isfinite().all()


def of_rank(rank):
    torch.manual_seed(rank)
    module = make("ExemplarCNN drawn", norm=False).double()
    (view,), labels, indices = step_batch(CASE, torch.float64)
    rows = slice(0, 3) if rank == 0 else slice(3, 8)
    torch.manual_seed(rank)  # ranks draw differently, and use the draw of the first
    return run_step(module, [[view[rows]], labels[rows], indices[rows]])["loss"].detach()


@pytest.mark.dist
def test_unequal_ranks_share_the_drawn_classes():
    module = make("ExemplarCNN drawn", norm=False).double()
    torch.manual_seed(0)
    expected = run_step(module, step_batch(CASE, torch.float64))["loss"].detach()
    for found in run_processes(of_rank, 2):
        torch.testing.assert_close(found, expected, **f64(CANCELLING))


@pytest.mark.parametrize(("num_samples", "drawn"), [(50_000, 0), (50_001, 8192)])
def test_classes_are_drawn_above_50000(num_samples, drawn):
    assert lc.ExemplarCNN(TinyBackbone(), num_samples).num_negatives == drawn


def test_logits_are_float32_under_autocast():
    classifier, features = ExemplarClassifier(4, 40), torch.randn(3, 4)
    exact = classifier(features, torch.arange(3), None)
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(classifier(features, torch.arange(3), None), exact, strict=True):
            assert torch.equal(found, expected)


def test_the_learning_rate_falls_twice_and_views_keep_their_side():
    module = make("ExemplarCNN")
    factors = [module.lr_factor(step, 10, 1000) for step in (0, 5, 10, 599, 600, 799, 800)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01])
    crop, color = module.views(32).views[0].operations
    assert (crop.scale, crop.flip) == ((0.4, 1.0), 0.0)
    assert (color.brightness, color.hue, color.probability, color.grayscale) == (0.4, 0.1, 1.0, 0.0)


def test_bad_input():
    with pytest.raises(ValueError, match="`num_samples` must be >= 2, got 1"):
        lc.ExemplarCNN(TinyBackbone(), 1)
    with pytest.raises(ValueError, match=r"`dropout` must lie in \[0, 1\), got 1"):
        lc.ExemplarCNN(TinyBackbone(), 9, dropout=1)
    with pytest.raises(ValueError, match="`num_negatives` must be >= 0"):
        lc.ExemplarCNN(TinyBackbone(), 9, num_negatives=-1)
    with pytest.raises(ValueError, match=r"`indices` must lie in \[0, 9\), got \(0, 21\). Set `num_samples`"):
        run_step(lc.ExemplarCNN(TinyBackbone(), 9), step_batch(CASE))
    with pytest.raises(ValueError, match="`batch` must hold sample indices for ExemplarCNN"):
        run_step(lc.ExemplarCNN(TinyBackbone(), 9), step_batch(CASE)[:2])

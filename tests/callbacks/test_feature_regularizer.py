"""A regularizer of the features: its gradient, view by view, in every method's step, and what is refused."""

import math

import lightning as L
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.callbacks import FeatureRegularizer
from tests.callbacks.step_modules import QUIET, fit
from tests.callbacks.test_attribute_penalty import Steps, flat, loader
from tests.methods.cases import CASES
from tests.tolerances import CANCELLING, NETWORK, assert_same_bits, f32, f64, near, near64


class Direct(Steps):
    """The oracle: the regularizer of each of the three views is part of the loss."""

    def __init__(self, regularizer):
        super().__init__()
        self.regularizer = regularizer

    def training_step(self, batch, batch_idx):
        x, _ = batch
        views = [*self.backbone(torch.cat([x, x + 0.1])).chunk(2), self.backbone(x - 0.1)]
        loss = self.projector(torch.cat(views)).square().mean()
        self.value = sum(self.regularizer(view) for view in views) / 3
        return loss + 2.0 * self.value


def covariance(z):
    """VICReg's two terms by its formulas: the hinge of the standard deviations, and the mean squared covariance."""
    variance = torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
    found = z.T.cov()
    return variance + (found.square().sum() - found.diagonal().square().sum()) / z.shape[1] / 25


FORMULAS = {
    "covariance": covariance,
    "koleo": losses.koleo_loss,
    "log_det": losses.redundancy.naive_log_det_loss,
    "uniformity": losses.geometric.naive_uniformity,
}


@pytest.mark.parametrize("kind", [*FORMULAS, "own"])
def test_the_gradient_is_that_of_the_mean_over_the_views(kind):
    formula = FORMULAS.get(kind, covariance)
    ours, theirs, plain = Steps(), Direct(formula), Steps()
    trainer = fit(ours, [FeatureRegularizer(kind if kind in FORMULAS else covariance, weight=2.0)], loader())
    fit(theirs, [], loader())
    fit(plain, [], loader())
    torch.testing.assert_close(flat(ours.gradients), flat(theirs.gradients), **f32(NETWORK, size=0.1))
    assert float((flat(ours.gradients) - flat(plain.gradients)).norm() / flat(plain.gradients).norm()) > 0.01
    assert_same_bits(ours.losses[0], plain.losses[0], "the loss of the module is its own")
    name = kind if kind in FORMULAS else "covariance"  # of the function
    assert float(trainer.callback_metrics[f"regularizer/{name}"]) == near(float(theirs.value.detach()), NETWORK)
    assert not ours.backbone._forward_hooks


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=["more rows", "more dimensions"])
def test_the_covariance_of_a_view_is_vicregs_of_the_view_with_itself_and_has_one_pass(shape):
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7).requires_grad_()
    weights = {"invariance_weight": 0.0, "variance_weight": 1.0, "covariance_weight": 0.02}
    expected = losses.vicreg_loss(z, z, **weights)
    (wanted,) = torch.autograd.grad(expected, z)
    with FlopCounterMode(display=False) as counter:
        found = FeatureRegularizer("covariance").regularizer(z)
    assert float(found.detach()) == near64(float(expected.detach()))
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], wanted, **f64(CANCELLING, size=0.01))
    assert counter.get_total_flops() == 2 * shape[0] * shape[1] * min(shape)  # one product of the smaller size


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("name", ["SimCLR", "BYOL", "MoCo", "BarlowTwins", "SwAV", "NPID"])
def test_it_acts_on_methods(name):
    """The first step of SGD moves the backbone by the gradient of the method plus weight times the regularizer's."""
    case, moved = CASES[name], []
    for weight in (0.0, 1.0, 2.0):
        torch.manual_seed(0)
        settings = {"optimizer": "sgd", "lr": 0.5, "warmup_epochs": 0} | case.settings
        module = case.make(case.backbone(False), **settings)
        views = [torch.rand(8, 3, 16, 16) for _ in range(case.views)]
        batch = (views if case.views > 1 else views[0], torch.arange(8), torch.arange(8))
        data = torch.utils.data.DataLoader([batch], batch_size=None)
        regularizer = FeatureRegularizer("uniformity", weight=weight)
        trainer = L.Trainer(**(QUIET | {"max_epochs": 1, "callbacks": [regularizer]}))
        trainer.fit(module, data)
        moved.append(torch.cat([p.detach().flatten() for p in module.backbone.parameters()]))
        assert float(trainer.callback_metrics["regularizer/uniformity"]) < 0
    once, twice = moved[1] - moved[0], moved[2] - moved[0]
    assert float(once.norm()) > 0
    assert float((twice - 2 * once).norm() / twice.norm()) < 0.02


def test_log_det_is_lowest_for_orthogonal_and_highest_for_equal_features():
    z = torch.eye(6, dtype=torch.float64)
    assert float(losses.log_det_loss(z)) == near64(-0.5 * 6 * math.log(1 + 6 / (6 * 0.5)))
    assert float(losses.log_det_loss(torch.ones_like(z))) == near64(-0.5 * math.log(1 + 6 / 0.5))
    assert float(losses.log_det_loss(3 * z[:4])) == near64(float(losses.log_det_loss(z[:4])))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FeatureRegularizer("kolea"), ValueError, "Did you mean 'koleo'"),
        (lambda: FeatureRegularizer(3), TypeError, "`regularizer` must be a name or a function"),
        (lambda: FeatureRegularizer(weight=-1.0), ValueError, "`weight`"),
        (lambda: FeatureRegularizer(name=""), ValueError, "`name`"),
        (lambda: fit(Steps(), [FeatureRegularizer(features="backbones")], loader()), ValueError, "'backbone'"),
        (lambda: fit(Steps(), [FeatureRegularizer(features="unused")], loader()), ValueError, "be called in each step"),
        (lambda: losses.log_det_loss(torch.rand(1, 4)), ValueError, "`z` must have a batch of at least 2"),
        (lambda: losses.log_det_loss(torch.rand(4, 4), distortion=0.0), ValueError, "`distortion` must be > 0"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_it_is_public():
    assert lc.FeatureRegularizer is FeatureRegularizer

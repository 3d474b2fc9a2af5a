"""The penalty of a protected attribute: its gradient under every kind of run, and what is refused."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast import losses
from lightning_contrast.callbacks import AttributePenalty, GradientCache
from lightning_contrast.callbacks.attribute_penalty import GroupAdversary
from tests.callbacks.step_modules import QUIET, fit
from tests.callbacks.strategies import STRATEGIES, TakeWeights, fit_ranks, sharded
from tests.launch import run_processes
from tests.tolerances import NETWORK, assert_same_bits, bound, f32, near


class Steps(L.LightningModule):
    """Two views in one pass and one more in another; the loss reads the projections."""

    penalty = 0.0

    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.projector, self.unused = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Identity())
        self.lr, self.gradients, self.losses = lr, [], []

    def training_step(self, batch, batch_idx):
        x, groups = batch
        z = torch.cat([self.backbone(torch.cat([x, x + 0.1])), self.backbone(x - 0.1)])
        loss = self.projector(z).square().mean()
        self.losses.append(loss.detach())
        if self.penalty:  # the oracle: the loss with the penalty in it
            loss = loss + self.penalty * losses.hsic_loss(z, groups.repeat(3))
        return {"loss": loss}

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Direct(Steps):
    penalty = 5.0


class ByHand(Steps):
    """The same by manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx)["loss"])
        optimizer.step()


def loader(rows=8, batches=3, shuffle=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows * batches, 6, generator=generator)
    groups = (x[:, 0] > 0).long()
    groups[::5] = -1
    return DataLoader(TensorDataset(x, groups), batch_size=rows, shuffle=shuffle)


def flat(gradients):
    return torch.cat([gradient.flatten() for step in gradients for gradient in step])


def penalty(**kwargs):
    return AttributePenalty(1, **({"weight": 5.0} | kwargs))


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.01}, {"precision": "64-true"}]
)
def test_the_gradient_is_that_of_the_sum(settings):
    ours, theirs = Steps(), Direct()
    trainer = fit(ours, [penalty()], loader(), **settings)
    fit(theirs, [], loader(), **settings)
    torch.testing.assert_close(flat(ours.gradients), flat(theirs.gradients), **f32(NETWORK, size=0.1))
    plain = Steps()
    fit(plain, [], loader(), **settings)
    assert float((flat(ours.gradients) - flat(plain.gradients)).norm() / flat(plain.gradients).norm()) > 0.01
    assert_same_bits(ours.losses[0], plain.losses[0], "the loss of the module is its own")
    assert 0 < float(trainer.callback_metrics["attribute/hsic"]) < 0.5


def test_manual_optimization_and_bf16():
    ours, theirs = ByHand(), Direct()
    fit(ours, [penalty()], loader())
    fit(theirs, [], loader())
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), **f32(NETWORK))
    ours, theirs = Steps(), Direct()
    for module, callbacks in ((ours, [penalty()]), (theirs, [])):
        fit(module, callbacks, loader(), precision="bf16-mixed", limit_train_batches=1)
    torch.testing.assert_close(flat(ours.gradients), flat(theirs.gradients), rtol=2e-2, atol=2e-3)


def test_scaled_gradients():
    """With a gradient scaler the penalty is scaled as the loss is."""

    class Scaler:
        def scale(self, value):
            return 8 * value

    callback, module = penalty(), Steps()
    trainer = L.Trainer(**QUIET)
    trainer.precision_plugin.scaler = Scaler()
    module.log = lambda *args, **kwargs: None
    (x, groups), *_ = loader()
    callback.on_train_start(trainer, module)
    callback.on_train_batch_start(trainer, module, (x, groups), 0)
    loss = module.training_step((x, groups), 0)["loss"] * 8
    before = float(loss.detach())
    callback.on_before_backward(trainer, module, loss)
    callback.on_train_end(trainer, module)
    z = torch.cat([module.backbone(torch.cat([x, x + 0.1])), module.backbone(x - 0.1)])
    assert float(loss.detach()) - before == near(8 * 5 * float(losses.hsic_loss(z, groups.repeat(3)).detach()), NETWORK)


def test_a_weight_of_zero_and_removed_hooks_change_nothing():
    ours, plain, callback = Steps(), Steps(), penalty(weight=0.0)
    trainer = fit(ours, [callback], loader())
    fit(plain, [], loader())
    assert_same_bits(flat(ours.gradients), flat(plain.gradients))
    assert float(trainer.callback_metrics["attribute/hsic"]) > 0
    assert not ours.backbone._forward_hooks
    callback = penalty()
    with pytest.raises(RuntimeError):
        fit(ours, [callback], DataLoader(TensorDataset(torch.ones(8, 5), torch.ones(8).long()), batch_size=8))
    assert not ours.backbone._forward_hooks


def test_gradient_cache():
    ours, theirs = Steps(), Direct()
    fit(ours, [penalty(), GradientCache(3)], loader())
    fit(theirs, [], loader())
    torch.testing.assert_close(flat(ours.gradients), flat(theirs.gradients), **f32(NETWORK, size=0.1))


def test_it_lowers_the_dependence():
    found = []
    for weight in (0.0, 20.0):
        module, callback = Steps(lr=0.2), penalty(weight=weight)
        trainer = fit(module, [callback], loader(rows=24, batches=1), max_epochs=60)
        found.append(float(trainer.callback_metrics["attribute/hsic"]))
    assert found[1] < found[0] / 2


class Maps(Steps):
    """Tokens (B, N, D) or maps (B, D, H, W) as the penalized output."""

    def __init__(self, shape):
        super().__init__()
        self.layer, self.shape = nn.Linear(4, 12), shape

    def training_step(self, batch, batch_idx):
        z = self.unused(self.layer(self.backbone(batch[0])).unflatten(1, self.shape))
        self.seen = z.detach()
        return z.square().mean()


@pytest.mark.parametrize(("shape", "dims"), [((4, 3), 1), ((3, 2, 2), (2, 3))])
def test_tokens_and_maps_are_averaged(shape, dims):
    module = Maps(shape)
    trainer = fit(module, [penalty(features="unused")], loader(batches=1))
    (_, groups), *_ = loader(batches=1)
    expected = losses.hsic_loss(module.seen.mean(dims), groups)
    assert float(trainer.callback_metrics["attribute/hsic"]) == near(float(expected))


ADVERSARY = {"penalty": "adversary", "num_groups": 2, "adversary_lr": 0.05}


def test_an_adversary_reverses_the_gradient_of_its_cross_entropy_and_learns():
    """Against the formula, with the classifier as it was before the step; unknown groups are left out."""
    module, callback = Steps(), penalty(**ADVERSARY)
    trainer = fit(module, [callback], loader(batches=1))
    other = Steps()
    (x, groups), *_ = loader(batches=1)
    z = torch.cat([other.backbone(torch.cat([x, x + 0.1])), other.backbone(x - 0.1)])
    fresh = GroupAdversary(2, 0.05)
    network, _ = fresh._built(z)
    logits = network((z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt())
    entropy = nn.functional.cross_entropy(logits, groups.repeat(3), ignore_index=-1)
    loss = other.projector(z).square().mean() - 5.0 * entropy
    expected = torch.autograd.grad(loss, [*other.backbone.parameters(), *other.projector.parameters()])
    torch.testing.assert_close(flat(module.gradients), flat([expected]), **f32(NETWORK, size=0.1))
    assert float(trainer.callback_metrics["attribute/cross_entropy"]) == near(float(entropy.detach()))
    learned = callback.adversary.network
    assert not torch.equal(learned[0].weight, network[0].weight)
    assert all(weight.grad is not None for weight in learned.parameters())
    for _ in range(30):
        value = fresh.step(z.detach(), groups.repeat(3))
    assert float(value) < 0.5 * float(entropy.detach())


def test_an_adversary_resumes_exactly_and_ignores_batches_without_a_known_group():
    features, groups = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    first = GroupAdversary(2, 0.05)
    unknown = first.step(features.requires_grad_(), torch.full((8,), -1))
    (gradient,) = torch.autograd.grad(unknown, features)
    features = features.detach()
    assert float(unknown.detach()) == float(gradient.abs().max()) == 0.0
    first.step(features, groups)
    second = penalty(**ADVERSARY)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        assert_same_bits(first.step(features, groups), second.adversary.step(features, groups))
    assert_same_bits(second.state_dict()["network"], first.state_dict()["network"])
    other = GroupAdversary(2, 0.05)
    assert float(other.step(features, groups)) != float(first.step(features, groups))
    assert other.step(torch.randn(8, 5), groups).isfinite()  # of another module


@pytest.mark.slow
def test_an_adversary_lowers_the_dependence():
    found = []
    for weight in (0.0, 3.0):
        module, callback = Steps(lr=0.2), penalty(**ADVERSARY, weight=weight)
        fit(module, [callback], loader(rows=24, batches=1), max_epochs=60)
        (x, groups), *_ = loader(rows=24, batches=1)
        found.append(float(losses.hsic_loss(module.backbone(x).detach(), groups)))
    assert found[1] < found[0] / 2


def test_two_penalties_have_names_of_their_own_for_logs_and_checkpoints(tmp_path):
    first, second = (
        penalty(**ADVERSARY | {"adversary_lr": lr}, name=n) for n, lr in (("first", 0.01), ("second", 0.5))
    )
    trainer = fit(Steps(), [first, second], loader())
    found = [float(trainer.callback_metrics[f"{name}/cross_entropy"]) for name in ("first", "second")]
    assert found[0] != found[1]
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    for one in (first, second):
        assert_same_bits(saved[one.state_key]["network"], one.state_dict()["network"])
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AttributePenalty`"):
        fit(Steps(), [penalty(), penalty()], loader())


@pytest.mark.dist
@pytest.mark.parametrize(("name", "kind"), [*((name, {}) for name in STRATEGIES), (next(iter(STRATEGIES)), ADVERSARY)])
def test_two_ranks_equal_one_process(name, kind):
    """Over the global batch: the weights of a penalized run on two ranks are those of one process."""

    def work(rank):
        taken = TakeWeights()
        module = sharded(Steps)(lr=0.5)
        module.on_before_optimizer_step = lambda optimizer: None
        halves = [half for x, g in loader() for half in [(x[rank * 4 : rank * 4 + 4], g[rank * 4 : rank * 4 + 4])]]
        data = DataLoader(halves, batch_size=None)
        fit_ranks(module, [penalty(**kind), taken], data, name, use_distributed_sampler=False)
        return taken.history[-1]

    class Whole(Steps):
        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                parameter.grad.clamp_(-1e9, 1e9)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    module = Whole(lr=0.5)
    fit(module, [penalty(**kind)], loader())
    expected = {key: value.detach() for key, value in module.named_parameters()}
    for found in run_processes(work, 2):
        torch.testing.assert_close(found, expected, rtol=bound(NETWORK), atol=bound(NETWORK))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: AttributePenalty(None), TypeError, "`labels`"),
        (lambda: AttributePenalty(1.5), TypeError, "`labels`"),
        (lambda: AttributePenalty(1, weight=-1.0), ValueError, "`weight`"),
        (lambda: AttributePenalty(1, bandwidth=0.0), ValueError, "`bandwidth`"),
        (lambda: AttributePenalty(1, name=""), ValueError, "`name`"),
        (lambda: AttributePenalty(1, penalty="hsci"), ValueError, "Did you mean 'hsic'"),
        (lambda: AttributePenalty(1, penalty="adversary"), ValueError, "`num_groups` must be given"),
        (lambda: AttributePenalty(1, penalty="adversary", num_groups=1), ValueError, "`num_groups` must be >= 2"),
        (lambda: AttributePenalty(1, adversary_lr=0.0), ValueError, "`adversary_lr` must be > 0"),
        (
            lambda: fit(Steps(), [AttributePenalty(lambda b: b[1] + 1, penalty="adversary", num_groups=2)], loader()),
            ValueError,
            "`labels` must be below `num_groups` = 2",
        ),
        (lambda: fit(Steps(), [penalty(features="backbones")], loader()), ValueError, "'backbone'"),
        (lambda: fit(Steps(), [penalty(features="unused")], loader()), ValueError, "be called in each step"),
        (lambda: fit(Steps(), [AttributePenalty(2)], loader()), ValueError, "`labels` must be an index"),
        (lambda: fit(Steps(), [AttributePenalty(0)], loader()), TypeError, "`labels`"),
        (lambda: fit(Steps(), [AttributePenalty(lambda b: b[1][:3])], loader()), ValueError, "be 8, one for each"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()

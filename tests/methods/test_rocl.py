"""RoCL and AdversarialView: official values, what an attack leaves as it was, where it is refused."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.nn import functional as F

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.augment import pgd_attack, pgd_step
from lightning_contrast.callbacks import GradientCache
from lightning_contrast.runtime.adversarial_pass import refuse_fsdp1
from tests.callbacks.probe_modules import random_state
from tests.callbacks.strategies import CPUFSDPStrategy
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, BATCHES, PIXELS, data, run_step, state, trainer
from tests.tolerances import CANCELLING, FORMULA, NETWORK, bound, f32, f64, near

RECORDS = {
    record["name"]: record
    for record in json.loads(
        (Path(__file__).parents[1] / "losses" / "official_adversarial.json").read_text(encoding="utf-8")
    )
}


def inputs_of(name):
    record = RECORDS[name]
    return {key: torch.tensor(value) for key, value in record["inputs"].items()}, record["params"], record


@pytest.mark.parametrize(("name", "loss"), [("rocl_three_views", losses.rocl_loss), ("acl_nt_xent", losses.nt_xent)])
def test_losses_equal_the_reference_implementation(name, loss):
    inputs, params, record = inputs_of(name)
    found = loss(*(z.requires_grad_() for z in inputs.values()), **params)
    found.backward()
    assert float(found.detach()) == near(record["loss"])
    for key, norm in record["grad_norm"].items():
        assert float(inputs[key].grad.norm()) == near(norm, NETWORK), key


def test_a_step_equals_the_reference_implementation():
    inputs, params, record = inputs_of("pgd_step")
    torch.testing.assert_close(pgd_step(**inputs, **params), torch.tensor(record["value"]), **f32(FORMULA, size=1.0))


def test_the_attack_equals_the_reference_implementation():
    inputs, params, record = inputs_of("rocl_attack")

    def embed(images):
        return images.flatten(1) @ inputs["encoder"].T @ inputs["projector"].T

    def loss(images):
        return losses.rocl_loss(embed(images), embed(inputs["view_b"]), temperature=params["temperature"])

    settings = {key: params[key] for key in ("epsilon", "step_size", "steps")}
    found = pgd_attack(loss, inputs["view_a"], **settings, random_start=False)
    different = (found - torch.tensor(record["value"])).abs() > 1e-3
    assert different.float().mean() <= 0.01  # of pixels whose gradient is near 0
    assert float(loss(found)) / params["weight"] == pytest.approx(record["loss"], rel=1e-3)


def test_three_views_are_twice_the_mean_of_the_pairs_and_two_are_nt_xent():
    a, b, c = torch.randn(3, 6, 4, dtype=torch.float64)
    z = F.normalize(torch.stack([a, b, c], 1).flatten(0, 1), dim=1)
    logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    pairs = [
        logits[3 * n + i].logsumexp(0) - logits[3 * n + i, 3 * n + j]
        for n in range(6)
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    expected = 2 * torch.stack(pairs).mean()
    torch.testing.assert_close(losses.rocl_loss(a, b, c, temperature=0.5), expected, **f64(FORMULA))
    two = losses.nt_xent(a, b, temperature=0.5)
    torch.testing.assert_close(losses.rocl_loss(a, b, temperature=0.5), two, **f64(FORMULA))


def test_the_attack_stays_in_ball_and_range_and_raises_the_loss():
    torch.manual_seed(0)
    images, weights = torch.rand(4, 3, 5, 5), torch.randn(75)

    def loss(x):
        return (x.flatten(1) @ weights).square()

    settings = {"epsilon": 0.05, "step_size": 0.02, "steps": 4}
    found = pgd_attack(loss, images, **settings, random_start=True)
    assert (found - images).abs().max() <= 0.05 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert loss(found).sum() > loss(images).sum()
    assert not found.requires_grad
    assert torch.equal(pgd_attack(loss, images, epsilon=0.0, step_size=0.1, steps=2), images)
    assert torch.equal(pgd_attack(loss, images, epsilon=0.1, step_size=0.1, steps=0), images)
    drawn = [
        pgd_attack(loss, images, **settings, random_start=True, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def pixels(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(BATCH, 3, PIXELS, PIXELS, generator=generator) for _ in range(2)]


def test_the_step_is_that_of_three_views():
    module = make("RoCL", norm=False, random_start=False, adversarial_weight=0.25).double()
    a, b = (view.double() for view in pixels())
    with torch.no_grad():
        target = module.projector(module.backbone(b.sigmoid()))

    def loss(images):
        return losses.rocl_loss(module.projector(module.backbone(images)), target, temperature=0.5)

    adversarial = pgd_attack(loss, a.sigmoid(), epsilon=0.0314, step_size=0.007, steps=2)
    z = [module.projector(module.backbone(x)) for x in (a.sigmoid(), b.sigmoid(), adversarial)]
    expected = losses.rocl_loss(*z, temperature=0.5) + 0.25 * losses.rocl_loss(z[2], z[1], temperature=0.5)
    torch.testing.assert_close(run_step(module, [[a, b]])["loss"], expected, **f64(CANCELLING))


@pytest.mark.parametrize("kind", ["method", "callback"])
def test_an_attack_changes_nothing_but_the_view(kind):
    module = make("RoCL" if kind == "method" else "SimCLR")
    module.train()
    module.backbone.layers[2].eval()  # modes are restored one by one
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    attack = lc.AdversarialView(steps=2).attack if kind == "callback" else module.attack
    a, b = pixels()
    before, modes = state(module), [layer.training for layer in module.modules()]
    torch.manual_seed(3)
    random = random_state()
    networks = [module.backbone, module.projector]
    found = attack.view(networks, lambda x, y: losses.rocl_loss(x, y, temperature=0.5), a, b, seed=(0,))
    assert not torch.equal(found, a)
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())
    assert all(bool((parameter.grad == 1).all()) for parameter in module.parameters())
    assert [layer.training for layer in module.modules()] == modes
    assert torch.equal(random[0], random_state()[0])
    assert random[1:] == random_state()[1:]


def fit(tmp_path, callbacks, name="SimCLR", **settings):
    """Run an epoch and return the module and the views that its steps got."""
    seen = []

    def see(trainer, pl_module, batch, batch_idx):
        seen.append([view.clone() for view in batch[0]])

    module = make(name)
    run = trainer(
        tmp_path,
        CASES[name],
        epochs=1,
        limit_val_batches=1,
        callbacks=[*callbacks, LambdaCallback(on_train_batch_start=see)],
        **settings,
    )
    for callback in run.callbacks:
        if isinstance(callback, lc.ViewAugmentation):
            callback.policy.forward = lambda images: [images.float() / 255, images.float().flip(3) / 255]
    run.fit(module, data(name))
    return module, seen


@pytest.mark.slow
def test_the_callback_replaces_a_view_or_adds_one(tmp_path):
    _, plain = fit(tmp_path, [])
    _, replaced = fit(tmp_path, [lc.AdversarialView(0.05, 0.03, steps=2)])
    _, added = fit(tmp_path, [lc.AdversarialView(0.05, 0.03, steps=2, view=1, other=0, add=True)])
    assert len(plain) == len(replaced) == BATCHES
    assert torch.equal(plain[0][1], replaced[0][1])
    gap = (plain[0][0] - replaced[0][0]).abs()
    assert 0.01 < gap.max() <= 0.05 + 1e-6
    assert all(torch.equal(a, b) for a, b in zip(plain[0], added[0], strict=False))
    assert len(added[0]) == 3
    assert 0.01 < (added[0][2] - plain[0][1]).abs().max() <= 0.05 + 1e-6


@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"chunk": 3}], ids=["bf16", "GradientCache"])
@pytest.mark.slow
def test_the_callback_works_in_bf16_and_with_a_gradient_cache(settings, tmp_path):
    settings = dict(settings)
    more = [GradientCache(settings.pop("chunk"))] if "chunk" in settings else []
    module, seen = fit(tmp_path, [lc.AdversarialView(0.05, 0.03, steps=2), *more], **settings)
    _, plain = fit(tmp_path, [])
    assert 0.01 < (seen[0][0] - plain[0][0]).abs().max() <= 0.05 + 1e-6
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.slow
def test_an_epsilon_of_zero_changes_no_run(tmp_path):
    plain, _ = fit(tmp_path, [])
    attacked, _ = fit(tmp_path, [lc.AdversarialView(epsilon=0.0, steps=2, random_start=True)])
    assert all(torch.equal(value, state(attacked)[name]) for name, value in state(plain).items())


def test_pixels_are_those_before_the_normalization():
    callback = lc.AdversarialView(0.05, 0.03, steps=2)
    module = make("SimCLR", norm=False)

    class Policy:
        input_spec = {"size": PIXELS, "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 0.2)}  # noqa: RUF012

    class Views(L.Callback):
        policy = Policy()

    run = L.Trainer(logger=False, accelerator="cpu", callbacks=[Views()], enable_progress_bar=False)
    run.strategy._lightning_module = module
    callback._trainer = run
    mean, std = (torch.tensor(Policy.input_spec[key])[:, None, None] for key in ("mean", "std"))
    a, b = ((view - mean) / std for view in pixels())
    (found, other), _ = callback._attacked([[a, b], torch.arange(BATCH)])
    assert torch.equal(other, b)
    changed = ((found - a) * std).abs().amax((0, 2, 3))
    assert bool((changed <= 0.05 + 1e-6).all())
    assert bool((changed > 0.04).all())


def attacked_of_rank(rank, world):
    module = make("RoCL", norm=False, random_start=False).double()
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    a, b = (view.double()[rows] for view in pixels())
    return module.attack.view([module.backbone, module.projector], module.contrast, a, b, seed=(0,))


@pytest.mark.dist
def test_two_ranks_attack_as_one():
    alone = attacked_of_rank(0, 1)
    both = torch.cat(run_processes(attacked_of_rank, 2, 2))
    different = (both - alone).abs() > bound(NETWORK)
    assert different.float().mean() < 0.01  # signs of gradients near 0


def test_fsdp1_is_refused_by_name():
    run = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    refuse_fsdp1(run, "RoCL")

    class Sharded:
        strategy = CPUFSDPStrategy()

    with pytest.raises(ValueError, match="`strategy` must not be FSDP1 with RoCL"):
        refuse_fsdp1(Sharded(), "RoCL")


A = torch.rand(2, 3, 4, 4)
STEP = {"gradient": A, "start": A, "epsilon": 0.1, "step_size": 0.1}
BALL = {"epsilon": 0.1, "step_size": 0.1, "steps": 1}
VALUE_ERRORS = {
    "method's epsilon": (lambda: lc.RoCL(TinyBackbone(), epsilon=-0.1), "`epsilon` must be >= 0"),
    "epsilon of 255 levels": (lambda: lc.AdversarialView(epsilon=8), "`epsilon` must be <= 1, got 8"),
    "method's steps": (lambda: lc.RoCL(TinyBackbone(), steps=-1), "`steps` must be >= 0"),
    "weight": (lambda: lc.RoCL(TinyBackbone(), adversarial_weight=-1.0), "`adversarial_weight` must be >= 0"),
    "method's temperature": (lambda: lc.RoCL(TinyBackbone(), temperature=0.0), "`temperature` must be > 0"),
    "epsilon": (lambda: lc.AdversarialView(epsilon=-1 / 255), "`epsilon` must be >= 0"),
    "step size": (lambda: lc.AdversarialView(step_size=-1.0), "`step_size` must be >= 0"),
    "one view": (lambda: lc.AdversarialView(view=1, other=1), "`other` must be another view"),
    "no module": (lambda: lc.AdversarialView(modules=()), "`modules` must name at least one"),
    "attack": (lambda: pgd_attack(torch.sum, A, **BALL | {"epsilon": -0.1}), "`epsilon` must be >= 0"),
    "range": (lambda: pgd_attack(torch.sum, A, **BALL, low=1.0, high=0.0), "`low` must lie below"),
    "constant": (lambda: pgd_attack(lambda x: x.detach().sum(), A, **BALL), "`loss_fn` must depend on the images"),
    "step": (lambda: pgd_step(A, **STEP | {"start": A[:1]}), "`images` must have the shape of"),
    "step's epsilon": (lambda: pgd_step(A, **STEP | {"epsilon": -1.0}), "`epsilon` must be >= 0"),
    "loss": (lambda: losses.rocl_loss(A[:, 0, 0], A[:, 0, 0], temperature=0.0), "`temperature` must be > 0"),
    "shapes": (lambda: losses.rocl_loss(A[:, 0, 0], A[:1, 0, 0], temperature=1.0), "must have the same"),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_bad_values_are_refused(name):
    call, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_are_refused():
    with pytest.raises(TypeError, match="`images` must be floating point"):
        pgd_attack(torch.sum, A.long(), **BALL)
    with pytest.raises(TypeError, match="`loss` must be callable"):
        lc.AdversarialView(loss=3)


@pytest.mark.slow
def test_normalized_views_and_missing_views_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`views` must lie in 0\.\.1 for an attack"):
        lc.RoCL(TinyBackbone()).training_step([[torch.randn(4, 3, 8, 8)] * 2], 0)
    with pytest.raises(ValueError, match="`batch` must hold at least 4 views"):
        fit(tmp_path, [lc.AdversarialView(view=3)])
    with pytest.raises(ValueError, match="`modules` must be one of"):
        fit(tmp_path, [lc.AdversarialView(modules=("encoder",))])

"""AdversarialView's auxiliary BatchNorm and its worst of several views."""

import copy
import pickle
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn

import lightning_contrast as lc
from lightning_contrast import augment, losses
from lightning_contrast.augment.domains import satellite_views
from lightning_contrast.callbacks import GradientCache
from lightning_contrast.nn.auxiliary_batchnorm import (
    NAME,
    MarkedRows,
    add_auxiliary_batchnorm,
    route,
    unroute,
    without_auxiliary,
)
from lightning_contrast.runtime.adversarial_pass import worst_view
from tests.callbacks.probe_modules import random_state
from tests.callbacks.step_modules import QUIET
from tests.launch import run_processes
from tests.methods.cases import CASES, make
from tests.methods.matrix_runs import PATIENCE, Record, batches, run, strategy
from tests.methods.test_contract import BATCH, BATCHES, assert_equal_states, data, state, trainer
from tests.tolerances import NETWORK, f32

ATTACK = {"epsilon": 0.1, "step_size": 0.05, "steps": 2, "auxiliary_batchnorm": True}


def fit(folder, name="SimCLR", module=None, callbacks=(), attack=None, ckpt_path=None, **settings):
    """Run some steps, and return the module and the views of each step."""
    seen = []

    def see(trainer, pl_module, batch, batch_idx):
        seen.append([view.clone() for view in batch[0]])

    module = make(name) if module is None else module
    callbacks = [lc.AdversarialView(**(attack or ATTACK)), *callbacks, LambdaCallback(on_train_batch_start=see)]
    settings = {"epochs": 1, "limit_val_batches": 1} | settings
    run = in_range(trainer(folder, CASES[name], callbacks=callbacks, **settings))
    run.fit(module, data(name), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return module, seen


def in_range(run):
    """Let the views of a Trainer be pixels in 0..1."""
    for callback in run.callbacks:
        if isinstance(callback, lc.ViewAugmentation):
            callback.policy.forward = lambda images: [images.float() / 255, images.float().flip(3) / 255]
    return run


def norms(module):
    """Return pairs of the two sets of each BatchNorm."""
    return [(norm, getattr(norm, NAME)) for norm in module.modules() if hasattr(norm, NAME)]


@pytest.mark.slow
def test_each_set_has_the_statistics_of_its_views(tmp_path):
    module = make("SimCLR")
    first = copy.deepcopy(module.backbone.layers[0])
    _, seen = fit(tmp_path, module=module, limit_train_batches=1, limit_val_batches=0)
    clean, attacked = first(seen[0][1].as_subclass(torch.Tensor)), first(seen[0][0].as_subclass(torch.Tensor))
    main, auxiliary = norms(module.backbone)[0]
    for norm, rows in ((main, clean), (auxiliary, attacked)):
        torch.testing.assert_close(norm.running_mean, 0.1 * rows.mean((0, 2, 3)), **f32(NETWORK))
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * rows.transpose(0, 1).flatten(1).var(1), **f32(NETWORK))
        assert int(norm.num_batches_tracked) == 1


def test_a_step_is_that_of_a_network_with_a_batchnorm_for_each_kind():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))
    main, other = copy.deepcopy(network), copy.deepcopy(network)
    owner = nn.Module()
    owner.network = network
    assert add_auxiliary_batchnorm(owner) == add_auxiliary_batchnorm(owner) == 2
    route(owner)
    clean, attacked, weights = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.randn(12, 5)
    rows = torch.cat([MarkedRows(clean, ((4, False),)), MarkedRows(attacked, ((4, True),))])
    rows = torch.cat([rows, MarkedRows(clean.flip(0), ((4, False),))])
    found = network(rows)
    assert found.parts == ((4, False), (4, True), (4, False))
    by_main, by_other = main(torch.cat([clean, clean.flip(0)])), other(attacked)
    expected = torch.cat([by_main[:4], by_other, by_main[4:]])
    torch.testing.assert_close(found.plain, expected, **f32(NETWORK))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    shared = main[0].weight.grad + other[0].weight.grad
    torch.testing.assert_close(network[0].weight.grad, shared, **f32(NETWORK, size=10))
    for place in (1, 4):
        torch.testing.assert_close(network[place].weight.grad, main[place].weight.grad, **f32(NETWORK, size=10))
        auxiliary = getattr(network[place], NAME)
        torch.testing.assert_close(auxiliary.weight.grad, other[place].weight.grad, **f32(NETWORK, size=10))
        torch.testing.assert_close(network[place].running_var, main[place].running_var, **f32(NETWORK))
        torch.testing.assert_close(auxiliary.running_var, other[place].running_var, **f32(NETWORK))
    unroute(owner)
    assert all("forward" not in vars(child) for child in owner.modules())
    assert torch.equal(network.eval()(clean), main.eval()(clean))


def test_marks_stay_with_their_rows():
    views = [MarkedRows(torch.full((2, 3, 4, 4), float(kind)), ((2, kind),)) for kind in (False, True)]
    joined = torch.cat([*views, views[0]])
    assert joined.parts == ((2, False), (2, True), (2, False))
    for changed in (joined.float(), joined.flatten(1), joined.clone(), joined.to(torch.float64)):
        assert changed.parts == joined.parts
    for part in (*joined.split([1, 3, 2]), *joined.chunk(3), joined[1:5]):
        kinds = [kind for rows, kind in part.parts for _ in range(rows)]
        assert kinds == part[:, 0, 0, 0].bool().tolist()
    assert views[1].flip(0).parts == ((2, True),)
    assert views[1][torch.tensor([1, 0, 1])].parts == ((3, True),)
    for lost in (joined.flip(0), joined.flatten(1) + 1, joined.mean(), torch.stack([joined, joined]), joined.detach()):
        assert type(lost) is torch.Tensor
    copied = pickle.loads(pickle.dumps(joined))
    assert copied.parts == joined.parts


@pytest.mark.parametrize("name", ["SimCLR", "BYOL", "MoCo", "SimSiam", "BarlowTwins"])
@pytest.mark.slow
def test_methods_with_two_views(name, tmp_path):
    attack = ATTACK | ({"add": True} if name == "MoCo" else {})  # its second view is a key only
    module, _ = fit(tmp_path, name, attack=attack)
    before = make(name)
    add_auxiliary_batchnorm(before)
    moved = {key for key, value in state(before).items() if not torch.equal(value, state(module)[key])}
    for key in state(module):
        if NAME in key.split(".") and not key.startswith("momentum"):
            assert key in moved, key
            assert key.replace(f"{NAME}.", "") in moved, key
    assert all("forward" not in vars(layer) for layer in module.modules())
    for online, momentum in getattr(module, "momentum_pairs", list)():
        assert len(norms(online)) == len(norms(momentum))


@pytest.mark.slow
def test_checkpoints_resume_and_load_without_the_callback_and_exports_have_the_first_set(tmp_path):
    class Save(L.Callback):
        def __init__(self, path):
            self.path = path

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(self.path)

    whole, _ = fit(tmp_path, "BYOL", callbacks=[Save(tmp_path / "stop.ckpt")], epochs=2)
    resumed, _ = fit(tmp_path, "BYOL", epochs=2, ckpt_path=tmp_path / "stop.ckpt")
    assert_equal_states(state(whole), state(resumed))
    saved = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    assert any(key.startswith("momentum_backbone") and NAME in key for key in saved["state_dict"])
    plain = make("BYOL")
    plain.on_load_checkpoint(saved)  # as `load_from_checkpoint` calls it
    plain.load_state_dict(saved["state_dict"])
    spec = {"size": 8, "mean": None, "std": None}
    lc.export.export(whole, tmp_path / "backbone.pt", input_spec=spec)
    exported = torch.load(tmp_path / "backbone.pt", weights_only=True)["state_dict"]
    kept = {key: value for key, value in state(whole.backbone).items() if NAME not in key}
    assert {key.removeprefix("needs_load_backbone."): value.shape for key, value in exported.items()} == {
        key: value.shape for key, value in kept.items()
    }
    assert without_auxiliary(state(whole.backbone)).keys() == kept.keys()
    lc.resuming.from_pretrained_backbone(make("BYOL"), whole.backbone)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.slow
def test_a_gradient_cache_recomputes_with_the_same_sets(order, tmp_path):
    attack, cache = lc.AdversarialView(**ATTACK), GradientCache(3)

    def run(callbacks):
        module = make("SimCLR", norm=True)
        fits = trainer(tmp_path, CASES["SimCLR"], epochs=1, limit_val_batches=0, callbacks=callbacks)
        in_range(fits).fit(module, data("SimCLR"))
        return module

    module = run([attack, cache] if order == "before" else [cache, attack])
    assert all(bool(value.isfinite().all()) for value in state(module).values())
    assert all("forward" not in vars(layer) for layer in module.modules())
    main, auxiliary = norms(module.backbone)[0]
    assert not torch.equal(main.running_mean, auxiliary.running_mean)
    # 16 rows in chunks of 3: 4 hold clean rows and 3 adversarial ones; recomputations do not count
    assert int(main.num_batches_tracked) == 4 * BATCHES
    assert int(auxiliary.num_batches_tracked) == 3 * BATCHES


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at its inputs
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_step(backend, tmp_path):
    plain, _ = fit(tmp_path, limit_train_batches=2)
    module = make("SimCLR")
    module.backbone = torch.compile(module.backbone, backend=backend)
    compiled, _ = fit(tmp_path, module=module, limit_train_batches=2)
    found = {key.replace("_orig_mod.", ""): value for key, value in state(compiled).items()}
    for key, value in state(plain).items():
        torch.testing.assert_close(found[key], value, **f32(NETWORK), msg=lambda m, k=key: f"{k}: {m}")


def test_sync_batchnorm_converts_both_sets():
    module = make("SimCLR")
    add_auxiliary_batchnorm(module)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert norms(converted)
    assert all(isinstance(norm, nn.SyncBatchNorm) for pair in norms(converted) for norm in pair)
    route(converted)


def on_rank(rank, name, folder):
    warnings.simplefilter("ignore")  # per-rank statistics
    attack = ATTACK | ({"add": True} if name == "MoCo" else {})
    module, _ = fit(folder / str(rank), name, attack=attack, strategy="ddp", devices=2, limit_val_batches=0)
    return {key: value for key, value in state(module).items() if "running" not in key and "num_batches" not in key}


@pytest.mark.dist
@pytest.mark.parametrize("name", ["BYOL", "MoCo"])  # MoCo exchanges images between the ranks
def test_ranks_stay_equal(name, tmp_path):
    first, second = run_processes(on_rank, 2, name, tmp_path, init=False)
    assert any(NAME in key for key in first)
    assert_equal_states(first, second)


def of_shards(rank, kind):
    """Run on half of the images and return the losses and the weights."""
    warnings.simplefilter("ignore")
    seen, attack = Record(), lc.AdversarialView(**ATTACK | {"random_start": False, "add": True})
    pixels = [[[view.sigmoid() for view in views], *rest] for views, *rest in batches("SimCLR", rank)]
    module = make("SimCLR")
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 0.0  # DDP's averages are those of the first rank, and the attack uses them
    run(module, pixels, [attack, seen], devices=2, strategy=strategy(kind))
    return seen.losses, {name: seen.state[name] for name, _ in module.named_parameters()}, seen.local_share


@pytest.mark.dist
def test_shards_of_fsdp2_train_both_sets_as_ddp():
    ddp, fsdp = (run_processes(of_shards, 2, kind, init=False, timeout=PATIENCE) for kind in ("DDP", "FSDP2"))
    first = make("SimCLR").state_dict()
    for (losses_of_ddp, expected, _), (found_losses, found, share) in zip(ddp, fsdp, strict=True):
        assert share < 0.7
        torch.testing.assert_close(found_losses, losses_of_ddp, **f32(NETWORK))
        assert not torch.equal(expected[f"backbone.layers.1.{NAME}.weight"], first["backbone.layers.1.weight"])
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, **f32(NETWORK), msg=lambda m, k=name: f"{k}: {m}")


class Hides(lc.SimCLR):
    """Gives its projector rows of which nobody knows which images they are."""

    def training_step(self, batch, batch_idx):
        features = self.backbone(torch.cat(batch[0]))
        return self.projector(features.flip(0)).square().mean()


@pytest.mark.slow
def test_rows_without_marks_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="`rows` must be known to be adversarial or not in 'projector'"):
        fit(tmp_path, module=Hides(make("SimCLR").backbone, lr=0.1, optimizer="sgd"))


@pytest.mark.slow
def test_what_cannot_be_combined_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`auxiliary_batchnorm` must be False"):
        fit(tmp_path, module=make("SimCLR", norm=False))
    module = make("SimCLR")
    lc.nn.checkpoint_activations(module.backbone, ["layers"])
    with pytest.raises(ValueError, match="not be recomputed by `checkpoint_activations`"):
        fit(tmp_path, module=module)
    compiled = torch.compile(make("SimCLR"), backend="eager")
    with pytest.raises(ValueError, match="`auxiliary_batchnorm` must be False if the whole module is compiled"):
        fit(tmp_path, module=compiled)


# --- the worst of several views


def test_each_image_gets_its_worst_candidate_and_nothing_else_changes():
    module = make("SimCLR").double()
    networks = [module.backbone, module.projector]
    candidates = list(torch.rand(3, BATCH, 3, 8, 8, dtype=torch.float64))
    other = torch.rand(BATCH, 3, 8, 8, dtype=torch.float64)
    callback = lc.AdversarialView(candidates=3)
    before, random = state(module), random_state()
    found = worst_view(networks, callback._losses, candidates, other)
    assert_equal_states(before, state(module))
    assert torch.equal(random[0], random_state()[0])
    assert module.training
    module.eval()
    with torch.no_grad():
        target = nn.functional.normalize(module.projector(module.backbone(other)), dim=1)
        for image in range(BATCH):
            values = []
            for candidate in candidates:
                z = nn.functional.normalize(module.projector(module.backbone(candidate)), dim=1)[image]
                logits = target @ z / callback.temperature
                values.append(float(logits.logsumexp(0) - logits[image]))
            assert torch.equal(found[image], candidates[values.index(max(values))][image])
    with pytest.raises(ValueError, match=r"`loss` must return \(\d+,\) values to choose a candidate"):
        worst_view(networks, lambda a, b: losses.rocl_loss(a, b, temperature=0.5), candidates, other)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        images = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(16)), batch_size=8)


def worst_run(folder, policy, seed=0, **options):
    seen = []
    module = make("SimCLR")
    notes = LambdaCallback(on_train_batch_start=lambda t, m, batch, i: seen.append([view.clone() for view in batch[0]]))
    attack = lc.AdversarialView(epsilon=0.0, steps=0, seed=seed, **options)
    callbacks = [lc.ViewAugmentation(policy, seed=0), attack, notes]
    run = L.Trainer(
        **(QUIET | {"max_epochs": 1, "limit_val_batches": 0, "default_root_dir": folder}), callbacks=callbacks
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, Data())
    return seen


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_takes_the_worst_of_views_of_the_policy(fused, tmp_path):
    policy = augment.simclr_views(8, mean=(0.5,) * 3, std=(0.25,) * 3, fused=fused)
    plain, worst = (worst_run(tmp_path, policy, candidates=count) for count in (1, 3))
    again, other = (worst_run(tmp_path, policy, candidates=3, seed=seed) for seed in (0, 1))
    for step in range(2):
        assert torch.equal(plain[step][1], worst[step][1])
        assert not torch.equal(plain[step][0], worst[step][0])
        assert torch.equal(worst[step][0], again[step][0])
        assert not torch.equal(worst[step][0], other[step][0])
    assert policy.strength == 1.0


def test_candidates_are_no_small_crops():
    policy = augment.simclr_views(8).candidates(1, 2, 0.6)
    assert len(policy.views) == 2
    box = policy.views[0].operations[0].draw(512, 100, 100)["box"]
    assert box[:, 2:].prod(1).min() > 0.58 * 1e4
    weak = augment.simclr_views(8, fused=False)
    assert weak.candidates(0, 2, 0.6).views[0].spec.scale == (0.6, 1.0)
    assert weak.views[0].spec.scale == (0.08, 1.0)
    with pytest.raises(ValueError, match=r"`min_area` must be at most 0.14, the largest crop of the view, got 0.2"):
        augment.swav_views(8).candidates(2, 2, 0.2)
    with pytest.raises(ValueError, match="`view` must be one of the policy's 2, got 2"):
        augment.simclr_views(8).candidates(2, 2, 0.2)


def test_candidates_need_a_policy(tmp_path):
    with pytest.raises(TypeError, match="`candidates` must be 1 without a policy to draw them from"):
        fit(tmp_path, attack={"candidates": 2})
    for arguments, message in (
        ({"candidates": 0}, "`candidates` must be >= 1"),
        ({"min_area": 1.5}, "`min_area` must"),
    ):
        with pytest.raises(ValueError, match=message):
            lc.AdversarialView(**arguments)


@pytest.mark.slow
def test_a_head_of_two_inputs_is_refused(tmp_path):
    attack = ATTACK | {"auxiliary_batchnorm": False}
    message = r"`modules` must take the output of the one before alone, got \"projector\('tokens', 'patches'\)\""
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, name="IBOT", attack=attack)
    fit(tmp_path, name="IBOT", attack=attack | {"modules": ("backbone",)})


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_index_channels_follow_the_attacked_bands_and_dropped_ones_stay(drop):
    policy = satellite_views(12, channels=4, indices=[(3, 0)], drop=drop, swap=0, mean=[0.4] * 4 + [0.5], std=[0.2] * 5)
    clean, seen = [], []
    keep = lambda images: clean.append(augment.ViewPolicy.forward(policy, images)) or clean[-1]  # noqa: E731
    policy.forward = keep
    module = lc.SimCLR("small_convnet", backbone_kwargs={"channels": 5, "width": 2}, warmup_epochs=0)
    loader = torch.utils.data.DataLoader(torch.randint(20, 236, (8, 4, 16, 16), dtype=torch.uint8), batch_size=4)
    attack = lc.AdversarialView(epsilon=0.05, step_size=0.05, steps=2, random_start=False)
    callbacks = [lc.ViewAugmentation(policy), attack, LambdaCallback(on_train_batch_start=lambda *a: seen.append(a[2]))]
    L.Trainer(max_epochs=1, limit_val_batches=0, callbacks=callbacks, **QUIET).fit(module, loader, loader)
    mean, std = torch.tensor(policy.mean).view(5, 1, 1), torch.tensor(policy.std).view(5, 1, 1)
    for (before, _), batch in zip(clean, seen, strict=True):
        before, after = before * std + mean, batch[0] * std + mean
        assert float((before - after)[:, :4].abs().max()) == pytest.approx(0.05, rel=1e-3)
        own = (augment.append_indices(before[:, :4], [(3, 0)])[:, 4] - before[:, 4]).abs() < 0.01
        expected = torch.where(own, augment.append_indices(after[:, :4], [(3, 0)])[:, 4], before[:, 4])
        torch.testing.assert_close(after[:, 4], expected, **f32(NETWORK))
        assert bool(own.all()) == (drop == 0)
        assert bool((after[:, 4] != before[:, 4]).any()) == bool(own.any())

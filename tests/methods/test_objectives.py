"""LeJEPA, VISReg, W-MSE, MMCR and TiCo: which views count, equal draws on all ranks, and TiCo's step state."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.nn import SecondMoment
from lightning_contrast.seeding import derived_seed
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, BATCHES, data, run_step, step_batch, trainer
from tests.tolerances import CANCELLING, FORMULA, f32, f64

GLOBAL, LOCAL = 3, 2
SIZES = [16] * GLOBAL + [8] * LOCAL


def crops(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(BATCH, 3, s, s, generator=generator, dtype=torch.float64) for s in SIZES], torch.arange(BATCH)]


def projections(module, views):
    return torch.stack([module.projector(module.backbone(view)) for view in views])


def draws(batch_idx=0):
    """Return the generator of the first step."""
    return torch.Generator().manual_seed(derived_seed(0, batch_idx))


def lejepa(module, z):
    directions = losses.draw_directions(z, slices=16, generator=draws())
    invariance = (z - z[:GLOBAL].mean(0)).square().mean()
    return 0.05 * losses.sigreg_loss(z, directions) + 0.95 * invariance


def visreg(module, z):
    directions = losses.draw_directions(z, slices=16, generator=draws())
    return 0.9 * losses.visreg_loss(z, directions) + 0.1 * (z - z[:GLOBAL].mean(0)).square().mean()


def wmse(module, z):
    order = losses.draw_permutations(BATCH, iterations=2, generator=draws())
    return losses.w_mse_loss(z, order, whitening_size=4, eps=0.1)


def mmcr(module, z):
    return -torch.linalg.matrix_norm(F.normalize(z, dim=2).mean(0), ord="nuc")


EXPECTED = {"LeJEPA": lejepa, "VISReg": visreg, "WMSE": wmse, "MMCR": mmcr}


@pytest.mark.parametrize("name", EXPECTED)
def test_all_views_enter_the_loss(name):
    module = make(name, norm=False).double()
    batch = crops()
    with torch.no_grad():
        out = run_step(module, batch)
        expected = EXPECTED[name](module, projections(module, batch[0]))
    torch.testing.assert_close(out["loss"], expected, **f64(CANCELLING))
    torch.testing.assert_close(out["features"], module.backbone(batch[0][0]).detach(), **f64(FORMULA))


@pytest.mark.parametrize(
    ("name", "passes"), [("LeJEPA", [GLOBAL, LOCAL]), ("MMCR", [GLOBAL, LOCAL]), ("WMSE", [1] * len(SIZES))]
)
def test_views_that_share_a_pass_and_its_batchnorm(name, passes):
    module, seen = make(name).double(), []
    module.backbone.register_forward_hook(lambda network, inputs, output: seen.append(len(output) / BATCH))
    run_step(module, crops())
    assert seen == passes


class AtStep(lc.LeJEPA):
    """LeJEPA at some optimizer step."""

    step = 0

    @property
    def global_step(self):
        return self.step


def test_slices_change_with_the_step_and_the_micro_batch_and_ignore_the_global_generator():
    torch.manual_seed(0)
    module = AtStep(
        TinyBackbone(), hidden_dim=16, projection_dim=8, num_slices=2, head_norm=None, optimizer="sgd", lr=1
    )
    module.log = lambda *a, **k: None
    batch = step_batch(CASES["LeJEPA"])

    def loss(step, batch_idx):
        module.step = step
        return module.training_step(batch, batch_idx)["loss"].item()

    first = loss(0, 0)
    torch.manual_seed(7)
    assert loss(0, 0) == first
    assert len({first, loss(1, 0), loss(0, 1)}) == 3


def _own_generators(rank, name):
    torch.manual_seed(rank)  # ranks whose global generators differ
    module = make(name, norm=False).double()
    torch.manual_seed(100 + rank)
    views, labels = step_batch(CASES[name], torch.float64)
    rows = slice(5) if rank == 0 else slice(5, BATCH)  # unequal batches
    return run_step(module, [[view[rows] for view in views], labels[rows]])["loss"].item()


@pytest.mark.dist
@pytest.mark.parametrize("name", ["LeJEPA", "VISReg", "WMSE"])
def test_ranks_share_their_draws(name):
    alone = run_step(make(name, norm=False).double(), step_batch(CASES[name], torch.float64))["loss"]
    for loss in run_processes(_own_generators, 2, name):
        torch.testing.assert_close(torch.tensor(loss, dtype=torch.float64), alone.detach(), **f64(CANCELLING))


def test_mmcr_with_momentum_averages_the_centroids_of_both_networks():
    module = make("MMCR momentum", norm=False)
    with torch.no_grad():
        for parameter in module.momentum_projector.parameters():
            parameter.mul_(1.5)
        views = step_batch(CASES["MMCR momentum"])[0]
        online = projections(module, views).transpose(0, 1)
        other = torch.stack([module.momentum_projector(module.momentum_backbone(v)) for v in views], 1)
        out = run_step(module, [views, torch.arange(BATCH)])
    torch.testing.assert_close(out["loss"], losses.mmcr_loss(online, other, local_weight=0.1), **f32(FORMULA))
    assert [(c.start, c.schedule) for c in module.default_callbacks()] == [(0.9, "constant")]
    assert make("MMCR").default_callbacks() == []


def test_tico_uses_the_covariance_as_of_the_last_step():
    module = make("TiCo", norm=False, covariance_momentum=0.8, covariance_weight=3.0)
    for parameter in (*module.momentum_backbone.parameters(), *module.momentum_projector.parameters()):
        parameter.data.mul_(1.5)
    views = step_batch(CASES["TiCo"])[0]
    query = module.projector(module.backbone(views[0])).detach()
    key = module.momentum_projector(module.momentum_backbone(views[1]))
    settings = {"covariance_momentum": 0.8, "covariance_weight": 3.0}
    for step in range(2):
        before = module.covariance.value
        assert bool(before.any()) == (step > 0)
        loss = run_step(module, [views, torch.arange(BATCH)])["loss"]
        torch.testing.assert_close(loss, losses.tico_loss(query, key, before, **settings), **f32(FORMULA))
        assert torch.equal(module.covariance.value, before)
        module.covariance.commit()
        unit = F.normalize(query)
        expected = 0.8 * before + 0.2 * unit.T @ unit / BATCH
        torch.testing.assert_close(module.covariance.value, expected, **f32(FORMULA))


class Moved(L.Callback):
    """Counts after which batches the covariance is another one."""

    def on_train_start(self, trainer, pl_module):
        self.moved, self.before = [], pl_module.covariance.value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.moved.append(not torch.equal(self.before, pl_module.covariance.value))
        self.before = pl_module.covariance.value


def test_ticos_covariance_moves_once_per_optimizer_step(tmp_path):
    module, moved = make("TiCo"), Moved()
    fit = trainer(tmp_path, CASES["TiCo"], callbacks=[moved], accumulate_grad_batches=2, limit_val_batches=0)
    fit.fit(module, data("TiCo"))
    assert moved.moved == [False, False, True, False] + [True, False] * (BATCHES // 2)


@pytest.mark.slow
def test_a_covariance_of_another_width_is_refused_at_a_resume(tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="one", every_n_epochs=1)
    trainer(tmp_path, CASES["TiCo"], epochs=1, callbacks=[saved], limit_val_batches=0).fit(make("TiCo"), data("TiCo"))
    other = make("TiCo", projection_dim=6)
    with pytest.raises(ValueError, match=r"`projection_dim` must be 8 as in the checkpoint, whose `covariance`.*got 6"):
        trainer(tmp_path, CASES["TiCo"]).fit(other, data("TiCo"), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


def _commit(rank):
    moment = SecondMoment(3, 0.5)
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    moment(rows[:4] if rank == 0 else rows[4:])
    moment.commit()
    return moment.value


@pytest.mark.dist
def test_the_second_moment_is_that_of_all_ranks():
    alone = SecondMoment(3, 0.5)
    alone(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
    alone.commit()
    for found in run_processes(_commit, 2):
        torch.testing.assert_close(found, alone.value, **f32(FORMULA))


def test_a_discarded_step_does_not_move_the_second_moment():
    moment = SecondMoment(3)
    moment(torch.randn(4, 3))
    moment.discard()
    moment.commit()
    assert not moment.value.any()
    with pytest.raises(ValueError, match=r"`rows` must have shape \(rows, 3\)"):
        moment(torch.randn(4, 2))


def test_tico_takes_two_views():
    views = step_batch(CASES["LeJEPA"])[0]
    with pytest.raises(ValueError, match="hold 2 views"):
        run_step(make("TiCo"), [[*views, views[0]], torch.arange(BATCH)])


def test_the_learning_rate_of_wmse_falls_twice_at_the_end():
    module = make("WMSE")
    factors = [module.lr_factor(step, 10, 1000) for step in (0, 5, 10, 949, 950, 974, 975, 999)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.2, 0.2, 0.04, 0.04])


def test_a_batch_smaller_than_the_whitening_is_refused():
    with pytest.raises(ValueError, match="batch of at least 16"):
        run_step(make("WMSE", projection_dim=8), step_batch(CASES["WMSE"]))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("LeJEPA", {"num_slices": 0}, "`num_slices` must be >= 1"),
        ("LeJEPA", {"regularizer_weight": 1.1}, "`regularizer_weight` must"),
        ("LeJEPA", {"knots": 1}, "`knots` must be >= 2"),
        ("LeJEPA", {"t_max": 0.0}, "`t_max` must be > 0"),
        ("VISReg", {"num_slices": 0}, "`num_slices` must be >= 1"),
        ("VISReg", {"regularizer_weight": -0.1}, "`regularizer_weight` must"),
        ("WMSE", {"projection_dim": 8, "whitening_size": 8, "whitening_eps": 0.0}, "`whitening_size` must be >= 9"),
        ("WMSE", {"whitening_iterations": 0}, "`whitening_iterations` must be >= 1"),
        ("WMSE", {"whitening_eps": -1.0}, "`whitening_eps` must"),
        ("MMCR", {"local_weight": -1.0}, "`local_weight` must be >= 0"),
        ("MMCR", {"momentum": 1.5}, "`momentum` must"),
        ("TiCo", {"covariance_momentum": 1.5}, "`covariance_momentum` must"),
        ("TiCo", {"covariance_weight": -1.0}, "`covariance_weight` must be >= 0"),
        ("TiCo", {"momentum": -0.1}, "`momentum` must"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name, **arguments)

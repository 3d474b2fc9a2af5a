"""The public kits: each passes on right code and finds a defect that was planted, and says where."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc
from lightning_contrast import distributed
from lightning_contrast.testing import (
    ChildError,
    HostSyncs,
    assert_callback_changes_nothing,
    assert_resume_exact,
    check_world_size_equivalence,
    count_host_syncs,
)


class Plain(L.LightningModule):
    """Learns to copy its input; has a buffer that a checkpoint keeps, and a schedule."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def loss(self, x):
        return (self.layer(x) - x + 0.1 * self.mean).square().mean()

    def training_step(self, batch, batch_idx):
        (x,) = batch
        self.mean.lerp_(x.mean(0), 0.1)
        return {"loss": self.loss(x)}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rows(count=16):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1))


def loader():
    return DataLoader(TensorDataset(rows()), batch_size=4)


class Resumable(DataLoader):
    """Keeps its place in an epoch."""

    def __init__(self):
        super().__init__(TensorDataset(rows()), batch_size=4)
        self.place = 0

    def __iter__(self):
        first, self.place = self.place % len(self), 0
        for index, batch in enumerate(super().__iter__()):
            if index >= first:
                self.place = index + 1
                yield batch

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


# ---------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 2, "max_epochs": 3}], ids=["plain", "accumulated"]
)
def test_resume_passes_on_right_code(settings):
    before = torch.get_rng_state()
    assert_resume_exact(Plain, loader, **settings)
    assert torch.equal(before, torch.get_rng_state()), "the kit itself leaves the generator alone"


@pytest.mark.parametrize("stop", ["mid-epoch", 2])
def test_resume_passes_in_mid_epoch_with_a_loader_that_keeps_its_place(stop):
    assert_resume_exact(Plain, Resumable, stop=stop)


def test_resume_finds_a_loader_that_does_not_keep_its_place():
    with pytest.raises(AssertionError, match=r"differs first before epoch 1, batch \d.*the batch") as error:
        assert_resume_exact(Plain, loader, stop="mid-epoch")
    assert "restore its position" in str(error.value)


class LostBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4), persistent=False)


class LostAttribute(Plain):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps = self.steps + 1
        return {"loss": self.loss(batch[0]) * (1 + self.steps)}


class Draws(Plain):
    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch[0] + torch.randn(4))}


class ForgetsOptimizer(Plain):
    def on_load_checkpoint(self, checkpoint):
        for state in checkpoint["optimizer_states"][0]["state"].values():
            state["momentum_buffer"].zero_()


class OwnHook(Plain):
    """Moves its average after checkpoints are written: an error that shows only where a checkpoint is in mid-epoch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.mean.add_(1)


@pytest.mark.parametrize(
    ("module", "stop", "words"),
    [
        (
            LostBuffer,
            "epoch end",
            ["step of epoch 1, batch 0, in the loss", "unsaved buffer `mean`", "persistent=True"],
        ),
        (LostAttribute, "epoch end", ["step of epoch 1, batch 0, in the loss", "attribute `.steps`"]),
        (Draws, "epoch end", ["step of epoch 1, batch 0, in the loss", "StepSeed"]),
        (ForgetsOptimizer, "epoch end", ["before epoch 1, batch 0", "`momentum_buffer` of `layer.weight`"]),
        (OwnHook, 2, ["before epoch 0, batch 2, in the buffer `mean`", "on_train_batch_end"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_resume_finds(module, stop, words):
    with pytest.raises(AssertionError) as error:
        assert_resume_exact(module, Resumable, stop=stop)
    for word in words:
        assert word in str(error.value)


def test_resume_passes_where_every_draw_is_seeded_by_the_step():
    assert_resume_exact(Draws, loader, lambda: [lc.StepSeed(0)])


def test_resume_reports_a_run_that_is_not_reproducible():
    calls = []

    class Unrepeatable(Plain):
        def training_step(self, batch, batch_idx):
            calls.append(1)
            return {"loss": self.loss(batch[0]) * len(calls)}

    with pytest.raises(AssertionError, match="not reproducible from a seed"):
        assert_resume_exact(Unrepeatable, loader)


def test_resume_leaves_alone_what_nothing_comes_of():
    class Cached(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(1), persistent=False)
            self.seen = 0

        def training_step(self, batch, batch_idx):
            self.cache.fill_(3.0)
            self.seen += 1
            return super().training_step(batch, batch_idx)

    assert_resume_exact(Cached, loader)


def test_resume_names_what_may_be_ignored():
    with pytest.raises(AssertionError):
        assert_resume_exact(LostAttribute, loader)
    assert_resume_exact(LostAttribute, loader, ignore=["loss", "parameter*", "`momentum_buffer`*"])


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"stop": 99}, ValueError, "`stop` must come before the end"),
        ({"stop": "later"}, ValueError, "`stop` must be one of"),
        ({"max_epochs": 1}, ValueError, "`max_epochs` must be >= 2"),
        ({"make_module": Plain()}, TypeError, "`make_module` must be a function"),
        ({"make_module": nn.Identity}, TypeError, "return a LightningModule"),
    ],
)
def test_resume_refuses(kwargs, error, words):
    with pytest.raises(error, match=words):
        assert_resume_exact(**({"make_module": Plain, "make_data": loader} | kwargs))


# ---------------------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize(
    "callback",
    [
        L.Callback,
        lambda: lc.OnlineLinearProbe(num_classes=4),
        lambda: lc.OnlineKNN(num_classes=4, k=2),
        lc.OnlineLinearProbe(num_classes=4, name="instance"),
    ],
    ids=["empty", "probe", "knn", "instance"],
)
def test_transparency_passes(callback):
    assert_callback_changes_nothing(callback)


class DrawsOnce(L.Callback):
    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            torch.rand(1)


class LeavesEval(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            pl_module.backbone.eval()


class AddsState(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.register_buffer("note", torch.zeros(1))


class ScalesGradients(L.Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 4:
            pl_module.classifier.weight.grad.mul_(1.5)


class WritesBatch(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            batch[0].mul_(2)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (DrawsOnce, ["DrawsOnce changes the run, first before epoch 1, batch 0", "random numbers", "fork_rng"]),
        (LeavesEval, ["before epoch 0, batch 2", "eval mode of `backbone", "another mode"]),
        (AddsState, ["before epoch 0, batch 0", "adds to the module's state: buffer `note`"]),
        (ScalesGradients, ["before epoch 1, batch 2", "parameter `classifier.weight`", "tensors differ, most of all"]),
        (WritesBatch, ["before epoch 1, batch 0: the batch."]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_transparency_finds(callback, words):
    with pytest.raises(AssertionError) as error:
        assert_callback_changes_nothing(callback)
    for word in words:
        assert word in str(error.value)


@pytest.mark.dist
def test_transparency_under_ddp():
    assert_callback_changes_nothing(
        lambda: lc.OnlineLinearProbe(num_classes=4), max_epochs=1, world_size=2, limit_val_batches=0
    )

    class OnOneRank(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_rank == 1:
                torch.rand(1)

    with pytest.raises(
        AssertionError, match="OnOneRank on rank 1 changes the run, first before epoch 0, batch 1: the random numbers"
    ):
        assert_callback_changes_nothing(OnOneRank, max_epochs=1, world_size=2, limit_val_batches=0)


def test_transparency_refuses_what_is_no_callback():
    with pytest.raises(TypeError, match="`callback` must be a Callback, got 'int'"):
        assert_callback_changes_nothing(3)


# ------------------------------------------------------------------------------------------------ world size


def ntxent(a, b):
    return lc.losses.nt_xent(a, b, temperature=0.5)


def alone(a, b):
    """NT-Xent of the rank's own images only."""
    z = nn.functional.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    return nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


def without_gradient(a, b):
    """Alignment with the mean of all ranks, gathered without gradient."""
    every = distributed.gather(b) if distributed.is_distributed() else b
    return (a - every.mean(0)).square().sum(1).mean()


def summed(a, b):
    """The right value, with a gradient that is too large."""
    value = (a - b).square().sum(1).mean()
    return value + (value - value.detach()) * (distributed.world_size() - 1)


@pytest.mark.dist
@pytest.mark.parametrize(
    "loss", [ntxent, lambda: ntxent, nn.MSELoss(), nn.MSELoss], ids=["function", "factory", "module", "class"]
)
def test_world_size_passes_on_right_losses(loss):
    check_world_size_equivalence(loss)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (alone, ["First difference, the loss", "on one process", "2 gradients 2 differ", "use those of all ranks"]),
        (without_gradient, ["gradient of the rows of argument 1"]),
        (summed, ["gradient of the rows of argument 0", "is 2 times", "a sum where DDP takes a mean"]),
    ],
    ids=["alone", "without gradient", "summed"],
)
def test_world_size_finds_in_a_loss(loss, words):
    with pytest.raises(AssertionError) as error:
        check_world_size_equivalence(loss)
    for word in words:
        assert word in str(error.value)


class Contrast(L.LightningModule):
    def __init__(self, loss=ntxent, norm=False):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5) if norm else nn.Identity())
        self.loss = loss
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        a, b = batch
        return self.loss(self.encoder(a), self.encoder(b))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KeepsItsOwn(Contrast):
    """Each rank keeps something of its own images; DDP copies rank 0's only before a forward pass."""

    def training_step(self, batch, batch_idx):
        self.seen = self.seen + batch[0].sum()
        return super().training_step(batch, batch_idx)


PAIRS = (rows(8), rows(16)[8:])


@pytest.mark.dist
def test_world_size_passes_on_right_modules():
    check_world_size_equivalence(Contrast, batch=PAIRS)


@pytest.mark.dist
def test_world_size_of_a_method_needs_no_batch():
    def make():
        backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.GELU(), nn.Flatten())
        return lc.SimCLR(backbone, feature_dim=256, head_norm=None, optimizer="sgd", lr=0.1, warmup_epochs=0)

    check_world_size_equivalence(make)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Contrast(alone), ["First difference, the loss of step 0", "`encoder.0.weight` in step"]),
        (lambda: Contrast(summed), ["gradient of `encoder.0.weight` in step 0", "is 2 times"]),
        (lambda: Contrast(norm=True), ["loss of step 0", "BatchNorm"]),
        (KeepsItsOwn, ["`seen` at the end"]),
    ],
    ids=["alone", "summed", "norm", "own state"],
)
def test_world_size_finds_in_a_module(make, words):
    with pytest.raises(AssertionError) as error:
        check_world_size_equivalence(make, batch=PAIRS)
    for word in words:
        assert word in str(error.value)


@pytest.mark.dist
def test_world_size_shows_the_error_of_a_rank():
    def fails(a, b):
        if distributed.rank() == 1:
            raise RuntimeError("planted")
        return (a - b).square().mean()

    with pytest.raises(ChildError, match="planted"):
        check_world_size_equivalence(fails)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"make_module_or_loss": Contrast}, ValueError, "`batch` must be given"),
        (
            {"make_module_or_loss": ntxent, "batch": (torch.ones(3, 2),) * 2},
            ValueError,
            "number of rows divisible by 2",
        ),
        ({"make_module_or_loss": 3}, TypeError, "must be callable"),
        ({"make_module_or_loss": ntxent, "world_size": 1}, ValueError, "`world_size` must be >= 2"),
    ],
)
def test_world_size_refuses(kwargs, error, words):
    with pytest.raises(error, match=words):
        check_world_size_equivalence(**kwargs)


# ------------------------------------------------------------------------------------------------ host syncs


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3])),
    ],
)
def test_host_syncs_counts_each_read_once_and_tells_where(read):
    x = torch.tensor([1.0, 2.0, 3.0])
    count = count_host_syncs(read, x)
    assert count == 1
    assert "test_testing.py" in count.places[0]
    assert "test_testing.py" in repr(count)


def test_host_syncs_sees_none_where_there_is_none():
    weight = torch.ones(3, 2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)

    def step():
        loss = (torch.randn(4, 3) @ weight).relu().sum()
        loss.backward()
        optimizer.step()
        torch.where(loss > 0, loss, 0).repeat_interleave(3)

    assert count_host_syncs(step) == 0


def test_host_syncs_tells_a_device_from_the_host():
    sizes, there = torch.arange(3), torch.empty(4, device="meta")
    with HostSyncs() as syncs:
        (there * 2).sum()
        sizes.tolist()
        sizes.sum().item()
    assert syncs.places == []


def test_host_syncs_sees_reads_in_a_backward_pass_and_in_order():
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda gradient: print(gradient.sum().item()))
    with HostSyncs() as syncs:
        (x * 2).sum().backward()
        _ = x.detach().tolist()
    assert [place.rsplit(": ", 1)[1] for place in syncs.places] == ["_local_scalar_dense", "tolist"]

"""Ranks with different numbers of images: the numbers of one process, or one clear error on every rank; no waiting."""

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc
from lightning_contrast import distributed
from lightning_contrast.callbacks.probes.bank import Step
from lightning_contrast.callbacks.probes.head_trainer import HeadTrainer
from lightning_contrast.callbacks.probes.linear_head import default_lr
from lightning_contrast.callbacks.probes.tasks import ClassTask
from lightning_contrast.testing import ChildError, run_processes
from tests.methods.cases import CASES, fill_queue, make
from tests.methods.test_contract import BATCH, PIXELS, as_is, gradients, rows_of, step_batch
from tests.rank_runs import SETTINGS, batch_of, fit, fitted_state, logged, on_ranks, shares
from tests.tolerances import CANCELLING, f64, near

pytestmark = pytest.mark.dist

# --- training


def test_every_method_gives_the_gradient_of_one_process():
    rows = shares([7, 1])

    def work(rank):
        found = {}
        for name in CASES:
            module = fill_queue(make(name, norm=False).double())
            found[name] = gradients(module, rows_of(step_batch(CASES[name], torch.float64), rows[rank]))
            found[name] = {key: distributed.all_reduce_mean(value) for key, value in found[name].items()}
        return found

    ranks = run_processes(work, 2)
    for name in CASES:
        alone = gradients(fill_queue(make(name, norm=False).double()), step_batch(CASES[name], torch.float64))
        for found in ranks:
            assert found[name].keys() == alone.keys(), name
            for key, expected in alone.items():
                torch.testing.assert_close(
                    found[name][key], expected, **f64(CANCELLING), msg=lambda m, n=name: f"{n}: {m}"
                )


def test_an_empty_queue_gives_the_gradient_of_one_process():
    """The first step's negatives are the other keys of all ranks, also where a rank has one image."""
    names = [name for name in CASES if name.startswith(("MoCo", "MoCHi", "NNCLR")) and hasattr(make(name), "queue")]
    assert len(names) >= 5
    rows = shares([7, 1])

    def work(rank):
        found = {}
        for name in names:
            found[name] = gradients(
                make(name, norm=False).double(), rows_of(step_batch(CASES[name], torch.float64), rows[rank])
            )
            found[name] = {key: distributed.all_reduce_mean(value) for key, value in found[name].items()}
        return found

    ranks = run_processes(work, 2)
    for name in names:
        alone = gradients(make(name, norm=False).double(), step_batch(CASES[name], torch.float64))
        assert any(bool(value.abs().max() > 0) for value in alone.values()), name
        for found in ranks:
            for key, expected in alone.items():
                torch.testing.assert_close(
                    found[name][key], expected, **f64(CANCELLING), msg=lambda m, n=name: f"{n}: {m}"
                )


def batches_of(name, rank=None):
    """Two whole batches and a last one of five images, of which rank 0 gets four and rank 1 one."""
    rows = (slice(None), slice(3, 8)) if rank is None else (shares([4, 4])[rank], (slice(3, 7), slice(7, 8))[rank])
    return [batch_of(name, rows[0])] * 2 + [batch_of(name, rows[1])]


def test_fits_with_a_short_last_batch_equal_one_process():
    """Including queues, centers, momentum networks and assignments."""
    names = ("SimCLR", "MoCo", "NPID", "NNCLR", "DINO", "SwAV", "MSN")

    def work(rank):
        return {n: fitted_state(make(n, norm=False), batches_of(n, rank), **on_ranks(2)) for n in names}

    alone = {n: fitted_state(make(n, norm=False), batches_of(n)) for n in names}
    for found in run_processes(work, 2, init=False):
        for name in names:
            for key, value in found[name].items():
                torch.testing.assert_close(
                    value, alone[name][key], **f64(CANCELLING), msg=lambda m, n=name: f"{n}: {m}"
                )


def test_the_normalizer_of_noise_contrast_is_the_mean_over_all_images(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.arange(size[1]).expand(size))
    _, _, indices = batch = step_batch(CASES["NPID noise"])
    projection = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(2))

    def normalizer(rows):
        module = make("NPID noise")
        module._noise_loss(projection[rows], indices[rows])
        return module.normalizer

    for found in run_processes(lambda rank: normalizer(shares([7, 1])[rank]), 2):
        torch.testing.assert_close(found, normalizer(slice(0, len(batch[1]))))


def error_of(work):
    """Return what each of two ranks raises."""

    def quiet(rank):
        try:
            work(rank)
        except (ValueError, RuntimeError) as error:
            return type(error).__name__, str(error)
        return "none", ""

    return run_processes(quiet, 2, init=False, timeout=60)


@pytest.mark.parametrize("name", ["SimCLR", "MoCo"])
def test_different_numbers_of_batches_are_an_error_on_every_rank_before_the_first_step(name):
    def work(rank):
        fit(make(name, norm=False), [batch_of(name, slice(0, 4))] * (3 - rank), **on_ranks(2))

    words = "`training batches per epoch` must be the same on all ranks, got [3, 2]. Use a DistributedSampler"
    for kind, message in error_of(work):
        assert kind == "ValueError"
        assert message.startswith(words)


def test_a_rank_without_images_in_its_last_batch_stops_the_run_and_says_why():
    def work(rank):
        batches = [batch_of("MoCo", slice(0, 4)), batch_of("MoCo", slice(0, 4 * (1 - rank)))]
        fit(make("MoCo", norm=False), batches, **on_ranks(2))

    with pytest.raises(ChildError, match=r"Rank 1 failed(?s:.*)`views` must have a batch of at least 1, got 0"):
        run_processes(work, 2, init=False, timeout=60)


def test_one_process_still_needs_two_images():
    with pytest.raises(ValueError, match="`views` must have a batch of at least 2, got 1"):
        fit(make("BYOL", norm=False), [batch_of("BYOL", slice(0, 1))])


# --- evaluation


def validation_set(count):
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(count, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    return TensorDataset(images, torch.arange(count) % 3)


def plug_ins():
    return [
        lc.OnlineLinearProbe(num_classes=3),
        lc.OnlineLinearProbe(num_classes=1, task="regression", labels=lambda batch: batch[1].double(), name="numbers"),
        lc.OnlineKNN(num_classes=3, k=3),
        lc.CollapseMonitor(),
        lc.InstanceDiscriminationMonitor(),
    ]


JUDGED = ("linear_probe/", "knn/", "numbers/")


@pytest.mark.parametrize(("count", "ranks"), [(1, 2), (3, 2), (1, 3), (7, 3)])
def test_an_evaluation_set_that_does_not_divide_gives_the_numbers_of_one_process(count, ranks):
    """The sampler gives some images to two ranks, all of them where the set is smaller than the number of ranks."""

    def run(rows, **kwargs):
        batches = [batch_of("SimCLR", rows)] * 2 * kwargs.get("devices", 1)
        val = DataLoader(validation_set(count), batch_size=2)
        return logged(fit(make("SimCLR", norm=False), batches, val, plug_ins(), use_distributed_sampler=True, **kwargs))

    def work(rank):
        return run(shares([3, 3, 2] if ranks == 3 else [5, 3])[rank], **on_ranks(ranks))  # two batches of them

    alone = run(slice(None))
    judged = [name for name in alone if name.startswith(JUDGED)]
    assert {"linear_probe/top1", "linear_probe/train_loss", "knn/top1", "numbers/mae"} <= set(judged)
    for found in run_processes(work, ranks, init=False):
        assert found.keys() == alone.keys()
        for name in judged:
            assert found[name] == near(alone[name], size=0.1, nan_ok=True), name


def test_an_empty_evaluation_batch_and_ranks_with_more_batches_than_others():
    images, labels = validation_set(7).tensors

    def val(rows):
        return DataLoader([(images[r], labels[r]) for r in rows], batch_size=None, collate_fn=as_is)

    def run(rows, val_rows, **kwargs):
        batches = [batch_of("SimCLR", rows)] * 2
        return logged(fit(make("SimCLR", norm=False), batches, val(val_rows), plug_ins(), **kwargs))

    def work(rank):
        own = [slice(0, 4), slice(4, 6)] if rank == 0 else [slice(6, 7)]
        empty = [slice(0, 7)] if rank == 0 else [slice(0, 0)]
        return [run(shares([4, 4])[rank], rows, **on_ranks(2)) for rows in (own, empty)]

    alone = run(slice(None), [slice(0, 7)])
    for both in run_processes(work, 2, init=False):
        for found in both:
            for name in alone:
                if name.startswith(JUDGED):
                    assert found[name] == near(alone[name], size=0.1), name


def test_the_rate_of_a_probe_follows_the_images_of_all_ranks():
    def work(rank):
        learner = HeadTrainer("probe", ClassTask(3), lr=None, optimizer=None, schedule=None)
        rows = (3, 1)[rank]
        everything = torch.ones(rows, dtype=torch.bool)
        learner.begin_epoch(torch.device("cpu"))
        learner.learn(Step(torch.randn(rows, 64), torch.zeros(rows, dtype=torch.int64), everything, everything))
        return learner.optimizer.param_groups[0]["lr"]

    assert run_processes(work, 2) == [default_lr(4, 64)] * 2


@pytest.mark.parametrize("bank", ["train", "fresh"])
def test_the_bank_of_the_neighbours_may_hold_unequal_shares(bank):
    """Eleven images on two ranks: six and five, in batches of four, four and three in all."""
    generator = torch.Generator().manual_seed(4)
    train = TensorDataset(torch.rand(11, 3, PIXELS, PIXELS, generator=generator), torch.arange(11) % 3)

    class Still(L.LightningModule):
        """Learns nothing, so that the features of all batches are those of one network."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * PIXELS**2, 8))

        def forward(self, images):
            return self.backbone(images)

        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum() * 0

        def validation_step(self, batch, batch_idx):
            self(batch[0].float())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(rows, sizes, **kwargs):
        parts = [tuple(t[i] for t in train.tensors) for i in rows]
        loader = DataLoader(parts, batch_size=None, collate_fn=as_is)
        if bank == "fresh":
            loader = DataLoader(train, batch_size=sizes)
        knn = lc.OnlineKNN(num_classes=3, k=5, bank=bank)
        trainer = L.Trainer(**(SETTINGS | kwargs | {"max_epochs": 1, "precision": "32-true"}), callbacks=[knn])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Still(), loader, DataLoader(validation_set(9), batch_size=4))
        return float(trainer.callback_metrics["knn/top1"])

    def work(rank):
        rows = [slice(0, 4), slice(4, 6)] if rank == 0 else [slice(6, 8), slice(8, 11)]
        return run(rows, 2, **on_ranks(2), use_distributed_sampler=bank == "fresh")

    alone = run([slice(0, 11)], 4)
    assert run_processes(work, 2, init=False) == pytest.approx([alone, alone])

"""The order of an epoch, exact resume in mid-epoch, and several ranks."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_contrast.callbacks import OnlineKNN
from lightning_contrast.data import ResumableLoader
from lightning_contrast.data.loading import EpochSampler, MemoryImages, make_loader
from lightning_contrast.seeding import derived_seed
from tests.launch import run_processes


def _images(rows):
    images = torch.arange(rows).byte()[:, None, None, None].expand(-1, 3, 2, 2)
    return MemoryImages(images, torch.arange(rows) % 5, indices=True)


def _loader(rows=23, batch_size=4, train=True, seed=0, workers=0):
    kwargs = {"num_workers": workers} if workers else {"collate_fn": lambda batch: batch}
    dataset = list(range(rows)) if workers else _images(rows)
    return make_loader(dataset, batch_size, trainer=None, train=train, seed=seed, **kwargs)


def _rows(loader):
    return [batch[-1].tolist() if isinstance(batch, tuple) else batch.tolist() for batch in loader]


def test_a_batch_of_memory_images_equals_a_plain_loop():
    images, labels = torch.randint(0, 256, (9, 3, 4, 5), dtype=torch.uint8), torch.arange(9)
    table, rows = MemoryImages(images, labels, indices=True), [7, 0, 7, 3]
    got = table.__getitems__(rows)
    for position, row in enumerate(rows):
        assert torch.equal(got[0][position], images[row])
        assert (got[1][position], got[2][position]) == (labels[row], row)
    assert got[0].dtype == torch.uint8
    one = table[3]
    assert torch.equal(one[0], images[3])
    assert (one[1].item(), one[2].item()) == (3, 3)
    assert len(MemoryImages(images, labels).__getitems__(rows)) == 2
    got[0].zero_()  # a batch is a copy: writing into it leaves the set alone
    assert images[7].any()


def test_labels_and_images_must_agree():
    with pytest.raises(ValueError, match=r"`labels` must have one row for each of the 3 images, got 2"):
        MemoryImages(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2))


@pytest.mark.parametrize(("rows", "replicas"), [(12, 1), (12, 3), (13, 3), (14, 3), (5, 5)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_one_order(rows, replicas, drop_last):
    whole = EpochSampler(range(rows), seed=3)
    whole.set_epoch(2)
    order = list(whole)
    shares = []
    for rank in range(replicas):
        sampler = EpochSampler(range(rows), replicas=replicas, rank=rank, seed=3, drop_last=drop_last)
        sampler.set_epoch(2)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    assert sorted(order) == list(range(rows))
    dealt = [row for step in zip(*shares, strict=True) for row in step]
    total = rows // replicas * replicas if drop_last else -(-rows // replicas) * replicas
    assert dealt == (order * replicas)[:total]


def test_orders_depend_on_seed_and_epoch_and_not_on_their_sum():
    orders = set()
    for seed in range(4):
        sampler = EpochSampler(range(40), seed=seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            first, second = tuple(sampler), tuple(sampler)
            assert first == second
            orders.add(first)
    assert len(orders) == 16
    assert len({derived_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert list(EpochSampler(range(5), shuffle=False)) == [0, 1, 2, 3, 4]


def test_first_rows_are_uniform():
    """Over many epochs each row comes first about equally often (a biased order would show)."""
    sampler, counts = EpochSampler(range(5)), np.zeros(5)
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        counts[next(iter(sampler))] += 1
    assert (abs(counts - 400) < 80).all()  # 4.5 standard deviations


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_draws_no_global_random_number(workers):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    _rows(_loader(workers=workers))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_training_drops_the_short_batch_and_evaluation_does_not():
    assert [len(rows) for rows in _rows(_loader())] == [4] * 5
    assert _rows(_loader(train=False)) == [list(range(i, min(i + 4, 23))) for i in range(0, 23, 4)]


def test_too_large_batch_and_empty_set_are_errors():
    with pytest.raises(ValueError, match=r"`batch_size` must be at most 23, the images of one of 1 processes, got 24"):
        _loader(batch_size=24)
    assert len(_rows(_loader(batch_size=23))) == 1
    assert len(_rows(_loader(batch_size=24, train=False))) == 1
    with pytest.raises(ValueError, match="hold at least one image"):
        _loader(rows=0, train=False)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_fresh_loader_goes_on_where_the_state_says(workers, epoch):
    loader = _loader(workers=workers)
    loader.sampler.set_epoch(epoch)
    whole = _rows(loader)
    for position in range(len(whole) + 1):
        iterator = iter(loader)
        for _ in range(position):
            next(iterator)
        state = loader.state_dict()
        del iterator
        fresh = _loader(workers=workers)
        fresh.load_state_dict(state)
        assert fresh.state_dict() == state
        assert _rows(fresh) == whole[position % len(whole) :]  # a position equal to the length is a whole epoch
        assert _rows(fresh) == whole  # and only the first pass is a short one
        assert len(fresh) == len(whole)


def test_the_state_outlives_a_broken_off_pass():
    loader = _loader()
    for number, _ in enumerate(loader):
        if number == 1:
            break
    assert loader.state_dict()["position"] == 2
    next(iter(loader))
    assert loader.state_dict()["position"] == 1


def test_a_saved_position_counts_in_its_own_epoch_only():
    loader = _loader()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    loader.sampler.set_epoch(1)
    assert loader.state_dict()["position"] == 0
    fresh = _loader()
    fresh.load_state_dict(state)
    fresh.sampler.set_epoch(1)
    assert len(_rows(fresh)) == 5


def test_a_pass_inside_a_pass_leaves_the_position_alone():
    loader = _loader()
    outer = iter(loader)
    next(outer)
    next(outer)
    assert _rows(loader) == _rows(_loader())
    assert loader.state_dict()["position"] == 2
    next(outer)
    assert loader.state_dict()["position"] == 3

    fresh = _loader()
    fresh.load_state_dict(loader.state_dict())
    outer = iter(fresh)  # Lightning makes the iterator, and a probe may read the loader before the first batch
    assert len(_rows(fresh)) == 5
    assert fresh.state_dict()["position"] == 3
    assert len(list(outer)) == 2


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"seed": 1}, {"rows": 24}])
def test_another_layout_in_mid_epoch_is_an_error(change):
    loader = _loader()
    next(iter(loader))
    fresh = _loader(**change)
    fresh.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="same data layout, got"):
        next(iter(fresh))
    fresh = _loader(**change)
    fresh.load_state_dict(loader.state_dict())
    fresh.sampler.set_epoch(1)  # at an epoch's end a new layout is fine
    next(iter(fresh))


def test_the_order_begins_at_the_first_batch_and_not_at_iter():
    """Lightning calls iter() before set_epoch() when it resumes; workers would prefetch the wrong epoch."""
    loader, expected = _loader(), _loader()
    expected.sampler.set_epoch(4)
    iterator = iter(loader)
    loader.sampler.set_epoch(4)
    assert [batch[2].tolist() for batch in iterator] == _rows(expected)


# -- with a real Trainer

MOVED = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # resumed runs write beside the first ones


def _expected(data, epochs, replicas=1, rank=0):
    """The order that the documentation promises, by plain slicing."""
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(derived_seed(data.seed, epoch))
        order = torch.randperm(data.rows, generator=generator).tolist()
        share = order[: data.rows // replicas * replicas][rank::replicas]
        steps = len(share) // data.batch_size
        for step in range(steps):
            batches.append((epoch, step, share[step * data.batch_size : (step + 1) * data.batch_size]))
    return batches


def test_lightning_sets_the_epoch_on_one_process(tiny, recorder, make_trainer):
    model, data = recorder(), tiny()
    make_trainer(max_epochs=3).fit(model, datamodule=data)
    assert model.seen == _expected(data, 3)
    assert model.validated[-2:] == [[0, 1, 2, 3], [4, 5, 6]]
    assert data.reads == ["train", "val"]  # fit asks for no test images, and reads nothing twice


@MOVED
@pytest.mark.parametrize("reload", [0, 1])
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize(
    ("stop", "limits"),
    [
        (7, {}),  # two batches into the second epoch of five
        (5, {}),  # the last batch of an epoch
        (6, {"limit_train_batches": 3}),  # the last batch of a shortened epoch
        (8, {"limit_train_batches": 3}),
        (7, {"val_check_interval": 2}),
        (6, {"val_check_interval": 1}),
        (7, {"accumulate_grad_batches": 1, "check_val_every_n_epoch": None, "val_check_interval": 3}),
    ],
)
def test_a_stopped_and_resumed_run_sees_what_an_uninterrupted_one_sees(
    tiny, recorder, make_trainer, tmp_path, stop, limits, bank, reload
):
    limits = {**limits, "reload_dataloaders_every_n_epochs": reload, "max_epochs": 4}
    whole = recorder()
    whole.bank = bank
    make_trainer(**limits).fit(whole, datamodule=tiny())

    first, callback = recorder(), ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1)
    first.bank = bank
    make_trainer(callbacks=[callback], max_steps=stop, **limits).fit(first, datamodule=tiny())
    assert torch.load(callback.best_model_path, weights_only=True)["global_step"] == stop

    second, again = recorder(), ModelCheckpoint(tmp_path / "again", every_n_train_steps=stop, save_top_k=-1)
    second.bank = bank
    path = callback.best_model_path
    make_trainer(callbacks=[again], **limits).fit(second, datamodule=tiny(), ckpt_path=path, weights_only=True)
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.layer.weight, whole.layer.weight)


@MOVED
def test_a_module_that_asks_for_the_number_of_steps_resumes_exactly(tiny, recorder, make_trainer, tmp_path):
    """Asking for it in `configure_optimizers` makes Lightning set the loader up before it has read the checkpoint."""

    class Asks(recorder):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 15
            return super().configure_optimizers()

    whole, callback = Asks(), ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
    make_trainer(callbacks=[callback], max_epochs=3).fit(whole, datamodule=tiny())
    second, again = Asks(), ModelCheckpoint(tmp_path / "again", every_n_train_steps=7, save_top_k=-1)
    path = next(tmp_path.glob("*step=7.ckpt"))
    make_trainer(callbacks=[again], max_epochs=3).fit(second, datamodule=tiny(), ckpt_path=path, weights_only=True)
    assert second.seen == whole.seen[7:]


@MOVED
def test_a_checkpoint_of_mid_epoch_validation_resumes_exactly(tiny, recorder, make_trainer, tmp_path):
    """The checkpoint is written after the probe's own pass over the training loader."""
    settings = {"max_epochs": 2, "val_check_interval": 2}
    whole = recorder()
    whole.bank = True
    callback = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=False)
    make_trainer(callbacks=[callback], **settings).fit(whole, datamodule=tiny())
    saved = sorted(tmp_path.glob("*step=2.ckpt"))
    second = recorder()
    second.bank = True
    callback = ModelCheckpoint(tmp_path / "again", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=False)
    make_trainer(callbacks=[callback], **settings).fit(second, datamodule=tiny(), ckpt_path=saved[0])
    assert second.seen == whole.seen[2:]


def test_an_exception_in_mid_epoch_and_a_second_fit(tiny, recorder, make_trainer):
    class Stops(recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 2:
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    model, data = Stops(), tiny()
    with pytest.raises(RuntimeError, match="stop here"):
        make_trainer(max_epochs=1).fit(model, datamodule=data)
    again = recorder()
    make_trainer(max_epochs=1).fit(again, datamodule=data)
    assert again.seen == _expected(data, 1)


def test_overfit_batches_and_predict(tiny, recorder, make_trainer):
    model = recorder()
    with pytest.warns(UserWarning, match="turning off the (train|val) dataloader shuffling"):
        make_trainer(overfit_batches=2, max_epochs=2).fit(model, datamodule=tiny())
    assert [rows for _, _, rows in model.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    predictions = make_trainer().predict(recorder(), datamodule=tiny())
    assert torch.cat(predictions).tolist() == list(range(7))


def test_test_and_validate_read_only_what_they_need(tiny, recorder, make_trainer):
    data = tiny()
    make_trainer().validate(recorder(), datamodule=data, verbose=False)
    assert data.reads == ["val"]
    data.setup()
    data.setup()
    assert data.reads == ["val", "train", "test"]


# -- several processes


def _fit(rank, data, model, make_trainer, path, settings):
    trainer = make_trainer(strategy="ddp", devices=2, **settings)
    trainer.fit(model, datamodule=data, ckpt_path=path)
    return model.seen, model.validated


@MOVED
@pytest.mark.dist
def test_two_ranks_share_each_epoch_and_resume_in_mid_epoch(tiny, recorder, make_trainer, tmp_path):
    data = tiny(rows=27, batch_size=3)

    def run(path, **settings):
        return run_processes(_fit, 2, data, recorder(), make_trainer, path, settings, init=False)

    whole = run(None, max_epochs=3, num_sanity_val_steps=0)
    for rank, (seen, _) in enumerate(whole):
        assert seen == _expected(data, 3, replicas=2, rank=rank)
    for epoch in range(3):
        rows = [row for seen, _ in whole for e, _, batch in seen if e == epoch for row in batch]
        assert len(rows) == len(set(rows)) == 24  # no row twice, on whichever rank
    validated = [row for _, batches in whole for batch in batches for row in batch]
    assert set(validated) == set(range(7))

    callback = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)
    first = run(None, callbacks=[callback], max_steps=6)
    (path,) = tmp_path.glob("*.ckpt")
    again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=6, save_top_k=-1)
    second = run(path, callbacks=[again], max_epochs=3)
    for rank in range(2):
        assert first[rank][0] + second[rank][0] == whole[rank][0]


@pytest.mark.dist
def test_without_a_trainer_a_process_group_is_shared_out():
    def rows(rank):
        loader = _loader(rows=8, batch_size=2)
        return [row for batch in _rows(loader) for row in batch]

    first, second = run_processes(lambda rank: rows(rank), 2)
    assert sorted(first + second) == list(range(8))


@pytest.mark.dist
def test_a_loader_made_for_one_process_is_refused_by_two(tiny, recorder, make_trainer):
    loader = tiny().train_dataloader()  # before any process group: Lightning would leave its sampler as it is

    def fit(rank):
        with pytest.raises(RuntimeError, match=r"created for one process and is used by 2.*`fit\(model, datamodule"):
            make_trainer(strategy="ddp", devices=2, max_epochs=1).fit(recorder(), loader, tiny().val_dataloader())
        return True

    assert run_processes(fit, 2, init=False) == [True, True]


@pytest.mark.dist
def test_prediction_on_two_ranks_repeats_nothing(tiny, recorder, make_trainer):
    def predict(rank):
        trainer = make_trainer(strategy="ddp", devices=2)
        return torch.cat(trainer.predict(recorder(), datamodule=tiny())).tolist()

    assert run_processes(predict, 2, init=False) == [[0, 2, 4, 6], [1, 3, 5]]


@pytest.mark.dist
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_on_two_ranks_counts_each_image_once(stage, tiny, make_trainer):
    """7 images: rank 1 repeats the first one, so that both have as many batches; a probe's figure leaves it out."""

    class Learned(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.rows = torch.nn.Flatten(), []

        def validation_step(self, batch, batch_idx):
            self.rows += batch[2].tolist()
            self.backbone(batch[0].float())

        test_step = validation_step

    bank = [(torch.arange(7).view(7, 1, 1, 1).expand(7, 1, 2, 2).float() + 1, torch.zeros(7, dtype=torch.int64))]

    def top1(**ranks):
        module = Learned()
        trainer = make_trainer(callbacks=[OnlineKNN(3, k=1, dataloader=bank)], **ranks)
        (found,) = getattr(trainer, stage)(module, datamodule=tiny(batch_size=2), verbose=False)
        return module.rows, found["knn/top1" if stage == "validate" else "knn/test_top1"]

    (first, one), (second, other) = run_processes(lambda rank: top1(strategy="ddp", devices=2), 2, init=False)
    assert (first, second) == ([0, 2, 4, 6], [1, 3, 5, 0])
    assert one == other == top1()[1] == pytest.approx(3 / 7)  # rows 0, 3 and 6; with the repeated one it is 4 / 8


def test_no_advice_to_use_workers(tiny, recorder, make_trainer, monkeypatch):
    """Lightning gives it on machines with more cores; warnings are errors here."""
    from lightning.pytorch.trainer.connectors import data_connector

    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda devices: 15)
    model = recorder()
    make_trainer(max_epochs=1).fit(model, datamodule=tiny())
    assert len(model.seen) == 5


def test_loaders_are_ordinary_ones(tiny):
    loader = tiny().train_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert loader.num_workers == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, r"`batch_size` must be >= 1, got 0"),
        ({"batch_size": 2.5}, TypeError, r"`batch_size` must be a whole number, got 2.5"),
        ({"seed": -1}, ValueError, r"`seed` must be >= 0, got -1"),
    ],
)
def test_bad_arguments(tiny, kwargs, error, message):
    with pytest.raises(error, match=message):
        tiny(**kwargs)
    with pytest.raises(ValueError, match=r"`split` must be one of .* Did you mean 'train'"):
        tiny().dataset("trian")

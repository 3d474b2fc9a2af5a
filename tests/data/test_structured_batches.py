"""Near neighbors share a batch, on any number of ranks, each image once, and a stopped epoch goes on where it was."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lightning_contrast.data import EmojiDataModule, ImageFolderDataModule, ResumableLoader, StructuredBatches
from lightning_contrast.data.loading import EpochSampler, MemoryImages, make_loader
from tests.launch import run_processes

ROWS, SIZE = 50, 4


def features():
    """Return 12 dense clusters and two stray points, in a shuffled order."""
    generator = torch.Generator().manual_seed(0)
    centers = 100 * torch.randn(ROWS // SIZE, 3, generator=generator)
    near = centers.repeat_interleave(SIZE, 0) + torch.randn(ROWS // SIZE * SIZE, 3, generator=generator)
    rows = torch.cat([near, 1000 * torch.randn(ROWS % SIZE, 3, generator=generator)])
    return rows[torch.randperm(ROWS, generator=generator)]


def structures():
    return {"features": StructuredBatches(features(), size=SIZE), "groups": StructuredBatches(groups=GROUPS, size=SIZE)}


GROUPS = (torch.arange(ROWS) * 7) % 11 - 1  # five or four images each; below 0 in none


def spread(sets):
    return torch.stack([features()[one].std(0).norm() for one in sets]).median()


@pytest.mark.parametrize("kind", ["features", "groups"])
def test_an_epoch_has_every_image_once_and_depends_on_seed_and_epoch(kind):
    batches = structures()[kind]
    orders = {(seed, epoch): batches.order(seed=seed, epoch=epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        assert sorted(order) == list(range(ROWS))
    assert len({tuple(order) for order in orders.values()}) == 4
    state = torch.random.get_rng_state()
    assert structures()[kind].order(seed=1, epoch=1).tolist() == orders[1, 1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_images_of_a_set_are_near_each_other():
    batches = structures()["features"]
    for epoch in range(3):
        order = batches.order(seed=0, epoch=epoch)
        assert spread(order.split(SIZE)) < 0.4 * spread(torch.randperm(ROWS).split(SIZE))


def test_images_of_a_set_are_of_one_group_and_the_sets_of_an_epoch_differ():
    batches = structures()["groups"]
    known = int((torch.bincount(GROUPS[GROUPS >= 0]) // SIZE).sum())
    seen = set()
    for epoch in range(3):
        sets = batches.order(seed=0, epoch=epoch).split(SIZE)
        same = [one for one in sets if len(set(GROUPS[one].tolist())) == 1 and GROUPS[one[0]] >= 0]
        assert len(same) >= known
        seen |= {tuple(sorted(one.tolist())) for one in same}
    assert len(seen) > known


@pytest.mark.parametrize("rows", [2, 3, 5, 64, 65])
@pytest.mark.parametrize("size", [2, 5])
def test_any_number_of_images_and_equal_features(rows, size):
    for batches in (
        StructuredBatches(torch.zeros(rows, 2), size=size),
        StructuredBatches(groups=torch.full((rows,), 3), size=size),
        StructuredBatches(groups=torch.full((rows,), -1), size=size),
    ):
        assert batches.order(seed=0, epoch=0).sort().values.tolist() == list(range(rows))


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_global_batch_of_all_ranks_holds_whole_sets(replicas):
    batches, per_rank = structures()["features"], 2 * SIZE // replicas if replicas < 3 else SIZE
    samplers = [batches.sampler(range(ROWS), seed=5, replicas=replicas, rank=rank) for rank in range(replicas)]
    shares = []
    for sampler in samplers:
        sampler.set_epoch(2)
        shares.append(list(sampler))
    order = batches.order(seed=5, epoch=2).tolist()
    assert len({row for share in shares for row in share}) == sum(map(len, shares)) == ROWS // replicas * replicas
    for first in range(0, len(shares[0]) - per_rank + 1, per_rank):
        joined = {row for share in shares for row in share[first : first + per_rank]}
        assert joined == set(order[first * replicas : (first + per_rank) * replicas])


def images():
    return MemoryImages(torch.zeros(ROWS, 3, 2, 2, dtype=torch.uint8), torch.zeros(ROWS).long(), indices=True)


def own_loader(batches=None):
    batches = batches or structures()["features"]
    data = images()
    sampler = batches.sampler(data, seed=1)
    return ResumableLoader(data, batch_size=8, sampler=sampler, drop_last=True, collate_fn=lambda batch: batch)


def module_loader(batches=None):
    batches = batches or structures()["features"]
    options = {"train": True, "seed": 1, "collate_fn": lambda batch: batch}
    return make_loader(images(), 8, trainer=None, batches=batches, **options)


def rows_of(loader):
    return [batch[-1].tolist() for batch in loader]


@pytest.mark.parametrize("make", [own_loader, module_loader])
def test_a_stopped_epoch_resumes_at_the_same_batch(make):
    whole, stopped, resumed = make(), make(), make()
    for loader in (whole, stopped):
        loader.sampler.set_epoch(3)
    expected, started = rows_of(whole), iter(stopped)
    assert [next(started)[-1].tolist() for _ in range(2)] == expected[:2]
    resumed.load_state_dict(stopped.state_dict())
    assert rows_of(resumed) == expected[2:]


def test_other_neighbors_in_mid_epoch_are_an_error():
    stopped, other = own_loader(), own_loader(StructuredBatches(features() + 1, size=SIZE))
    next(iter(stopped))
    other.load_state_dict(stopped.state_dict())
    with pytest.raises(ValueError, match="must resume with the same data layout"):
        next(iter(other))


@pytest.mark.slow
def test_data_modules_take_them_for_training_only(tmp_path):
    labels = EmojiDataModule().labels("train")
    batches = StructuredBatches(groups=labels, size=16)
    data = EmojiDataModule(batch_size=64, seed=2, batches=batches, indices=True)
    first = next(iter(data.train_dataloader()))
    assert first[2].tolist() == batches.order(seed=2, epoch=0)[:64].tolist()
    assert all(len(set(part.tolist())) == 1 for part in first[1].split(16))
    assert next(iter(data.val_dataloader()))[2].tolist() == list(range(64))
    for number in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    pairs = StructuredBatches(groups=torch.arange(6) % 3, size=2)
    folder = ImageFolderDataModule(tmp_path, size=4, batch_size=2, num_workers=0, batches=pairs, indices=True)
    assert all(len({int(row) % 3 for row in batch[2]}) == 1 for batch in folder.train_dataloader())


def fit(rank, data, model, make_trainer, path, settings):
    trainer = make_trainer(num_sanity_val_steps=0, limit_val_batches=0, **settings)
    trainer.fit(model, datamodule=data, ckpt_path=path)
    return model.seen


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.dist
def test_two_ranks_share_each_structured_batch_and_resume_in_mid_epoch(tiny, recorder, make_trainer, tmp_path):
    batches = StructuredBatches(groups=torch.arange(27) % 3, size=6)
    data = tiny(rows=27, batch_size=3, batches=batches)  # 4 batches of 6 in all

    def run(path, **settings):
        settings |= {"strategy": "ddp", "devices": 2}
        return run_processes(fit, 2, data, recorder(), make_trainer, path, settings, init=False)

    whole = run(None, max_epochs=3)
    for epoch in range(3):
        of_ranks = [[rows for e, _, rows in seen if e == epoch] for seen in whole]
        joined = [first + second for first, second in zip(*of_ranks, strict=True)]
        assert len({row for rows in joined for row in rows}) == 24
        assert sum(len({row % 3 for row in rows}) == 1 for rows in joined) >= 3  # what is left of groups of nine mixes
    first = run(None, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)], max_steps=6)
    (path,) = tmp_path.glob("*.ckpt")
    second = run(path, callbacks=[ModelCheckpoint(tmp_path / "again", every_n_train_steps=6)], max_epochs=3)
    for rank in range(2):
        assert first[rank] + second[rank] == whole[rank]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "`features` must be given without `groups`"),
        ({"features": torch.zeros(2, 2), "groups": torch.zeros(2).long()}, ValueError, "without `groups`"),
        ({"features": torch.zeros(2, 2).long()}, TypeError, "`features` must be floating point"),
        ({"features": torch.zeros(2)}, ValueError, r"`features` must be \(N, D\)"),
        ({"features": torch.full((2, 2), float("nan"))}, ValueError, "`features` must be finite"),
        ({"groups": torch.zeros(2)}, TypeError, "`groups` must be integers"),
        ({"groups": torch.zeros(2, 2).long()}, ValueError, r"`groups` must be \(N,\)"),
        ({"groups": torch.zeros(2).long(), "size": 1}, ValueError, "`size` must be >= 2"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        StructuredBatches(**arguments)


def test_another_number_of_images_is_an_error():
    with pytest.raises(ValueError, match="`batches` must describe the 49 training images, got 50"):
        EpochSampler(range(49), batches=structures()["features"])

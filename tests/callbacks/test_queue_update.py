"""The queues are fed after the loss, alike on every rank, and survive a stop."""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_contrast.callbacks import QueueUpdate
from lightning_contrast.nn import FeatureQueue, MemoryBank
from tests.callbacks.step_modules import fit, loader, states_equal
from tests.callbacks.strategies import STRATEGIES, fit_ranks, sharded
from tests.launch import run_processes
from tests.tolerances import NETWORK, bound


class Queued(L.LightningModule):
    """A linear layer with a queue; keeps what it gave and what the queue held when the loss was computed."""

    def __init__(self, size=16, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.lr = nn.Linear(6, 3), 0.1
        self.queue = FeatureQueue(size, 3, **settings)
        self.given, self.seen = [], []

    def queues(self):
        return {"keys": self.queue}

    def training_step(self, batch, batch_idx):
        x = batch[0]
        keys = self.layer(x)
        self.given.append(keys.detach().clone())
        self.seen.append((self.queue.features.clone(), self.queue.mask.clone()))
        return {"loss": keys.square().mean(), "keys": keys}

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.01)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_key_is_never_its_own_negative(accumulate):
    module = Queued()
    fit(module, [QueueUpdate()], accumulate_grad_batches=accumulate)
    for step, (keys, (features, mask)) in enumerate(zip(module.given, module.seen, strict=True)):
        assert mask.sum() == min(4 * step, 16)  # every micro-batch before, not this one
        distances = torch.cdist(keys, features[mask]) if mask.any() else torch.ones(1)
        assert distances.min() > bound(NETWORK)
    newest = torch.cat(module.given[-4:])
    assert torch.equal(module.queue.features, newest)  # 8 batches of 4 end at the end of 16 rows
    assert torch.equal(module.queue.features, torch.cat(module.given)[16:])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_precision_and_manual_optimization(dtype):
    class Manual(Queued):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(outputs["loss"])
            self.optimizers().step()
            return outputs

    module = Manual(dtype=dtype)
    fit(module, [QueueUpdate()], precision="bf16-mixed")
    assert module.queue.features.dtype == torch.float32
    newest, steps = torch.cat(module.given[-4:]).float(), 13 if dtype == "int4" else 250
    torch.testing.assert_close(module.queue.features, newest, atol=newest.abs().max().item() / steps, rtol=0)


class Labelled(Queued):
    """Two queues, one of them with labels; their rows must stay together."""

    def __init__(self):
        super().__init__(labels=True)
        self.second = FeatureQueue(9, 1)

    def queues(self):
        return {"keys": self.queue, "others": self.second}

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        labels = outputs["keys"].detach()[:, 0].mul(1e6).long()
        return outputs | {"keys_labels": labels, "others": batch[0][:, :1]}


def test_labels_and_several_queues():
    module = Labelled()
    fit(module, [QueueUpdate()])
    assert torch.equal(module.queue.labels, module.queue.features[:, 0].mul(1e6).long())
    rows = loader().dataset.tensors[0][:, :1]
    expected = torch.zeros(9, 1)
    for i, row in enumerate(rows):
        expected[i % 9] = row
    assert torch.equal(module.second.features, expected)


class Indexed(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return torch.randn(6, generator=generator), 0, i


class Banked(Queued):
    def __init__(self, num_samples=32):
        super().__init__()
        self.bank = MemoryBank(num_samples, 3, momentum=0.0)

    def queues(self):
        return {"keys": self.bank}

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) | {"indices": batch[2]}


def test_a_memory_bank_is_fed_by_index():
    module = Banked()
    fit(module, [QueueUpdate()], DataLoader(Indexed(), batch_size=4))
    expected = nn.functional.normalize(torch.cat(module.given), dim=1)
    torch.testing.assert_close(module.bank.features, expected)


def test_a_step_that_returns_none_feeds_nothing():
    class Sometimes(Queued):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

    module = Sometimes(size=40)
    fit(module, [QueueUpdate()])
    assert module.queue.mask.sum() == 28


def test_validation_feeds_nothing():
    class Validates(Queued):
        def validation_step(self, batch, batch_idx):
            assert not torch.is_grad_enabled()
            return {"keys": self.layer(batch[0])}

        def val_dataloader(self):
            return loader()

    module = Validates(size=40)
    fit(module, [QueueUpdate()])
    assert torch.equal(module.queue.features[:32], torch.cat(module.given))


def test_a_resumed_run_is_exact(tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    whole, resumed = Queued(size=15), Queued(size=15)
    fit(whole, [QueueUpdate(), Save()], max_epochs=2)
    fit(resumed, [QueueUpdate()], max_epochs=2, ckpt_path=tmp_path / "stop.ckpt")
    assert states_equal(whole.state_dict(), resumed.state_dict())
    torch.load(tmp_path / "stop.ckpt", weights_only=True)


def test_a_second_fit_goes_on_and_it_can_be_copied():
    module, update = Queued(size=64), QueueUpdate()
    fit(module, [update])
    other = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    fit(module, [copy.deepcopy(update)])
    assert module.queue.mask.sum() == 64
    assert other.queue.mask.sum() == 32


# --- bad input


class Without(Queued):
    queues = property()


class Empty(Queued):
    def queues(self):
        return {}


class Outside(Queued):
    def queues(self):
        return {"keys": FeatureQueue(4, 3)}


class Misnamed(Queued):
    def queues(self):
        return {"projections": self.queue}


class Bare(Queued):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


class Unlabelled(Queued):
    def __init__(self):
        super().__init__(labels=True)


class NoIndices(Banked):
    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        del outputs["indices"]
        return outputs


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (Without, TypeError, "`pl_module` must have a method `queues`, got 'Without'"),
        (Empty, ValueError, "`queues` must return at least one queue"),
        (Outside, ValueError, "`queues` must return submodules of the module, got 'keys'"),
        (Misnamed, ValueError, "`training_step` must return a tensor 'projections' .* got \"'loss', 'keys'\""),
        (Bare, ValueError, "`training_step` must return a tensor 'keys' .* got \"'loss'\""),
        (Unlabelled, ValueError, "`training_step` must return a tensor 'keys_labels'"),
        (NoIndices, ValueError, "`training_step` must return a tensor 'indices'"),
        (
            lambda: Queued(size=3),
            ValueError,
            "Cannot push 4 keys into a queue of size 3; raise `queue_size`.",
        ),
        (lambda: Banked(num_samples=2), ValueError, r"`indices` must lie in \[0, 2\), got \(0, 3\)"),
    ],
)
def test_bad_modules_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        fit(make(), [QueueUpdate()], DataLoader(Indexed(), batch_size=4))


@pytest.mark.parametrize(("size", "keys_per_image", "accumulate", "keys"), [(3, 1, 1, 4), (7, 2, 1, 8), (3, 1, 4, 4)])
def test_a_queue_smaller_than_a_batch_is_refused_before_the_first_step(size, keys_per_image, accumulate, keys):
    module = Queued(size)
    module.keys_per_image = keys_per_image
    with pytest.raises(ValueError, match=rf"Cannot push {keys} keys into a queue of size {size}; raise `queue_size`"):
        fit(module, [QueueUpdate()], accumulate_grad_batches=accumulate)
    assert not module.given


def test_accumulation_and_a_size_that_is_no_multiple_are_fine():
    module = Queued(size=5)
    fit(module, [QueueUpdate()], accumulate_grad_batches=4)
    assert module.queue.mask.all()


class Unsized:
    """Batches without a batch size; the last has more keys than the queue has rows."""

    def __iter__(self):
        rows = torch.randn(9, 6)
        yield from ([rows[:2]], [rows[2:]])


class Batches(torch.utils.data.Sampler):
    """Somebody's own sampler of batches, of 4 images each."""

    batch_size = 4

    def __iter__(self):
        return iter([[0, 1, 2, 3]])

    def __len__(self):
        return 1


def test_a_loader_that_does_not_tell_its_batch_size_errs_at_the_push():
    module = Queued(size=5)
    with pytest.raises(ValueError, match="Cannot push 7 keys into a queue of size 5; raise `queue_size`"):
        fit(module, [QueueUpdate()], Unsized(), max_steps=2)
    assert len(module.given) == 2


def test_a_batch_sampler_tells_its_batch_size():
    module = Queued(size=3)
    with pytest.raises(ValueError, match="Cannot push 4 keys into a queue of size 3"):
        fit(
            module,
            [QueueUpdate()],
            DataLoader(Indexed(), batch_sampler=Batches()),
            use_distributed_sampler=False,
        )
    assert not module.given


def test_a_set_smaller_than_a_batch_gives_no_more_keys_than_it_has():
    module = Queued(size=32)
    fit(module, [QueueUpdate()], DataLoader(Indexed(), batch_size=128))
    assert module.queue.mask.all()


# --- several ranks


class Ranked(sharded(Queued)):
    def __init__(self, **settings):
        super().__init__(size=20, **settings)
        self.ignored = None

    def on_train_start(self):
        self.ignored = getattr(self.trainer.strategy.model, "parameters_to_ignore", None)


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def ranked(rank, name, folder, precision, shares=False):
    def run(path=None):
        module = Ranked(sharded=shares)
        settings = {"max_epochs": 2, "precision": precision}
        fit_ranks(module, [QueueUpdate(), Save(folder / "stop.ckpt")], loader(8), name, ckpt_path=path, **settings)
        return module

    module = run()
    again = run(folder / "stop.ckpt")
    queue = (module.queue.features, module.queue.mask)
    return queue, (again.queue.features, again.queue.mask), module.given, module.ignored, module.queue.features.dtype


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "32-true") for name in STRATEGIES), ("fsdp1 root", "bf16-mixed"), ("fsdp2", "bf16-mixed")],
)
def test_every_rank_has_the_keys_of_all_in_rank_order(tmp_path, name, precision):
    results = run_processes(ranked, 2, name, tmp_path, precision, init=False)
    pushes = [keys for step in zip(*(result[2] for result in results), strict=True) for keys in step]
    expected = torch.zeros(20, 3)
    for i, row in enumerate(torch.cat(pushes)):
        expected[i % 20] = row
    assert len(torch.cat(pushes)) == 64
    for (features, mask), again, _, ignored, dtype in results:
        assert dtype == torch.float32
        assert mask.all()
        assert torch.equal(features, expected)
        assert torch.equal(features, again[0])
        if name == "ddp":
            assert ignored == {"queue.bits", "queue.mask", "queue.position"}


@pytest.mark.dist
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_sharded_queue_holds_the_keys_of_all_and_resumes(tmp_path, name):
    results = run_processes(ranked, 2, name, tmp_path, "32-true", True, init=False)
    pushes = [keys for step in zip(*(result[2] for result in results), strict=True) for keys in step]
    expected = torch.zeros(20, 3)
    for i, row in enumerate(torch.cat(pushes)):
        expected[i % 20] = row
    for rank, ((features, mask), again, *_) in enumerate(results):
        assert mask.all()
        assert torch.equal(features, expected[rank::2])
        assert torch.equal(features, again[0])
    if name == "ddp":
        saved = torch.load(tmp_path / "stop.ckpt", weights_only=True)["state_dict"]
        assert saved["queue.bits"].shape == (20, 3)


def too_many(rank):
    module = Queued(size=7)
    try:
        fit_ranks(module, [QueueUpdate()], loader(8), "ddp")
    except ValueError as error:
        return str(error), len(module.given)
    return "no error", len(module.given)


@pytest.mark.dist
def test_the_global_batch_must_fit():
    for message, steps in run_processes(too_many, 2, init=False):
        assert message == "Cannot push 8 keys into a queue of size 7; raise `queue_size`."
        assert steps == 0

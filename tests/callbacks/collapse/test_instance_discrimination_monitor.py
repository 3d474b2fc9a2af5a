"""`InstanceDiscriminationMonitor` against plain loops, and its errors."""

import math

import lightning as L
import pytest
import torch
from torch import nn

from lightning_contrast.callbacks import InstanceDiscriminationMonitor, MomentumUpdate, QueueUpdate
from lightning_contrast.callbacks.collapse.instance_discrimination_monitor import against_batch, against_queue
from lightning_contrast.losses import nt_xent
from lightning_contrast.nn import MemoryBank
from tests.callbacks.monitor_modules import Queued, TwoViews, views_loader
from tests.callbacks.probe_modules import adversary, quiet_fit
from tests.launch import run_processes
from tests.tolerances import near


def embeddings(count=9, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(count, width, generator=g)
    return a, a + 0.8 * torch.randn(count, width, generator=g), torch.randint(-1, 3, (count,), generator=g)


def cosine(x, y):
    return float(x.double() @ y.double() / (x.double().norm() * y.double().norm()))


def summary(anchors, temperature, hardest):
    """Return means over anchors, each (positive, [(negative cosine, is false negative)], label is known)."""
    sums = {}

    def add(name, value, counts=True):
        total, number = sums.get(name, (0.0, 0))
        sums[name] = (total + value, number + 1) if counts else (total, number)

    for positive, negatives, known in anchors:
        cosines = [c for c, _ in negatives]
        exps = [math.exp(c / temperature) for c in cosines]
        loss = math.log(math.exp(positive / temperature) + sum(exps)) - positive / temperature
        entropy = -sum(e / sum(exps) * math.log(e / sum(exps)) for e in exps)
        limit = math.log(len(negatives) + 1)
        hard = sorted(negatives, key=lambda item: -item[0])[:hardest]
        add("positive_cosine", positive)
        add("negative_cosine", sum(cosines) / len(cosines))
        add("top1", float(positive > max(cosines)))
        add("loss", loss)
        add("bound", limit - loss)
        add("bound_limit", limit)
        add("effective_negatives", math.exp(entropy))
        add("effective_negatives_share", math.exp(entropy) / len(negatives))
        if known is not None:
            add("false_negatives", sum(f for _, f in hard) / len(hard), known)
            add("false_negatives_chance", sum(f for _, f in negatives) / len(negatives), known)
    return {name: total / number for name, (total, number) in sums.items()}


def batch_by_hand(a, b, labels, temperature, hardest):
    rows, names = [*a, *b], labels.tolist() * 2
    anchors = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j % len(a) != i % len(a)]
        negatives = [(cosine(rows[i], rows[j]), names[i] == names[j]) for j in others]
        anchors.append((cosine(rows[i], rows[(i + len(a)) % len(rows)]), negatives, names[i] >= 0))
    return summary(anchors, temperature, hardest)


def test_a_batch_equals_plain_loops():
    a, b, labels = embeddings()
    values = against_batch(a, b, torch.tensor(0.3), labels, 4)
    expected = batch_by_hand(a, b, labels, 0.3, 4)
    assert {name: value.item() for name, value in values.items()} == near(expected)
    assert values["loss"].item() == near(nt_xent(a, b, temperature=0.3).item())


def test_a_queue_equals_plain_loops():
    a, b, _ = embeddings()
    queue, mask = embeddings(14, seed=3)[0], torch.arange(14) % 3 > 0
    values = against_queue(a, b, queue, mask, torch.tensor(0.3))
    anchors = [
        (cosine(x, y), [(cosine(x, z), False) for z, valid in zip(queue, mask, strict=True) if valid], None)
        for x, y in zip(a, b, strict=True)
    ]
    assert {name: value.item() for name, value in values.items()} == near(summary(anchors, 0.3, 1))


def test_what_has_no_value_is_left_out():
    a, b, labels = embeddings()
    assert against_batch(a, b, None, None, 4).keys() == {"positive_cosine", "negative_cosine", "top1"}
    unknown = against_batch(a, b, None, labels.fill_(-1), 4)
    assert unknown["false_negatives"].isnan()
    empty = against_queue(a, b, embeddings(4)[0], torch.zeros(4, dtype=torch.bool), torch.tensor(0.3))
    assert empty["loss"].isnan()
    assert empty["positive_cosine"].isfinite()


def test_equal_embeddings_have_no_top1_and_flat_negatives():
    values = against_batch(torch.ones(6, 3), torch.ones(6, 3), torch.tensor(0.1), None, 4)
    assert values["top1"].item() == 0
    assert values["bound"].item() == near(0, size=1)
    assert values["effective_negatives"].item() == near(10)


@pytest.mark.dist
def test_two_ranks_measure_the_joined_batch():
    a, b, labels = embeddings(13)

    def on_rank(rank):
        rows = slice(0, 5) if rank == 0 else slice(5, 13)
        queue, mask = embeddings(14, seed=3)[0], torch.ones(14, dtype=torch.bool)
        joined = against_batch(a[rows], b[rows], torch.tensor(0.3), labels[rows], 4)
        return joined | {f"queue/{k}": v for k, v in against_queue(a[rows], b[rows], queue, mask, None).items()}

    first, second = run_processes(on_rank, 2)
    expected = batch_by_hand(a, b, labels, 0.3, 4)
    for values in (first, second):
        assert {name: values[name].item() for name in expected} == near(expected)
    whole = against_queue(a, b, embeddings(14, seed=3)[0], torch.ones(14, dtype=torch.bool), None)
    assert first["queue/top1"].item() == near(whole["top1"].item())


@pytest.mark.parametrize("joined", [True, False])
def test_it_measures_what_the_step_computed(joined):
    module = TwoViews(joined=joined)
    run = quiet_fit(module, [InstanceDiscriminationMonitor(every_n_steps=4)], views_loader(), max_epochs=1)
    labels = torch.cat([batch[1] for batch in views_loader()])[48:]
    expected = against_batch(*module.last, torch.tensor(0.5), labels, 10)
    found = {name: run.callback_metrics[f"contrast/{name}"].item() for name in expected}
    assert found == near({name: value.item() for name, value in expected.items()})


def test_a_queue_is_read_before_the_keys_of_the_step_enter_it():
    module = Queued()
    callbacks = [QueueUpdate(), InstanceDiscriminationMonitor(every_n_steps=3), MomentumUpdate(0.9)]
    run = quiet_fit(module, callbacks, views_loader(48), max_epochs=1)
    query, key, queue, mask = module.last
    assert mask.sum() == 32
    expected = against_queue(query, key, queue, mask, torch.tensor(0.5))
    found = {name: run.callback_metrics[f"contrast/{name}"].item() for name in expected}
    assert found == near({name: value.item() for name, value in expected.items()})
    assert "contrast/false_negatives" not in run.callback_metrics


def test_only_every_nth_batch_is_touched():
    counts = []

    class Counts(InstanceDiscriminationMonitor):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append((len(self._hook._views), self._queue is not None))
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    quiet_fit(Queued(), [Counts(every_n_steps=3), QueueUpdate()], views_loader(112), max_epochs=1)
    assert counts == [(1, True) if i in (2, 5) else (0, False) for i in range(7)]


@pytest.mark.parametrize(
    ("where", "value"),
    [("number", 0.2), ("parameter", 0.2), ("module", 0.2), ("criterion", 0.2), ("argument", 0.2), ("none", None)],
)
def test_the_temperature_is_found(where, value):
    class Divides(nn.Module):
        def forward(self):
            return torch.tensor([0.2])

    module = TwoViews()
    if where == "criterion":
        del module.temperature
        module.criterion = nn.Module()
        module.criterion.temperature = 0.2
    elif where == "none":
        del module.temperature
    elif where != "argument":
        found = {"number": 0.2, "parameter": torch.tensor([0.2]), "module": Divides()}[where]
        del module.temperature
        module.temperature = found
    module.training_step = lambda batch, i, step=module.training_step: {
        "loss": nt_xent(*module.embed(batch[0])[1], temperature=0.5)
    }
    monitor = InstanceDiscriminationMonitor(every_n_steps=4, temperature=0.2 if where == "argument" else None)
    run = quiet_fit(module, [monitor], views_loader(), max_epochs=1)
    assert ("contrast/loss" in run.callback_metrics) == (value is not None)
    if value is not None:
        share = run.callback_metrics["contrast/effective_negatives_share"].item()
        assert 0 < share < 1
        assert run.callback_metrics["contrast/bound"] < run.callback_metrics["contrast/bound_limit"]


def test_unlabelled_views_and_labels_of_ones_own():
    run = quiet_fit(
        TwoViews(), [InstanceDiscriminationMonitor(every_n_steps=4)], views_loader(labels=False), max_epochs=1
    )
    assert "contrast/top1" in run.callback_metrics
    assert "contrast/false_negatives" not in run.callback_metrics
    monitor = InstanceDiscriminationMonitor(every_n_steps=4, labels=lambda batch: torch.zeros(16, dtype=torch.int64))
    run = quiet_fit(TwoViews(), [monitor], views_loader(labels=False), max_epochs=1)
    assert run.callback_metrics["contrast/false_negatives"].item() == 1


def test_a_resumed_run_measures_the_same_batches(tmp_path):
    whole = InstanceDiscriminationMonitor(every_n_steps=6)
    run = quiet_fit(TwoViews(), [whole], views_loader(), max_epochs=2)
    first = InstanceDiscriminationMonitor(every_n_steps=6)
    half = quiet_fit(TwoViews(), [first], views_loader(), max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    second = InstanceDiscriminationMonitor(every_n_steps=6)
    resumed = quiet_fit(TwoViews(), [second], views_loader(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert second._batches == whole._batches == 8
    assert "contrast/top1" not in half.callback_metrics
    assert "contrast/top1" in resumed.callback_metrics
    assert "contrast/top1" in run.callback_metrics


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`temperature` must be > 0"):
        InstanceDiscriminationMonitor(temperature=0.0)
    with pytest.raises(ValueError, match="`every_n_steps` must be >= 1"):
        InstanceDiscriminationMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match=r"(?s)`features` must name a submodule of TwoViews.*Near names: 'projector'"):
        quiet_fit(TwoViews(), [InstanceDiscriminationMonitor("projectr")], views_loader())
    with pytest.raises(ValueError, match=r"`features` must be a layer whose output is two views .*got '1 view'"):
        quiet_fit(adversary(L.LightningModule)(), [InstanceDiscriminationMonitor("maker", every_n_steps=1)])
    module = TwoViews()
    module.other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`features` must be a layer whose output is two views .*got 'nothing'"):
        quiet_fit(module, [InstanceDiscriminationMonitor("other", every_n_steps=1)], views_loader())


def test_keys_of_a_memory_bank_are_no_second_view():
    class Banked(Queued):
        def __init__(self):
            super().__init__()
            self.queue = MemoryBank(64, 12)

        def training_step(self, batch, batch_idx):
            projection = self.projector(self.backbone(batch[0][0]))
            return {"loss": projection.square().mean(), "keys": projection.detach()}

    with pytest.raises(ValueError, match="got '1 view'"):
        quiet_fit(Banked(), [InstanceDiscriminationMonitor(every_n_steps=1)], views_loader())

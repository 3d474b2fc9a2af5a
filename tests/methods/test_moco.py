"""MoCo's own properties: its loss, its queue, shuffled BatchNorm, and the callbacks it brings."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate, QueueUpdate
from lightning_contrast.nn import SplitBatchNorm2d
from lightning_contrast.nn.shuffle_batchnorm import Shuffle
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, fill_queue, make
from tests.methods.test_contract import BATCH, BATCHES, Data, run_step, step_batch, trainer
from tests.rank_runs import batch_of, fitted_state, on_ranks
from tests.tolerances import CANCELLING, NETWORK, bound, f64, near

CASE = CASES["MoCo"]


def dense_info_nce(query, keys, negatives, temperature):
    """Average cross entropy of the positive among the filled rows, in plain loops."""
    query, keys, negatives = (F.normalize(x.detach().double(), dim=1) for x in (query, keys, negatives))
    total = 0.0
    for q, k in zip(query, keys, strict=True):
        logits = torch.stack([q @ k, *(q @ n for n in negatives)]) / temperature
        total += float(logits.exp().sum().log() - logits[0])
    return total / len(query)


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_is_the_papers_over_the_filled_rows(symmetric):
    module = fill_queue(make("MoCo", symmetric=symmetric, temperature=0.3))
    (view_q, view_k), labels = step_batch(CASE)
    out = run_step(module, [[view_q, view_k], labels])
    negatives = module.queue.features[module.queue.mask]
    assert len(negatives) == module.queue.size - 4

    def direction(a, b):
        keys = module.momentum_projector(module.momentum_backbone(b))
        return dense_info_nce(module.projector(module.backbone(a)), keys, negatives, 0.3), F.normalize(keys, dim=1)

    value, keys = direction(view_q, view_k)
    if symmetric:
        other, other_keys = direction(view_k, view_q)
        value, keys = value + other, torch.stack([keys, other_keys], 1).flatten(0, 1)
    assert out["loss"].item() == near(value)
    torch.testing.assert_close(out["keys"], keys)
    assert not out["keys"].requires_grad


def test_versions_have_their_heads_temperatures_and_schedules():
    v1, v2 = lc.MoCo(TinyBackbone(), head_layers=1, queue_size=8), lc.MoCo(TinyBackbone(), queue_size=8)
    linears = [[m for m in module.projector.modules() if isinstance(m, nn.Linear)] for module in (v1, v2)]
    assert [[(m.in_features, m.out_features, m.bias is not None) for m in heads] for heads in linears] == [
        [(8, 128, True)],
        [(8, 8, True), (8, 128, True)],
    ]
    assert (v1.temperature, v2.temperature) == (0.07, 0.2)
    assert [v1.lr_factor(step, 0, 200) for step in (0, 119, 120, 159, 160, 199)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert v2.lr_factor(100, 0, 200) == pytest.approx(0.5)


@pytest.mark.parametrize("head_layers", [1, 2])
def test_schedule_is_independent_of_the_head(head_layers):
    demo, steps = (
        lc.MoCo(TinyBackbone(), head_layers=head_layers, queue_size=8, lr_schedule=name) for name in ("cosine", "steps")
    )
    assert [demo.lr_factor(step, 0, 200) for step in (0, 50, 100, 200)] == pytest.approx(
        [(1 + math.cos(math.pi * step / 200)) / 2 for step in (0, 50, 100, 200)]
    )
    assert [steps.lr_factor(step, 0, 200) for step in (0, 119, 120, 160)] == pytest.approx([1, 1, 0.1, 0.01])


def test_after_enough_steps_the_queue_holds_the_last_keys_of_all_steps(tmp_path):
    keys = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            keys.append(outputs["keys"].clone())

    module = make("MoCo", queue_size=2 * BATCH + 4)
    trainer(tmp_path, CASE, epochs=1, callbacks=[Record()], limit_val_batches=0).fit(module, Data(BATCH))
    assert len(keys) == BATCHES
    assert module.queue.mask.all()
    held = {tuple(row.tolist()) for row in module.queue.features}
    assert held == {tuple(row.tolist()) for row in torch.cat(keys)[-module.queue.size :]}


def test_momentum_network_moves_by_the_papers_rule(tmp_path):
    module = make("MoCo", momentum=0.75)
    start = module.momentum_backbone.layers[0].weight.clone()
    fit = trainer(tmp_path, CASE, epochs=1, limit_train_batches=1, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    expected = 0.75 * start + 0.25 * module.backbone.layers[0].weight
    torch.testing.assert_close(module.momentum_backbone.layers[0].weight, expected.detach())
    assert fit.callback_metrics["train/momentum"] == 0.75


def test_split_batchnorm_is_in_both_networks_and_shuffled_keys_come_back_in_order():
    module = make("MoCo", batchnorm_splits=4)
    for network in (module.backbone, module.momentum_backbone):
        assert [m.splits for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [4]
        assert any(isinstance(m, SplitBatchNorm2d) for m in network.modules())
    (_, view_k), _ = step_batch(CASE)
    module.eval()  # running statistics: an order changes nothing but the order
    keys = F.normalize(module.momentum_projector(module.momentum_backbone(view_k)), dim=1)
    torch.testing.assert_close(module._keys(view_k), keys)


def test_keys_are_normalised_with_other_images_than_their_queries():
    module = make("MoCo", batchnorm_splits=4)
    (view_q, _), _ = step_batch(CASE)
    still = make("MoCo", batchnorm_splits=4, shuffle=False)
    torch.testing.assert_close(still._keys(view_q), F.normalize(still.projector(still.backbone(view_q)), dim=1))
    assert (module._keys(view_q) - still._keys(view_q)).abs().max() > bound(NETWORK)


def exchange(rank):
    torch.manual_seed(rank)  # ranks draw differently, and rank 0's permutation counts
    size = 3 + rank
    rows = torch.arange(size)[:, None] + 10 * rank
    shuffle = Shuffle(size, rows.device)
    mixed = shuffle(rows)
    return mixed.squeeze(1).tolist(), shuffle.undo(mixed).squeeze(1).tolist()


@pytest.mark.dist
def test_shuffling_exchanges_images_between_ranks():
    mixed, back = zip(*run_processes(exchange, 2), strict=True)
    assert back == ([0, 1, 2], [10, 11, 12, 13])
    assert sorted(mixed[0] + mixed[1]) == [0, 1, 2, 10, 11, 12, 13]
    assert any(value >= 10 for value in mixed[0])


def sharded_fit(rank):
    module = make("MoCo", norm=False, queue_sharded=True, mask_same="label")
    rows = (slice(0, 4), slice(4, 8))[rank]
    return fitted_state(module, [batch_of("MoCo", rows)] * 3, **on_ranks(2))


@pytest.mark.dist
def test_two_ranks_with_a_sharded_queue_train_as_one_process():
    alone = fitted_state(make("MoCo", norm=False, mask_same="label"), [batch_of("MoCo")] * 3)
    assert alone["queue.mask"].any()
    for found in run_processes(sharded_fit, 2, init=False):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, **f64(CANCELLING), msg=lambda m, n=name: f"{n}: {m}")


class Plain(L.LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.layer = TinyBackbone()

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0][0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("second", ["SimCLR", "BYOL", "MoCo", "plain"])
@pytest.mark.slow
def test_a_trainer_that_goes_on_to_another_module_leaves_the_plug_ins_of_the_first_behind(second, tmp_path):
    first = make("MoCo")
    fit = trainer(tmp_path, CASE, epochs=1, limit_val_batches=0)
    fit.fit(first, Data(BATCH))
    firsts = [c for c in fit.callbacks if isinstance(c, MomentumUpdate | QueueUpdate)]
    assert [c.updates for c in firsts if isinstance(c, MomentumUpdate)] == [BATCHES]

    module = Plain() if second == "plain" else make(second, **({"momentum": 0.5} if second == "BYOL" else {}))
    fit.fit_loop.max_epochs = 2
    fit.fit(module, Data(BATCH))
    left = [c for c in fit.callbacks if isinstance(c, MomentumUpdate | QueueUpdate)]
    assert not {id(c) for c in firsts} & {id(c) for c in left}
    kinds = {"BYOL": [MomentumUpdate], "MoCo": [MomentumUpdate, QueueUpdate]}.get(second, [])
    assert [type(c) for c in left] == kinds
    assert [c.start for c in left if isinstance(c, MomentumUpdate)] == ([0.5] if second == "BYOL" else [0.999])[
        : len(kinds)
    ]


@pytest.mark.slow
def test_a_second_fit_keeps_the_same_plug_ins(tmp_path):
    module = make("MoCo")
    fit = trainer(tmp_path, CASE, epochs=1, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    firsts = [c for c in fit.callbacks if isinstance(c, MomentumUpdate | QueueUpdate)]
    fit.fit_loop.max_epochs = 2
    fit.fit(module, Data(BATCH))
    assert [c for c in fit.callbacks if isinstance(c, MomentumUpdate | QueueUpdate)] == firsts
    assert firsts[0].updates == 2 * BATCHES


@pytest.mark.slow
def test_queue_smaller_than_the_batch_says_so(tmp_path):
    fit = trainer(tmp_path, CASE, epochs=1, limit_val_batches=0)
    with pytest.raises(ValueError, match=rf"Cannot push {BATCH} keys into a queue of size 4; raise `queue_size`"):
        fit.fit(make("MoCo", queue_size=4), Data(BATCH))
    with pytest.raises(ValueError, match=rf"Cannot push {2 * BATCH} keys into a queue of size {2 * BATCH - 1}"):
        fit.fit(make("MoCo", queue_size=2 * BATCH - 1, symmetric=True), Data(BATCH))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.1}, r"`momentum` must lie in \[0, 1\], got 1\.1"),
        ({"momentum": -0.1}, r"`momentum` must lie in \[0, 1\]"),
        ({"queue_size": 0}, r"`queue_size` must be >= 1"),
        ({"temperature": 0.0}, r"`temperature` must be > 0"),
        ({"head_layers": 3}, r"`head_layers` must be one of 1, 2"),
        ({"batchnorm_splits": 0}, r"`batchnorm_splits` must be >= 1"),
        ({"weighting": "hardest"}, r"must be one of 'uniform', .*, got 'hardest'"),
        ({"queue_dtype": "int2"}, r"`dtype` must be one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lc.MoCo(TinyBackbone(), **({"queue_size": 8} | arguments))


def test_shuffled_ranks_are_not_warned_of_their_batchnorm(recwarn):
    module = make("MoCo")
    module._trainer = type("Ranks", (), {"world_size": 2})()
    module.on_fit_start()
    assert not recwarn.list
    module.shuffle = False
    with pytest.warns(UserWarning, match="sync_batchnorm=True"):
        module.on_fit_start()

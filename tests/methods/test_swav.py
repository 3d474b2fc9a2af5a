"""SwAV's own properties."""

import inspect
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.callbacks import QueueUpdate
from lightning_contrast.optim import LARS
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, BATCHES, Data, as_is, gradients, run_step, step_batch, trainer
from tests.nn.test_multi_crop import crops
from tests.tolerances import CANCELLING, FORMULA, NETWORK, ROUNDED, TRAINING, bound, f32, f64, near

CASE = CASES["SwAV"]
EPSILON, TEMPERATURE = 0.3, 0.2


def codes_by_exponentials(scores, epsilon=EPSILON):
    """Return the reference's codes: Sinkhorn on exponentials, without a thought for overflow."""
    q = (scores / epsilon).exp().T  # (K, B)
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def loss_in_loops(module, views, queues=None):
    """Return the reference's loss: each view in a pass of its own, in loops over global and other views."""
    rows = [F.normalize(module.projector(module.backbone(view)), dim=1) for view in views]
    weight = F.normalize(module.prototypes.weight, dim=1)
    total = 0.0
    for a in range(2):
        pool = rows[a] if queues is None else torch.cat([queues[a].to(rows[a].dtype), rows[a]])
        codes = codes_by_exponentials(pool @ weight.T)[-len(rows[a]) :]
        others = [v for v in range(len(views)) if v != a]
        for v in others:
            chances = (rows[v] @ weight.T / TEMPERATURE).log_softmax(1)
            total = total - (codes.detach() * chances).sum(1).mean() / len(others) / 2
    return total


def small(**kwargs):
    """Return a module in double precision without BatchNorm."""
    settings = {"epsilon": EPSILON, "temperature": TEMPERATURE, "queue_start_epoch": 0}
    return make("SwAV", norm=False, **(settings | kwargs)).double()


def fill(module, missing=0):
    for seed, queue in enumerate(module.queues().values()):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(queue.size - missing, queue.dim, generator=generator)
        queue.push(F.normalize(rows, dim=1))
    return module


@pytest.mark.parametrize("local", [(), (12,), (16,), (12, 8, 8)])
def test_loss_and_gradient_equal_the_reference(local):
    module, views = small(), crops(16, 16, *local, dtype=torch.float64)
    expected = loss_in_loops(module, views)
    found = run_step(module, [views, torch.arange(4)])
    torch.testing.assert_close(found["loss"], expected)
    wanted = torch.autograd.grad(expected, list(module.backbone.parameters()))
    for a, b in zip(torch.autograd.grad(found["loss"], list(module.backbone.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found["features"], module.backbone(views[0]).detach())


def test_a_full_queue_takes_part_in_the_codes():
    module, views = fill(small()), crops(16, 16, 8, dtype=torch.float64)
    queues = [queue.features for queue in module.queues().values()]
    out = run_step(module, [views, torch.arange(4)])
    torch.testing.assert_close(out["loss"], loss_in_loops(module, views, queues))
    assert abs(out["loss"] - loss_in_loops(module, views)) > bound(NETWORK)


@pytest.mark.parametrize(("missing", "start"), [(1, 0), (16, 0), (0, 1)])
def test_a_queue_that_is_not_full_or_comes_later_changes_nothing(missing, start):
    module, views = fill(small(queue_start_epoch=start), missing), crops(16, 16, dtype=torch.float64)
    out = run_step(module, [views, torch.arange(4)])
    torch.testing.assert_close(out["loss"], loss_in_loops(module, views))


def test_queues_get_the_projections_of_their_global_view():
    module, views = small(), crops(16, 16, 8, dtype=torch.float64)
    out = run_step(module, [views, torch.arange(4)])
    for name, view in zip(("keys_a", "keys_b"), views, strict=False):
        torch.testing.assert_close(out[name], F.normalize(module.projector(module.backbone(view)), dim=1).detach())
        assert not out[name].requires_grad
    assert list(module.queues()) == ["keys_a", "keys_b"]
    assert make("SwAV no queue").queues() == {}
    assert make("SwAV no queue").default_callbacks() == []
    assert [type(c) for c in module.default_callbacks()] == [QueueUpdate]


def rank_gradients(rank, size):
    module = fill(small(queue_size=size))
    rows = slice(rank * 3, 8 if rank else 3)  # 3 images here, 5 there
    views = [view[rows] for view in crops(16, 16, 12, batch=8, dtype=torch.float64)]
    out = gradients(module, [views, torch.arange(len(views[0]))])
    for gradient in out.values():  # what DDP does
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return out


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 17])
def test_two_ranks_with_a_full_queue_give_the_gradient_of_one(size):
    module = fill(small(queue_size=size))
    alone = gradients(module, [crops(16, 16, 12, batch=8, dtype=torch.float64), torch.arange(8)])
    for found in run_processes(rank_gradients, 2, size):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, alone[name], **f64(CANCELLING))


class Record(L.Callback):
    """Keeps the prototypes and what the optimizer knows of them at the end of each epoch."""

    def __init__(self):
        self.weights, self.known = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        weight = pl_module.prototypes.weight
        self.weights.append(weight.detach().clone())
        self.known.append(weight in trainer.optimizers[0].state)


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.slow
def test_frozen_prototypes_stay_and_the_optimizer_knows_nothing_of_them(optimizer, accumulate, tmp_path):
    module = make("SwAV", freeze_prototypes_epochs=2, optimizer=optimizer, lr=0.5, weight_decay=0.5)
    before, record = module.prototypes.weight.detach().clone(), Record()
    kwargs = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    trainer(tmp_path, CASE, epochs=3, callbacks=[record], **kwargs).fit(module, Data(BATCH))
    for weight in record.weights[:2]:
        torch.testing.assert_close(weight, before, **f32(ROUNDED))
    assert (record.weights[2] - before).abs().max() > bound(FORMULA)
    assert record.known == [False, False, True]


def test_prototypes_have_length_one_before_each_step(tmp_path):
    module, lengths = make("SwAV", lr=0.5, freeze_prototypes_epochs=0), []
    with torch.no_grad():
        module.prototypes.weight.mul_(3.0)

    class Lengths(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            lengths.append(pl_module.prototypes.weight.detach().norm(dim=1))

    trainer(tmp_path, CASE, callbacks=[Lengths()], limit_val_batches=0).fit(module, Data(BATCH))
    assert len(lengths) == 2 * BATCHES
    for length in lengths:
        torch.testing.assert_close(length, torch.ones(12), **f32(ROUNDED))
    after = module.prototypes.weight.detach().norm(dim=1)  # the last step's have moved
    assert (after - 1).abs().max() > bound(FORMULA)


def test_paper_defaults(tmp_path):
    defaults = {name: p.default for name, p in inspect.signature(lc.SwAV).parameters.items()}
    assert defaults["num_prototypes"] == 3000
    assert (defaults["temperature"], defaults["epsilon"], defaults["sinkhorn_iterations"]) == (0.1, 0.05, 3)
    assert (defaults["queue_size"], defaults["queue_start_epoch"], defaults["freeze_prototypes_epochs"]) == (0, 15, 1)
    assert (defaults["hidden_dim"], defaults["projection_dim"], lc.SwAV.default_warmup_epochs) == (2048, 128, 10)

    module = lc.SwAV(TinyBackbone(), hidden_dim=16, num_prototypes=12, warmup_epochs=1)
    fit = trainer(tmp_path, CASE, epochs=2, limit_val_batches=0)
    fit.fit(module, Data(BATCH))
    optimizer = fit.optimizers[0]
    assert isinstance(optimizer, LARS)
    for group in optimizer.param_groups:  # the reference's LARC adapts every tensor
        assert group["initial_lr"] == pytest.approx(4.8 * BATCH / 4096)
        assert (group["adapt"], group["trust_form"], group["clip"]) == (True, "B", False)
        assert (group["trust_coefficient"], group["momentum"]) == (0.001, 0.9)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-6, 0.0}
    assert [module.lr_factor(step, 10, 100) for step in (0, 10, 100)] == pytest.approx([0.3 / 4.8, 1, 0.0048 / 4.8])


def test_solo_learn_leaves_norms_and_biases_to_plain_sgd_and_warms_up_from_zero():
    module = small(adapt_vectors=False, warmup_start=0.0)
    weights, vectors = module.parameter_groups()
    assert (weights.get("adapt", True), vectors["adapt"], weights["trust_form"]) == (True, False, "B")
    assert [module.lr_factor(step, 10, 100) for step in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    with pytest.raises(ValueError, match=r"`warmup_start` must lie in \[0, 1\]"):
        small(warmup_start=2.0)


def test_head_equals_the_reference():
    layers = [m for m in lc.SwAV(TinyBackbone(), hidden_dim=16).projector.modules() if not list(m.children())]
    assert [type(m) for m in layers] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in (layers[0], layers[3])] == [
        (8, 16, True),
        (16, 128, True),
    ]


@pytest.mark.parametrize(("weight", "share"), [(0.0, 1.0), (100.0, 1 / 12)])
def test_prototype_use_tells_collapse(weight, share):
    module, logged = small(), {}
    scores = torch.zeros(4, 12)
    scores[:, 3] = weight
    torch.testing.assert_close(module._prototype_use(scores), torch.tensor(share))
    module.log = lambda name, value, **_: logged.setdefault(name, value)
    module.training_step([crops(16, 16, dtype=torch.float64), torch.arange(4)], 0)
    assert 1 / 12 <= logged["train/prototype_use"] <= 1


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_masked_rows_change_no_code(scale):
    generator = torch.Generator().manual_seed(0)
    scores, rest = torch.randn(9, 5, generator=generator), torch.randn(6, 5, generator=generator) * scale
    mask = torch.tensor([False] * 6 + [True] * 9)
    codes = losses.sinkhorn(torch.cat([rest, scores]), epsilon=0.05, iterations=3, mask=mask)
    torch.testing.assert_close(codes[6:], losses.sinkhorn(scores, epsilon=0.05, iterations=3))
    assert codes.isfinite().all()


@pytest.mark.parametrize("is_full", [False, True])
def test_loss_with_a_queue_stays_finite_for_scores_up_to_ten_thousand(is_full):
    generator = torch.Generator().manual_seed(0)
    views = [(torch.rand(4, 6, generator=generator) * 2e4 - 1e4).requires_grad_() for _ in range(3)]
    queues = [torch.rand(5, 6, generator=generator) * 2e4 - 1e4 for _ in range(2)]
    mask = torch.tensor(is_full).expand(5)
    settings = {"temperature": 0.1, "epsilon": 0.05, "iterations": 3}
    loss = losses.swav_loss(views, queue_scores=queues, queue_mask=mask, **settings)
    loss.backward()
    assert loss.isfinite()
    assert all(view.grad.isfinite().all() for view in views)


def test_a_mask_of_another_length():
    with pytest.raises(ValueError, match=r"`mask` must have shape \(4,\), got \(3,\)"):
        losses.sinkhorn(torch.randn(4, 3), epsilon=0.1, iterations=1, mask=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prototypes": 1}, "`num_prototypes` must be >= 2, got 1"),
        ({"temperature": 0.0}, "`temperature` must be > 0"),
        ({"epsilon": -0.05}, "`epsilon` must be > 0"),
        ({"sinkhorn_iterations": 0}, "`sinkhorn_iterations` must be >= 1"),
        ({"queue_size": -1}, "`queue_size` must be >= 0"),
        ({"queue_start_epoch": -1}, "`queue_start_epoch` must be >= 0"),
        ({"freeze_prototypes_epochs": -1}, "`freeze_prototypes_epochs` must be >= 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lc.SwAV(TinyBackbone(), hidden_dim=8, **arguments)


def test_more_global_views_than_two():
    with pytest.raises(ValueError, match="`views` must begin with 2 global views"):
        run_step(make("SwAV"), [crops(16, 16, 16, 8), torch.arange(4)])


def test_loss_of_equal_scores_is_the_logarithm_of_the_number_of_prototypes():
    module = small(projector=nn.Sequential(nn.Linear(8, 8)))
    with torch.no_grad():
        module.prototypes.weight.copy_(module.prototypes.weight[:1].expand(12, 8))
    out = run_step(module, [crops(16, 16, 8, dtype=torch.float64), torch.arange(4)])
    assert out["loss"].item() == near(math.log(12))


def fsdp2_fit(rank):
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.tensor import DTensor

    views, labels = step_batch(CASE)
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    share = [[view[rows] for view in views], labels[rows]]
    module = make("SwAV", norm=False)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 2, "logger": False, "use_distributed_sampler": False}
    fit = L.Trainer(max_epochs=2, strategy=strategy, limit_val_batches=0, **settings, **quiet)
    fit.fit(module, DataLoader([share] * 2, batch_size=None, collate_fn=as_is))
    weight = module.prototypes.weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().numel() < weight.numel()
    return {name: p.full_tensor().detach() for name, p in module.named_parameters()}


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_fsdp2_shards_the_prototypes_and_equals_one_process():
    module = make("SwAV", norm=False)
    fit = trainer(".", CASE, epochs=2, limit_val_batches=0)
    fit.callbacks = [c for c in fit.callbacks if not isinstance(c, lc.ViewAugmentation)]
    fit.fit(module, DataLoader([step_batch(CASE)] * 2, batch_size=None, collate_fn=as_is))
    for weights in run_processes(fsdp2_fit, 2, init=False):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), **f32(TRAINING, size=0.1))

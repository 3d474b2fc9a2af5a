"""DINOv3's own properties."""

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate, StepSeed
from tests.callbacks.step_modules import QUIET
from tests.launch import run_processes
from tests.methods.cases import CASES, make
from tests.methods.matrix_runs import PATIENCE, Record, assert_close, batches, strategy
from tests.methods.test_contract import BATCHES, as_is, data, run_step, step_batch, trainer
from tests.tolerances import NETWORK, bound

CASE = CASES["DINOv3"]


class AtEpoch(lc.DINOv3):
    """Outside a Trainer, in any epoch."""

    epoch = 0
    current_epoch = property(lambda self: self.epoch)


def at_epoch(epoch, **kwargs):
    module = AtEpoch(CASE.backbone(True), **(CASE.settings | {"optimizer": "sgd", "lr": 0.05} | kwargs))
    module.epoch = epoch
    return module


def test_gram_loss_joins_at_its_epoch_with_its_weight():
    batch = step_batch(CASE)
    losses = {}
    for epoch, weight in [(1, 2.0), (2, 0.0), (2, 2.0), (2, 5.0)]:
        torch.manual_seed(0)
        module = at_epoch(epoch, gram_start_epoch=2, gram_weight=weight, mask_probability=0.0)
        for network in (module.gram_backbone, module.momentum_backbone):
            for parameter in network.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        losses[epoch, weight] = run_step(module, batch)["loss"].detach()
        patches = [
            network.tokens(torch.cat(batch[0][:2])).patches for network in (module.backbone, module.gram_backbone)
        ]
        gram = lc.losses.gram_loss(*patches).detach()
    assert gram > bound(NETWORK)
    assert torch.equal(losses[1, 2.0], losses[2, 0.0])
    torch.testing.assert_close(losses[2, 2.0], losses[2, 0.0] + 2 * gram)
    torch.testing.assert_close(losses[2, 5.0], losses[2, 0.0] + 5 * gram)


def test_the_loss_is_that_of_dinov2_before():
    batch, found = step_batch(CASE), []
    for name in ("DINOv3", "DINOv2"):
        module = make(name, mask_probability=0.5, **({"patch_bottleneck_dim": 8} if name == "DINOv2" else {}))
        networks = {"backbone", "projector", "patch_projector"}
        names = networks | {f"momentum_{network}" for network in networks}
        for part in sorted(names):
            generator = torch.Generator().manual_seed(len(part))
            for parameter in getattr(module, part).parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        if name == "DINOv2":
            for network in (module.backbone, module.momentum_backbone):
                lc.nn.use_rope(network.vit)
        else:
            for network in (module.backbone, module.momentum_backbone):
                network.vit.pos_embed.data.zero_()
        module.schedules = type(module.schedules)(0.9, 0.0, 0.04)
        torch.manual_seed(3)
        found.append(run_step(module, batch)["loss"].detach())
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_gram_teacher_is_replaced_between_its_epochs_and_no_more(tmp_path):
    module = make("DINOv3", gram_start_epoch=2, gram_every_epochs=2, gram_updates=1)
    seen = []

    class Watch(lc.callbacks.StepSeed):
        def on_before_backward(self, trainer, pl_module, loss):
            pairs = zip(module.gram_backbone.parameters(), module.momentum_backbone.parameters(), strict=True)
            kept = [parameter.clone() for parameter in module.gram_backbone.parameters()]
            same = bool(seen) and all(torch.equal(a, b) for a, b in zip(seen[-1][1], kept, strict=True))
            seen.append((all(torch.equal(a, b) for a, b in pairs), kept, same))

    run = trainer(tmp_path, CASE, callbacks=[Watch(1)], epochs=7, limit_train_batches=1, limit_val_batches=0)
    run.fit(module, data("DINOv3"))
    assert [equal for equal, _, _ in seen] == [True, False, True, False, True, False, False]
    assert [unmoved for _, _, unmoved in seen][1:] == [True, False, True, False, True, True]
    assert not any(parameter.requires_grad for parameter in module.gram_backbone.parameters())


def validated(rank, kind):
    """Return the state after three epochs, each with a validation that reads the Gram teacher."""
    module, seen = make("DINOv3", norm=False), Record()

    def validation_step(batch, batch_idx):
        for network in (module.gram_backbone, module.momentum_backbone):
            network.tokens(batch[0][0])

    module.validation_step = validation_step
    loader = DataLoader(batches("DINOv3", rank), batch_size=None, collate_fn=as_is)
    settings = QUIET | {"max_epochs": 3, "limit_val_batches": 1, "devices": 2, "use_distributed_sampler": False}
    run = L.Trainer(**settings, strategy=strategy(kind), callbacks=[StepSeed(3), seen])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader, loader)
    return seen.state


@pytest.mark.dist
def test_gram_teacher_is_replaced_where_a_validation_has_left_weights_gathered():
    expected, *others = (
        run_processes(validated, 2, kind, init=False, timeout=PATIENCE)[0] for kind in ("DDP", "FSDP1", "FSDP2")
    )
    names = [name for name in expected if name.startswith("gram_backbone.")]
    assert any(not torch.equal(expected[name], expected[name.replace("gram_", "momentum_")]) for name in names)
    for state, kind in zip(others, ("FSDP1", "FSDP2"), strict=True):
        assert_close(state, expected, bound(NETWORK), f"{kind} and DDP")


@pytest.mark.slow
def test_schedules_are_constant(tmp_path):
    module = make("DINOv3", optimizer="adamw", warmup_epochs=1, layer_decay=0.5, patch_lr_multiplier=0.2)
    rates = []

    class Watch(lc.callbacks.StepSeed):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])

    run = trainer(tmp_path, CASE, callbacks=[Watch(1)], epochs=2, limit_val_batches=0)
    run.fit(module, data("DINOv3"))
    assert max(rates[0]) == 0
    assert [max(row) for row in rates[BATCHES - 1 :]] == pytest.approx([0.05] * (BATCHES + 1))
    assert len({round(rate, 6) for rate in rates[-1]}) > 2  # layers, and the patch embedding
    groups = run.optimizers[0].param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.99)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.04}
    update = next(callback for callback in run.callbacks if isinstance(callback, MomentumUpdate))
    assert (update.start, update.schedule) == (0.994, "constant")


def test_bad_arguments():
    for name, value in {"gram_start_epoch": 0, "gram_every_epochs": 0, "gram_updates": -1, "gram_weight": -0.5}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be >= "):
            make("DINOv3", **{name: value})

"""MoCHi's own properties."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast.methods import mochi
from tests.methods.cases import CASES, TinyBackbone, fill_queue, make
from tests.methods.test_contract import BATCH, run_step, step_batch
from tests.tolerances import near

CASE = CASES["MoCHi"]


@pytest.mark.parametrize("epoch", [0, 1])
def test_synthetic_negatives_join_those_of_the_queue_from_their_epoch_on(epoch, monkeypatch):
    module = fill_queue(make("MoCHi", temperature=0.3))
    monkeypatch.setattr(type(module), "current_epoch", epoch)
    made = []

    def record(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    original = mochi.mochi_negatives
    monkeypatch.setattr(mochi, "mochi_negatives", record)
    (view_q, view_k), _ = batch = step_batch(CASE)
    loss = run_step(module, batch)["loss"].item()
    assert len(made) == epoch

    query = F.normalize(module.projector(module.backbone(view_q)), dim=1).double()
    keys = F.normalize(module.momentum_projector(module.momentum_backbone(view_k)), dim=1).double()
    queue = F.normalize(module.queue.features[module.queue.mask], dim=1).double()
    logits = [(query * keys).sum(1, keepdim=True), query @ queue.T]
    if epoch:
        assert made[0].shape == (BATCH, 6 + 4, 8)
        logits.append((made[0].double() @ query.unsqueeze(2)).squeeze(2))
    expected = F.cross_entropy(torch.cat(logits, 1) / 0.3, torch.zeros(BATCH, dtype=torch.int64))
    assert loss == near(expected.item())


def test_defaults_are_the_papers():
    module = lc.MoCHi(TinyBackbone(), queue_size=8)
    assert (module.hardest, module.pair_mixes, module.query_mixes, module.start_epoch) == (1024, 1024, 128, 10)
    assert (module.temperature, module.momentum) == (0.2, 0.999)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("hardest", 1, "be >= 2"),
        ("pair_mixes", -1, "be >= 0"),
        ("query_mixes", -1, "be >= 0"),
        ("start_epoch", 0, "be >= 1"),
        ("queue_size", 1, "be >= 2"),
        ("momentum", 1.5, r"lie in \[0, 1\]"),
        ("temperature", 0.0, "be > 0"),
    ],
)
def test_numbers_are_checked(name, value, rule):
    with pytest.raises(ValueError, match=f"`{name}` must {rule}"):
        lc.MoCHi(TinyBackbone(), **({"queue_size": 8} | {name: value}))

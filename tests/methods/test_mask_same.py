"""Images that are known to show the same are no negatives of each other, in the batch and in the queue."""

import pytest
import torch

import lightning_contrast as lc
from lightning_contrast.losses import Negatives
from lightning_contrast.losses.labels import separate_unknown
from lightning_contrast.methods.false_negatives import sample_ids
from tests.launch import run_processes
from tests.losses import oracles
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, Data, run_step, step_batch, trainer
from tests.tolerances import CANCELLING, f64

LABELS = torch.tensor([0, 1, 0, -1, 2, -1, 1, 0])  # two are unknown
INDICES = torch.tensor([4, 9, 4, 3, 7, 0, 9, 1])


def marked(name="SimCLR"):
    views, *_ = step_batch(CASES[name], torch.float64)
    return [views, LABELS, INDICES]


def known(mask_same):
    """Return a group for each image: an unknown label is a group of its own."""
    ids = LABELS if mask_same == "label" else INDICES
    return [int(mark) if mark >= 0 else 100 + i for i, mark in enumerate(ids)]


@pytest.mark.parametrize("mask_same", ["label", "index"])
@pytest.mark.parametrize(
    ("weighting", "anchor"),
    [("uniform", oracles.uniform), (Negatives("hard", tau_plus=0.02, beta=0.5), oracles.hard(0.02, 0.5))],
)
def test_simclr_leaves_them_out_of_the_batch(mask_same, weighting, anchor):
    module = make("SimCLR", norm=False, temperature=0.4, weighting=weighting, mask_same=mask_same).double()
    batch = marked()
    z_a, z_b = (module.projector(module(view)) for view in batch[0])
    expected = oracles.nt_xent(z_a, z_b, torch.tensor(0.4, dtype=torch.float64), anchor, known(mask_same))
    torch.testing.assert_close(run_step(module, batch)["loss"], expected, **f64(CANCELLING))
    everyone = make("SimCLR", norm=False, temperature=0.4, weighting=weighting).double()
    assert abs(run_step(everyone, batch)["loss"].item() - expected.item()) > 1e-3


@pytest.mark.parametrize("mask_same", ["label", "index"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_leaves_them_out_of_the_queue(mask_same, symmetric):
    module = make("MoCo", norm=False, temperature=0.4, mask_same=mask_same, symmetric=symmetric).double()
    ids = torch.tensor([0, -1, 9, 4, 2, 2, 0, -1, 5, 0])
    module.queue.push(torch.randn(10, 8, generator=torch.Generator().manual_seed(3)), ids)
    batch = marked("MoCo")
    t, groups = torch.tensor(0.4, dtype=torch.float64), known(mask_same)
    queue, theirs = module.queue.features[:10].double(), ids.tolist()

    def direction(a, b):
        query, key = module.projector(module.backbone(a)), module.momentum_projector(module.momentum_backbone(b))
        return oracles.info_nce(query, key, queue, t, groups=(groups, theirs))

    view_q, view_k = batch[0]
    expected = direction(view_q, view_k) + (direction(view_k, view_q) if symmetric else 0)
    out = run_step(module, batch)
    torch.testing.assert_close(out["loss"], expected, **f64(CANCELLING))
    own = LABELS if mask_same == "label" else INDICES
    assert torch.equal(out["keys_labels"], own.repeat_interleave(2) if symmetric else own)
    assert len(out["keys"]) == len(out["keys_labels"])


@pytest.mark.slow
def test_the_queue_keeps_the_sample_ids_of_its_keys(tmp_path):
    given = []

    class Record(lc.callbacks.QueueUpdate):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            given.append((outputs["keys"], outputs["keys_labels"]))

    module = make("MoCo masked", queue_size=20)
    trainer(tmp_path, CASES["MoCo"], epochs=1, callbacks=[Record()], limit_val_batches=0).fit(module, Data(BATCH))
    keys, ids = (torch.cat(parts) for parts in zip(*given, strict=True))
    held = {tuple(row): int(own) for row, own in zip(keys.tolist(), ids, strict=True)}
    assert len(set(held.values())) > 1
    rows = module.queue.features.tolist()
    assert [held[tuple(row)] for row in rows] == module.queue.labels.tolist()


def ranked_groups(rank):
    batch = [[torch.rand(3, 3, 8, 8)] * 2, torch.tensor([-1, 5, -7])]
    return separate_unknown(sample_ids(batch, "label", "SimCLR"))


@pytest.mark.dist
def test_an_unknown_label_is_a_group_of_its_own_over_all_ranks():
    groups = torch.cat(run_processes(ranked_groups, 2)).tolist()
    assert groups[1] == groups[4] == 5
    unknown = [groups[i] for i in (0, 2, 3, 5)]
    assert len(set(unknown)) == 4
    assert all(group < -1 for group in unknown), "a key of unknown label has -1 in a queue"


@pytest.mark.parametrize("name", ["SimCLR", "MoCo"])
def test_missing_ids_are_refused(name):
    views = step_batch(CASES[name])[0]
    with pytest.raises(
        ValueError, match=rf"`batch` must hold labels for {name}, got 'none'\. Yield \(images, labels\)"
    ):
        run_step(make(name, mask_same="label"), [views])
    with pytest.raises(ValueError, match=rf"`batch` must hold sample indices for {name}, got 'none'\. Set `indices="):
        run_step(make(name, mask_same="index"), [views, LABELS])
    with pytest.raises(TypeError, match="`groups` must be an integer tensor"):
        run_step(make(name, mask_same="label"), [views, torch.rand(BATCH)])


@pytest.mark.parametrize("method", [lc.SimCLR, lc.MoCo])
def test_bad_arguments(method):
    small = {"queue_size": 8} if method is lc.MoCo else {}
    with pytest.raises(ValueError, match="`mask_same` must be one of None, 'label', 'index', got 'labels'"):
        method(TinyBackbone(), mask_same="labels", **small)
    with pytest.raises(ValueError, match=r"`negatives` must be one of .*Did you mean 'debiased'"):
        method(TinyBackbone(), weighting="dibiased", **small)


@pytest.mark.parametrize("kind", [{"kind": "debiased"}, {"kind": "hard", "beta": 2.0}, {"kind": "top_k", "k": 3}])
def test_simclr_hands_its_handling_to_the_loss(kind):
    weighting = Negatives(**kind)
    module = make("SimCLR", norm=False, temperature=0.5, weighting=weighting).double()
    batch = marked()
    z_a, z_b = module.projector(module(torch.cat(batch[0]))).chunk(2)
    expected = lc.losses.nt_xent(z_a, z_b, temperature=0.5, weighting=weighting)
    torch.testing.assert_close(run_step(module, batch)["loss"], expected)
    plain = lc.losses.nt_xent(z_a, z_b, temperature=0.5)
    assert not torch.allclose(expected, plain)

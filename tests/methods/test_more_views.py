"""More than two views: which pairs count, that two views give what they gave before, and that two ranks equal one."""

import itertools
import sys

import lightning as L
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.cli import main
from lightning_contrast.losses.contrastive import naive_info_nce, naive_nt_xent
from lightning_contrast.nn.multi_crop import count_crops, count_global_views, view_pairs
from tests.callbacks.step_modules import QUIET
from tests.launch import run_processes
from tests.methods.cases import CASES, fill_queue, make
from tests.methods.test_contract import BATCH, as_is, rows_of, run_step, step_batch
from tests.tolerances import CANCELLING, FORMULA, NETWORK, f64, near, near64

METHODS = ["SimCLR", "BYOL", "MoCo", "MoCo symmetric", "NNCLR", "BarlowTwins", "VICReg", "SimSiam", "SupCon"]
methods = pytest.mark.parametrize("name", METHODS)
GLOBAL, LOCAL = 3, 2
PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]
BOTH_WAYS = [(i, j) for i in range(GLOBAL + LOCAL) for j in range(GLOBAL) if i != j]

# Losses of three steps of SGD on two views, before methods took more: commit 6b63c7f.
TWO_VIEWS = {
    "SimCLR": [10.501110076904297, 8.005285263061523, 11.943856239318848],
    "MoCo": [0.5687304139137268, 0.47759318351745605, 0.45578721165657043],
    "MoCo symmetric": [0.28895577788352966, 16.489871978759766, 3.9194960594177246],
    "BYOL": [4.085002899169922, 3.3728506565093994, 3.072842597961426],
    "SimSiam": [0.17714908719062805, 0.016622960567474365, 0.09153641760349274],
    "NNCLR": [4.569984436035156, 2.2840399742126465, 5.286797046661377],
    "SupCon": [3.8673765659332275, 3.870307683944702, 3.869438648223877],
    "BarlowTwins": [5.117679595947266, 7.133847236633301, 4.862639904022217],
    "VICReg": [21.566864013671875, 23.80030632019043, 20.97553825378418],
}


def crops(name, dtype=torch.float64, seed=5):
    """Return a batch of three global and two local views."""
    _, *rest = step_batch(CASES[name])
    generator = torch.Generator().manual_seed(seed)
    sizes = [16] * GLOBAL + [8] * LOCAL
    return [[torch.randn(BATCH, 3, size, size, generator=generator, dtype=dtype) for size in sizes], *rest]


def tiny(name):
    return fill_queue(make(name, norm=False).double())


@methods
def test_two_views_give_the_losses_of_before(name):
    module = fill_queue(make(name))
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.05)
    for step, before in enumerate(TWO_VIEWS[name]):
        loss = run_step(module, step_batch(CASES[name], seed=5 + step))["loss"]
        # steps of batches of 8 amplify rounding; the first loss is one forward pass
        assert loss.item() == (near(before, NETWORK) if step == 0 else pytest.approx(before, rel=1e-2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def expected_loss(name, module, batch):
    """Return the loss as a loop over all pairs of views."""
    views, labels = batch[0], batch[1]
    features = [module.backbone(view) for view in views]
    z = [module.projector(f) for f in features]
    if name == "SupCon":
        return sup_con_in_loops(z, labels)
    if name == "SimCLR":
        return sum(naive_nt_xent(z[i], z[j], temperature=0.1) for i, j in PAIRS) / len(PAIRS)
    if name == "BarlowTwins":
        return sum(losses.barlow_twins_loss(z[i], z[j], off_diagonal_weight=0.0051) for i, j in PAIRS) / len(PAIRS)
    if name == "VICReg":
        weights = {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0}
        return sum(losses.vicreg_loss(z[i], z[j], **weights) for i, j in PAIRS) / len(PAIRS)
    if name in ("MoCo", "MoCo symmetric"):
        return moco_loss(name, module, views, z)
    p = [module.predictor(one) for one in z]
    if name == "SimSiam":
        terms = [-F.cosine_similarity(p[i], z[j]).mean() for i, j in BOTH_WAYS]
    elif name == "BYOL":
        targets = [module.momentum_projector(module.momentum_backbone(view)) for view in views[:GLOBAL]]
        terms = [2 * (F.normalize(p[i]) - F.normalize(targets[j])).square().sum(1).mean() for i, j in BOTH_WAYS]
    else:
        queue = F.normalize(module.queue.features[module.queue.mask].double(), dim=1)
        near_ = [queue[(F.normalize(one, dim=1) @ queue.T).argmax(1)] for one in z[:GLOBAL]]
        terms = [naive_info_nce(near_[j], p[i], temperature=0.1) for i, j in BOTH_WAYS]
    return sum(terms) / len(BOTH_WAYS)


def moco_loss(name, module, views, z):
    """Return MoCo's loss in loops; the case "symmetric" weights its negatives by temperature, so takes the function."""
    keys = [module.momentum_projector(module.momentum_backbone(view)) for view in views[:GLOBAL]]
    pairs = BOTH_WAYS if module.symmetric else [(i, 1) for i in (0, 2, 3, 4)]
    queue = module.queue.features[module.queue.mask].double()
    if module.symmetric:
        settings = {"temperature": module.temperature, "weighting": module.weighting}
        return 2 * sum(losses.info_nce(z[i], keys[j], queue, **settings) for i, j in pairs) / len(pairs)
    return sum(naive_info_nce(z[i], keys[j], queue, temperature=0.2) for i, j in pairs) / len(pairs)


def sup_con_in_loops(z, labels, temperature=0.1, base_temperature=0.07):
    """Eq. 2 over all views of all images."""
    rows = F.normalize(torch.cat(z), dim=1)
    classes = labels.repeat(len(z))
    total = rows.new_zeros(())
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        log_sum = (rows[others] @ rows[i] / temperature).logsumexp(0)
        positives = [j for j in others if classes[j] == classes[i]]
        total = total - torch.stack([rows[j] @ rows[i] / temperature - log_sum for j in positives]).mean()
    return total / len(rows) * temperature / base_temperature


@methods
def test_loss_is_the_mean_over_pairs_with_a_global_view(name):
    module, batch = tiny(name), crops(name)
    with torch.no_grad():
        out = run_step(module, batch)
        expected = expected_loss(name, module, batch)
        assert out["loss"].item() == near64(expected.item())
        torch.testing.assert_close(out["features"], module.backbone(batch[0][0]), **f64(FORMULA))


@pytest.mark.parametrize(("name", "count"), [("MoCo", 1), ("MoCo symmetric", GLOBAL), ("NNCLR", 1)])
def test_keys_for_the_queue_are_those_of_global_views(name, count):
    module, batch = tiny(name), crops(name)
    out = run_step(module, batch)
    assert len(out["keys"]) == count * BATCH
    if name == "NNCLR":
        return
    first = 1  # of each image, the key of the second view comes first
    expected = F.normalize(module.momentum_projector(module.momentum_backbone(batch[0][first])), dim=1)
    torch.testing.assert_close(out["keys"].view(BATCH, count, -1)[:, 0], expected, **f64(FORMULA))


class Counting(nn.Module):
    """Notes the sizes of the images that a network sees."""

    def __init__(self, network):
        super().__init__()
        self.network, self.sizes = network, []

    def forward(self, images):
        self.sizes.append(images.shape[-1])
        return self.network(images)


@pytest.mark.parametrize("name", ["BYOL", "MoCo", "MoCo symmetric"])
def test_teachers_never_see_local_views(name):
    module = tiny(name)
    module.momentum_backbone = Counting(module.momentum_backbone)
    run_step(module, crops(name))
    assert module.momentum_backbone.sizes == [16] * (1 if name == "MoCo" else GLOBAL)


def rank_gradients(rank, name):
    module = tiny(name)
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    return reduced(gradients(module, rows_of(crops(name), rows)))


def gradients(module, batch):
    run_step(module, batch)["loss"].backward()
    return {key: p.grad for key, p in module.named_parameters() if p.grad is not None}


def reduced(grads):
    for gradient in grads.values():  # what DDP does
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return grads


@methods
@pytest.mark.dist
def test_two_ranks_give_the_gradient_of_one(name):
    alone = gradients(tiny(name), crops(name))
    for grads in run_processes(rank_gradients, 2, name):
        assert grads.keys() == alone.keys()
        for key, gradient in grads.items():
            torch.testing.assert_close(gradient, alone[key], **f64(CANCELLING))


def test_pairs():
    views = crops("SimCLR")[0]
    assert count_global_views(views) == GLOBAL
    assert sorted(view_pairs(views, both_ways=False)) == sorted(PAIRS)
    assert sorted(view_pairs(views, both_ways=True)) == sorted(BOTH_WAYS)
    assert view_pairs(views[2:4], both_ways=False) == [(0, 1)]  # of two views, both are global
    every = view_pairs(views[:3], both_ways=True)
    assert sorted(every) == sorted(itertools.permutations(range(3), 2))


@pytest.mark.parametrize("sizes", [(16, 8, 8), (16, 16, 8, 16), (8, 16, 16)])
def test_views_in_another_order_are_refused(sizes):
    views = [torch.rand(4, 3, size, size) for size in sizes]
    with pytest.raises(ValueError, match="begin with all global views, two or more of one size"):
        count_crops([views, torch.arange(4)])
    with pytest.raises(ValueError, match="hold at least 2 views"):
        count_crops([views[:1], torch.arange(4)])


@pytest.mark.parametrize("name", METHODS)
def test_local_views_of_the_published_policy(name):
    make_views = CASES[name].make.views
    images = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    settings = {"local_views": 2, "local_size": 12, "local_scale": (0.1, 0.2)}
    torch.manual_seed(0)
    two = make_views(32)(images)
    torch.manual_seed(0)
    more = make_views(32, **settings)(images)
    assert [view.shape[-1] for view in more] == [32, 32, 12, 12]
    assert len(two) == 2
    assert all(torch.equal(a, b) for a, b in zip(two, more, strict=False))
    assert [view.shape[-1] for view in make_views(224, local_views=1)(images)] == [224, 224, 96]
    with pytest.raises(ValueError, match="`local_views` must be >= 0"):
        make_views(32, local_views=-1)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_configuration_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    policy = {"class_path": "simclr_views", "init_args": {"size": 32, "local_views": 2, "local_scale": [0.05, 0.3]}}
    config = {
        "seed_everything": 0,
        "model": {"class_path": "SimCLR", "init_args": {"backbone": "resnet10t"}},
        "data": {"class_path": "EmojiDataModule", "init_args": {"batch_size": 16}},
        "trainer": {"callbacks": [{"class_path": "ViewAugmentation", "init_args": {"policy": policy}}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    cli = main(["--config", str(tmp_path / "run.yaml")], run=False)
    found = next(c for c in cli.trainer.callbacks if isinstance(c, lc.ViewAugmentation)).policy
    views = found(torch.rand(2, 3, 32, 32))
    assert [view.shape[-1] for view in views] == [32, 32, 12, 12]


@pytest.mark.parametrize("name", ["SimCLR", "BYOL", "MoCo symmetric"])
@pytest.mark.filterwarnings("ignore")
def test_gradient_cache_gives_the_same_weights(name):
    """Chunks of three images of each view, and of all views of a size in one pass (SimCLR)."""

    def weights(callbacks):
        module = tiny(name)
        settings = QUIET | {"max_steps": 2, "precision": "64-true"}
        trainer = L.Trainer(**settings, callbacks=callbacks)
        trainer.fit(module, DataLoader([crops(name), crops(name, seed=6)], batch_size=None, collate_fn=as_is))
        assert trainer.global_step == 2
        return dict(module.named_parameters())

    whole, chunked = weights([]), weights([lc.GradientCache(3)])
    for key, value in whole.items():
        torch.testing.assert_close(chunked[key], value, **f64(CANCELLING))

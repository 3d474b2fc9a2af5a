"""Protocols on features, against plain loops, scikit-learn, SciPy and lightly."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from lightly.utils.benchmarking import LinearClassifier, knn_predict
from scipy.stats import binomtest
from sklearn.covariance import EmpiricalCovariance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, average_precision_score
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn import functional as F

import lightning_contrast as lc
from lightning_contrast import evaluation as ev
from lightning_contrast import metrics
from lightning_contrast.evaluation.protocols.inputs import held_out
from lightning_contrast.evaluation.protocols.linear import LINEAR_PROTOCOLS, Heads, LinearProtocol
from lightning_contrast.optim import LARS
from lightning_contrast.seeding import derived_seed
from tests.tolerances import NETWORK, TRAINING, assert_same_bits, f32, f64, near, near64


def blobs(count=120, width=12, classes=4, distance=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=g) + distance * centers[labels], labels


TRAIN, TEST = blobs(), blobs(60, seed=1)
BOTH = (*TRAIN, *TEST)


def train_by_hand(protocol, rate, seed, epochs, batch_size, *, x=TRAIN[0], test=TEST[0], start=None):
    """Train one linear layer in a plain loop, from ``start`` or the weights that the seed gives."""
    y, used = TRAIN[1], protocol
    if start is None:
        start = torch.randn(4, 12, generator=torch.Generator().manual_seed(derived_seed(seed, 3))) * used.init
    layer = nn.Linear(x.shape[1], 4, dtype=x.dtype)
    with torch.no_grad():
        layer.weight.copy_(start)
        layer.bias.zero_()
    norm = nn.BatchNorm1d(12, affine=False, eps=1e-6) if used.normalize else nn.Identity()
    if used.optimizer == "lars":
        groups = [{"params": [layer.weight]}, {"params": [layer.bias], "adapt": False}]
        optimizer = LARS(groups, lr=rate, momentum=0.9)
    else:
        options = {"momentum": 0.9, "nesterov": used.nesterov, "weight_decay": used.weight_decay}
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, **options)
    generator = torch.Generator().manual_seed(derived_seed(seed, 4))
    per_epoch = math.ceil(len(y) / batch_size)
    total, step = epochs * per_epoch, 0
    for epoch in range(epochs):
        for batch in torch.randperm(len(y), generator=generator).split(batch_size):
            place = epoch * per_epoch if used.per_epoch else step
            warmup = round(used.warmup * total)
            if used.steps:
                factor = used.factor ** sum(place >= round(share * total) for share in used.steps)
            elif place < warmup:
                factor = place / warmup
            else:
                factor = 0.5 * (1 + math.cos(math.pi * (place - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.zero_grad()
            F.cross_entropy(layer(norm(x[batch])), y[batch]).backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        return layer(norm.eval()(test))


@pytest.mark.parametrize("name", LINEAR_PROTOCOLS)
def test_a_linear_probe_is_a_plain_loop(name):
    used = LINEAR_PROTOCOLS[name]
    found = ev.linear_probe(*BOTH, protocol=name, epochs=9, batch_size=50, seed=3)
    rate = used.lr * 50 / 256 if used.scaled else used.lr
    assert found.settings["lr"] == rate
    expected = train_by_hand(used, rate, 3, 9, 50)
    torch.testing.assert_close(found.logits, expected, **f32(TRAINING, size=float(expected.abs().max())))
    assert found.top1 == near64((expected.argmax(1) == TEST[1]).double().mean().item())


def test_a_linear_probe_is_that_of_lightly():
    """All rows in one batch, so that the order does not matter; lightly's cosine ends a step earlier, at 0.001."""
    steps = 200
    theirs = LinearClassifier(nn.Identity(), 120, 0.1, feature_dim=12, num_classes=4, topk=(1,))
    nn.init.zeros_(theirs.classification_head.weight)
    nn.init.zeros_(theirs.classification_head.bias)
    theirs._trainer = SimpleNamespace(estimated_stepping_batches=steps, world_size=1)
    (optimizer,), (schedule,) = theirs.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(theirs(TRAIN[0]), TRAIN[1]).backward()
        optimizer.step()
        schedule["scheduler"].step()
    protocol = LinearProtocol(0.1, epochs=steps, batch_size=120, init=0.0)
    found = ev.linear_probe(*BOTH, protocol=protocol)
    expected = theirs(TEST[0]).detach()
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=0.005 * float(expected.abs().max()))
    assert found.top1 == near64((expected.argmax(1) == TEST[1]).double().mean().item())


def test_the_published_rates():
    assert LINEAR_PROTOCOLS["moco"].lr == 30
    assert not LINEAR_PROTOCOLS["moco"].scaled
    assert LINEAR_PROTOCOLS["mae"].normalize
    simclr = ev.linear_probe(*BOTH, protocol="simclr", epochs=1)
    assert simclr.settings["lr"] == pytest.approx(0.1 * 120 / 256)
    assert simclr.settings["batch_size"] == 120


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"weight_decay": 0.05}, {"nesterov": True, "weight_decay": 0.05}]
)
def test_heads_of_the_grid_are_those_of_separate_optimizers(options):
    used = LinearProtocol(0.1, epochs=5, batch_size=50, **options)
    kinds, others = ({"a": x.double(), "b": x[:, :5].double()} for x in (TRAIN[0], TEST[0]))
    grid = [("a", 0.1), ("b", 0.2), ("a", 0.5), ("b", 0.01)]
    heads = Heads(kinds, grid, 4, used, seed=0).double()
    generator = torch.Generator().manual_seed(derived_seed(0, 3))
    starts = [torch.randn(4, kinds[kind].shape[1], generator=generator) * used.init for kind, _ in grid]
    heads.fit(kinds, TRAIN[1])
    for (kind, rate), start, found in zip(grid, starts, heads.logits(others), strict=True):
        alone = train_by_hand(used, rate, 0, 5, 50, x=kinds[kind], test=others[kind], start=start)
        torch.testing.assert_close(found, alone, **f64(TRAINING, size=5))


def test_a_grid_with_lars_is_refused():
    used = LinearProtocol(0.1, optimizer="lars")
    with pytest.raises(ValueError, match="`grid` must hold one head with LARS"):
        Heads({"a": TRAIN[0]}, [("a", 0.1), ("a", 0.5)], 4, used, seed=0)


def test_the_grid_chooses_on_held_out_rows_and_prefers_the_better_features():
    noise = torch.randn(120, 3, generator=torch.Generator().manual_seed(5))
    kinds = {"noise": noise, "blobs": TRAIN[0]}
    others = {"noise": noise[:60], "blobs": TEST[0]}
    found = ev.linear_grid(kinds, TRAIN[1], others, TEST[1], steps=60, batch_size=64)
    assert found.settings["head"].startswith("blobs")
    assert len(found.settings["validation"]) == 26
    assert found.top1 > 0.8
    again = ev.linear_grid(kinds, TRAIN[1], others, TEST[1], steps=60, batch_size=64)
    assert_same_bits(found.logits, again.logits)


def test_logistic_regression_is_that_of_scikit_learn():
    found = ev.logistic_probe(*BOTH, c=0.5)
    model = LogisticRegression(C=0.5, max_iter=1000).fit(TRAIN[0].double(), TRAIN[1])
    expected = torch.from_numpy(model.decision_function(TEST[0].double()))
    torch.testing.assert_close(found.logits, expected.float(), rtol=0, atol=1e-3)
    assert found.top1 == near64(model.score(TEST[0].double(), TEST[1]))
    scaled = ev.logistic_probe(*BOTH, c=0.1, standardize=True)
    assert scaled.top1 == near64(ev.linear_top1(*BOTH, c=0.1))
    two = TRAIN[1] % 2 * 3  # classes 0 and 3
    found = ev.logistic_probe(TRAIN[0], two, TEST[0], TEST[1] % 2 * 3)
    assert found.logits.shape == (60, 4)
    assert found.logits[:, 1:3].isneginf().all()
    model = LogisticRegression(C=0.316, max_iter=1000).fit(TRAIN[0].double(), two)
    assert found.top1 == near64(model.score(TEST[0].double(), TEST[1] % 2 * 3))


def test_the_sweep_finds_a_penalty_that_a_grid_confirms():
    found = ev.logistic_sweep(*BOTH, steps=3)
    tried = {float(c): value for c, value in found.settings["validation"].items()}
    assert len(tried) >= 7
    assert tried[min(tried, key=lambda c: abs(math.log(c / found.settings["c"])))] == max(tried.values())
    assert found.top1 == near64(ev.logistic_probe(*BOTH, c=found.settings["c"]).top1)


def test_neighbors_vote_as_in_the_metric_and_in_lightly():
    found = ev.knn_sweep(*BOTH, k=(1, 20, 100), temperature=(0.07, 0.1))
    assert set(found) == {(k, t) for k in (1, 20, 100) for t in (0.07, 0.1)}
    for (k, temperature), result in found.items():
        metric = metrics.KNNAccuracy(num_classes=4, k=k, temperature=temperature)
        metric.update_bank(*TRAIN)
        metric.update(*TEST)
        assert result.top1 == near(metric.compute().item())
        bank, queries = F.normalize(TRAIN[0], dim=1).T, F.normalize(TEST[0], dim=1)
        theirs = knn_predict(queries, bank, TRAIN[1], 4, knn_k=k, knn_t=temperature)
        assert torch.equal(result.logits.argmax(1), theirs[:, 0])


def test_retrieval_is_average_precision():
    x, y = TRAIN
    found = ev.label_retrieval(x, y, k=(1, 5))
    similarity = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    others = ~torch.eye(len(x), dtype=torch.bool)
    values = [
        average_precision_score((y[others[i]] == y[i]).numpy(), similarity[i][others[i]].numpy()) for i in range(len(x))
    ]
    assert found["map"] == near(float(np.mean(values)))
    nearest = similarity.masked_fill(~others, -2).topk(5).indices
    assert found["recall@5"] == near64((y[nearest] == y[:, None]).any(1).double().mean().item())
    lonely = ev.label_retrieval(torch.cat([x, x[:1]]), torch.cat([y, torch.tensor([9])]), k=(1,))
    assert lonely["recall@1"] <= 1


def test_clusters():
    x, y = blobs(distance=9)
    found = ev.cluster_scores(x, y)
    assert found == {"nmi": near64(1.0), "ari": near64(1.0), "accuracy": near64(1.0)}
    random = ev.cluster_scores(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 4)
    assert abs(random["ari"]) < 0.05
    assert 0.25 <= random["accuracy"] < 0.4
    assert ev.cluster_scores(*TRAIN) == ev.cluster_scores(*TRAIN)
    assert adjusted_rand_score([0, 0, 1, 1], [1, 1, 0, 0]) == 1  # as used above


def test_few_shot_episodes():
    found = ev.few_shot(*TRAIN, shots=1, ways=4, queries=5, episodes=50)
    values = np.asarray(found["episodes"])
    assert found["accuracy"] == near64(values.mean())
    assert found["interval"] == near64(1.96 * values.std() / math.sqrt(50))
    better = ev.few_shot(*TRAIN, shots=10, ways=4, queries=5, episodes=50)
    assert better["accuracy"] > found["accuracy"]
    chance = ev.few_shot(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 8)
    assert chance["accuracy"] == pytest.approx(0.2, abs=0.03)
    assert ev.few_shot(*TRAIN, ways=2, episodes=5) == ev.few_shot(*TRAIN, ways=2, episodes=5)
    with pytest.raises(ValueError, match=r"`shots` must leave 15 queries of 30 images \(class 0\), got 16"):
        ev.few_shot(*TRAIN, shots=16)
    with pytest.raises(ValueError, match="`ways` must be <= 4"):
        ev.few_shot(*TRAIN, ways=5, queries=2)


def test_label_efficiency():
    found = ev.label_efficiency(*BOTH, shares=(0.1, 1.0), repeats=2)
    assert found[1.0]["accuracy"] == near64(ev.linear_top1(*BOTH, c=0.1))
    assert found[1.0]["images"] == 120
    assert found[0.1]["images"] == 12
    assert found[0.1]["lowest"] <= found[0.1]["accuracy"] <= found[0.1]["highest"]


def test_held_out_rows_are_of_every_class():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    stay, out = held_out(labels, 0.2, 0)
    assert sorted(stay.tolist() + out.tolist()) == list(range(14))
    assert torch.bincount(labels[out], minlength=3).tolist() == [2, 1, 0]


def test_ood_scores_are_those_of_scikit_learn():
    x, y = TRAIN
    queries = TEST[0]
    unit = F.normalize(x, dim=1).double().numpy()
    distances, _ = NearestNeighbors(n_neighbors=7).fit(unit).kneighbors(F.normalize(queries, dim=1).double().numpy())
    found = ev.ood_scores(x, queries, k=7)
    torch.testing.assert_close(found, -torch.from_numpy(distances[:, -1] ** 2).float(), **f32(NETWORK, size=1))
    means = torch.stack([x[y == c].double().mean(0) for c in range(4)])
    shared = EmpiricalCovariance(assume_centered=True).fit((x.double() - means[y]).numpy())
    per_class = np.stack([shared.mahalanobis((queries.double() - mean).numpy()) for mean in means], 1)
    found = ev.ood_scores(x, queries, method="mahalanobis", train_labels=y)
    assert found.tolist() == near64((-per_class.min(1)).tolist(), 2**26)
    whole = EmpiricalCovariance().fit(x.double().numpy()).mahalanobis(queries.double().numpy())
    found = ev.ood_scores(x, queries, method="relative_mahalanobis", train_labels=y)
    assert found.tolist() == near64((-per_class.min(1) + whole).tolist(), 2**26, size=100)
    far = ev.ood_scores(x, -5 * queries, method="mahalanobis", train_labels=y)
    assert ev.ood_metrics(ev.ood_scores(x, queries, method="mahalanobis", train_labels=y), far)["auroc"] > 0.95


def test_conformal_sets_cover():
    g = torch.Generator().manual_seed(0)
    probabilities = torch.randn(2000, 6, generator=g).softmax(1)
    labels = torch.multinomial(probabilities, 1, generator=g)[:, 0]
    found = ev.split_conformal(probabilities, labels, alpha=0.2)
    assert found["coverage"] == pytest.approx(0.8, abs=0.04)
    assert 1 < found["size"] < 6


def test_the_worst_group():
    correct = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    found = ev.worst_group_accuracy(correct, groups)
    assert found == {"accuracy": 0.0, "group": 2, "images": 1, "mean": 0.5}
    assert ev.worst_group_accuracy(correct, groups, least=2)["group"] == 1
    with pytest.raises(ValueError, match="`least` must be at most"):
        ev.worst_group_accuracy(correct, groups, least=4)


def test_mcnemar_is_the_exact_binomial_test():
    g = torch.Generator().manual_seed(0)
    for share in (0.5, 0.6, 0.9):
        a, b = (torch.rand(300, generator=g) < bound for bound in (0.5, share))
        found = ev.mcnemar(a, b)
        expected = binomtest(int(found["only_a"]), int(found["only_a"] + found["only_b"])).pvalue
        assert found["p"] == near64(expected, 2**30)
    assert ev.mcnemar(a, a)["p"] == 1


@pytest.mark.slow
def test_bootstrap_intervals_are_those_of_the_normal_distribution():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2000, generator=g) < bound for bound in (0.7, 0.6))
    low, high = ev.bootstrap_interval(a)
    share = a.double().mean().item()
    error = 1.96 * math.sqrt(a.double().var().item() / 2000)
    assert (low, high) == pytest.approx((share - error, share + error), abs=0.003)
    found = ev.paired_bootstrap(a, b)
    difference = a.double() - b.double()
    error = 1.96 * math.sqrt(difference.var().item() / 2000)
    assert found["difference"] == near64(difference.mean().item())
    assert (found["low"], found["high"]) == pytest.approx(
        (found["difference"] - error, found["difference"] + error), abs=0.004
    )
    assert found["p"] < 0.01
    same = ev.paired_bootstrap(a, a)
    assert (same["low"], same["high"], same["p"]) == (0, 0, 1)
    repeated = a[:100].repeat(20)  # 100 patients with 20 equal images each
    alone = ev.bootstrap_interval(repeated)
    grouped = ev.bootstrap_interval(repeated, clusters=torch.arange(100).repeat(20))
    assert grouped[1] - grouped[0] > 3 * (alone[1] - alone[0])


def test_geometry_of_known_features():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=g)
    views = torch.stack([x[:50], x[:50]], 1) + 0.1 * torch.randn(50, 2, 16, generator=g)
    found = ev.geometry(x, views=views)
    assert found["effective_rank"] == near64(metrics.effective_rank(x.double()).item())
    assert found["lidar"] == near64(metrics.lidar(views).item())
    assert found["std"] == pytest.approx(1, abs=0.02)
    assert sum(found["spectrum"]) == near64(1.0)
    assert found["alignment"] < 0.05
    assert ev.describe_geometry(found, 16).startswith("No collapse")
    flat = ev.geometry(torch.randn(100, 1, generator=g) * torch.ones(1, 64) + 0.01 * torch.randn(100, 64, generator=g))
    assert ev.describe_geometry(flat, 64).startswith("Dimensional collapse")
    cone = ev.geometry(torch.ones(100, 64) + 0.1 * torch.randn(100, 64, generator=g))
    assert ev.describe_geometry(cone, 64).startswith(("No collapse", "Dimensional"))
    point = ev.geometry(torch.ones(100, 64) + 0.01 * torch.randn(100, 64, generator=g))
    assert ev.describe_geometry(point, 64).startswith("Collapsed")
    dead = x.clone()
    dead[:, 6:] = 1
    assert ev.geometry(dead)["dead_dims"] == 10 / 16
    assert ev.geometry(x[:4])["alpha_req"] is None


def convolutions():
    torch.manual_seed(0)
    noise = nn.Dropout(0.5)  # not in eval mode
    chain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), noise, nn.Conv2d(5, 4, 3), nn.Flatten())
    return nn.Sequential(nn.Identity(), chain)


def test_layers_are_compared_on_flattened_activations():
    network, images = convolutions().eval(), torch.rand(9, 3, 8, 8)
    first, second = network[1][0](images), network(images)
    found = ev.layer_similarity(network.train(), images)
    assert found.names == ("0", "output")  # the last convolution is the output
    expected = metrics.cka(first.flatten(1), second, unbiased=True).item()
    assert found.cka[0, 1].item() == found.cka[1, 0].item() == near64(expected, size=1)
    assert found.cka.diagonal().tolist() == near64([1.0, 1.0])
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_layers_are_those_of_the_outermost_chain():
    images = torch.rand(4, 3, 32, 32)
    names = [ev.layer_similarity(lc.SimCLR("small_convnet"), images).names]
    names += [ev.layer_similarity(timm.create_model("resnet18", num_classes=0), images.repeat(1, 1, 2, 2)).names]
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=6, **size)
    names += [ev.layer_similarity(vit, images, most=4).names]
    assert names == [
        ("stem", "stages.0", "stages.1", "stages.2", "output"),
        ("conv1", "bn1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "output"),
        ("patch_embed", "blocks.2", "blocks.4", "output"),
    ]
    assert ev.layer_similarity(nn.Flatten(), images).names == ("output",)


X, Y = TRAIN


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ev.linear_probe(X, None, X, Y), "`train_labels` must be given"),
        (lambda: ev.linear_probe(X, Y * 0, X, Y), "`train_labels` must hold two classes or more"),
        (lambda: ev.linear_probe(X, Y * 0 - 1, X, Y), "`train_labels` must have labeled rows"),
        (lambda: ev.linear_probe(X, Y, X[:, :3], Y), "`test` must be as wide as `train`"),
        (lambda: ev.linear_probe(X, Y, X, Y, protocol="simclar"), "`protocol` must be one of .* Did you mean 'simclr'"),
        (lambda: ev.linear_probe(X, Y, X, Y, epochs=0), "`epochs` must be >= 1"),
        (lambda: ev.linear_grid(X, Y, {"a": X}, Y), "`test` must have the kinds of features"),
        (lambda: ev.linear_grid(X, Y, X, Y, rates=[0.0]), "`rates` must be > 0"),
        (lambda: ev.linear_grid(X, Y, X, Y, validation_share=1), "`share` must lie in"),
        (lambda: ev.logistic_probe(X, Y, X, Y, c=0), "`c` must be > 0"),
        (lambda: ev.knn_sweep(X, Y, X, Y, k=(200,)), "`k` must be <= 120"),
        (lambda: ev.label_retrieval(X[:4], torch.arange(4), k=(1,)), "`labels` must hold a class with two images"),
        (lambda: ev.cluster_scores(X, Y * 0), "`labels` must hold two classes"),
        (lambda: ev.label_efficiency(X, Y, X, Y, shares=(2,)), "`shares` must lie in"),
        (lambda: ev.ood_scores(X, X, method="mahalanobis"), "`train_labels` must be given"),
        (lambda: ev.mcnemar(Y > 1, Y[:3] > 1), "`correct_b` must have the shape"),
        (lambda: ev.paired_bootstrap(Y, Y[:3]), "`values_b` must have the shape"),
        (lambda: ev.geometry(X[:1]), "`features` must have two rows"),
        (lambda: ev.geometry(X, views=X), "`views` must be"),
        (lambda: ev.layer_similarity(nn.Identity(), X[:3]), "`inputs` must hold 4 images or more"),
        (lambda: ev.layer_similarity(nn.Identity(), X, most=1), "`most` must be >= 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unlabeled_rows_are_left_out():
    marked = torch.where(torch.arange(120) < 40, -1, Y)
    found = ev.logistic_probe(X, marked, *TEST)
    assert_same_bits(found.logits, ev.logistic_probe(X[40:], Y[40:], *TEST).logits)
    assert len(ev.logistic_probe(X, Y, X, marked).labels) == 80

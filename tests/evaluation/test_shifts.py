"""Attacks, long tails, unseen groups, planted shortcuts, conflicting cues and audits, against plain formulas."""

import copy
import math
import time

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

from lightning_contrast import evaluation as ev
from lightning_contrast import metrics
from lightning_contrast.augment import corrupt
from lightning_contrast.evaluation.protocols import cue_conflict, shifts
from tests.evaluation.test_protocols import BOTH, TEST, TRAIN, blobs
from tests.tolerances import FORMULA, assert_same_bits, f32, near64


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.1, 0.3, 0.5]).view(3, 1, 1)


@pytest.mark.parametrize("epsilon", [1 / 255, 4 / 255, 8 / 255])
@pytest.mark.parametrize("normalized", [False, True])
def test_a_linear_classifier_is_fooled_where_the_margin_is_below_epsilon(epsilon, normalized):
    """The distance of an image to the plane in L-infinity is margin / |w|_1, in the units of the pixels."""
    torch.manual_seed(0)
    head = nn.Linear(3 * 16, 2)
    images, labels = 0.2 + 0.6 * rand(200, 3, 4, 4), torch.arange(200) % 2

    def preprocess(given):
        return (given - MEAN) / STD if normalized else given

    w = (head.weight[0] - head.weight[1]).detach().view(3, 4, 4)
    with torch.no_grad():
        scores = head(preprocess(images).flatten(1))
        head.bias[0] -= (scores[:, 0] - scores[:, 1]).median()  # half of the images on each side
        scores = head(preprocess(images).flatten(1))
    margin = (scores[:, 0] - scores[:, 1]) * (1 - 2 * labels)
    reach = epsilon * (w / STD if normalized else w).abs().sum()
    clear = (margin - reach).abs() > 1e-3  # not on the edge
    found = ev.pgd_robustness(nn.Flatten(), head, images, labels, preprocess=preprocess, epsilon=epsilon)
    assert torch.equal(found["clean"][margin.abs() > 1e-3], (margin > 0)[margin.abs() > 1e-3])
    assert torch.equal(found["robust"][clear], (margin > reach)[clear])
    assert 0 < found["robust"].sum() < found["clean"].sum()


def test_an_attack_changes_nothing_and_repeats():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU())
    head = nn.Linear(8, 3)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[0].eval()
    before, modes = copy.deepcopy(dict(model.state_dict())), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    images, labels = rand(30, 3, 2, 2), torch.arange(30) % 3
    found = ev.pgd_robustness(model, head, images, labels, epsilon=0.05, steps=5, batch_size=7)
    assert_same_bits(dict(model.state_dict()), before)
    assert modes == [m.training for m in model.modules()]
    assert_same_bits(torch.get_rng_state(), state)
    assert model[1].weight.grad.eq(1).all()
    assert all(p.grad is None for p in [model[1].bias, *head.parameters()])
    assert head.training
    again = ev.pgd_robustness(model, head, images, labels, epsilon=0.05, steps=5, batch_size=7)
    assert_same_bits(found["robust"], again["robust"])
    clean = ev.pgd_robustness(model, head, (images * 255).round().to(torch.uint8), labels, epsilon=0)
    assert torch.equal(clean["clean"], clean["robust"])
    more = ev.pgd_robustness(model, head, images, labels, epsilon=0.05, steps=5, batch_size=7, restarts=4)
    assert not (more["robust"] & ~found["robust"]).any()


@pytest.mark.parametrize(("change", "got"), [(torch.round, "a gradient of 0"), (torch.Tensor.detach, "no gradient")])
def test_masked_gradients_are_not_robustness(change, got):
    images = rand(8, 3, 2, 2)
    head = nn.Linear(12, 2).requires_grad_(False)
    head.weight.zero_(), head.bias.copy_(torch.tensor([1.0, 0.0]))
    head.weight[0] = 0.1
    labels = torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match=f"`model` must be differentiable in the images, got '{got}"):
        ev.pgd_robustness(nn.Flatten(), head, images, labels, preprocess=change)


def test_masked_gradients_are_found_in_any_batch():
    images, head = rand(8, 3, 2, 2), nn.Linear(12, 2).requires_grad_(False)
    head.weight.zero_(), head.bias.copy_(torch.tensor([1.0, 0.0]))
    labels = (torch.arange(8) < 4).long()  # the first batch is wrong without an attack
    with pytest.raises(ValueError, match="`model` must be differentiable in the images"):
        ev.pgd_robustness(nn.Flatten(), head, images, labels, batch_size=4)


def test_a_class_that_the_head_does_not_know_is_wrong():
    torch.manual_seed(0)
    images, head = rand(6, 3, 2, 2), nn.Linear(12, 2)
    labels = head(images.flatten(1)).argmax(1)
    labels[[1, 4]] = torch.tensor([2, 7])
    found = ev.pgd_robustness(nn.Flatten(), head, images, labels, epsilon=1e-3, steps=1)
    assert found["clean"].tolist() == [True, False, True, True, False, True]
    assert not (found["robust"] & ~found["clean"]).any()


def test_the_head_is_the_logistic_probe():
    for labels in (TRAIN[1], TRAIN[1] % 2 * 3):
        for standardize in (False, True):
            head = ev.logistic_head(TRAIN[0], labels, c=0.3, standardize=standardize)
            expected = ev.logistic_probe(TRAIN[0], labels, TEST[0], TEST[1] * 0, c=0.3, standardize=standardize).logits
            found = head(TEST[0])
            kept = expected.isfinite()
            assert torch.equal(found.isfinite(), kept)
            torch.testing.assert_close(found[kept], expected[kept], **f32(FORMULA, size=20))


@pytest.mark.parametrize("cached", [False, True])
def test_corrupted_images_are_predicted_one_by_one(cached):
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(5) % 2

    def predict(given):
        return torch.eye(2)[given.flatten(1).long().sum(1) % 2]  # depends on every pixel

    given, cache = {"corruptions": ["gaussian_noise", "fog"], "severities": [1, 4], "seed": 3}, {} if cached else None
    found = ev.corruption_robustness(predict, images, labels, batch_size=2, cache=cache, **given)
    again = ev.corruption_robustness(predict, images, labels, cache=cache, **given)
    assert list(found) == ["clean", "gaussian_noise", "fog"]
    assert torch.equal(found["clean"], predict(images).argmax(1) == labels)
    for name in given["corruptions"]:
        for place, severity in enumerate(given["severities"]):
            changed = [
                corrupt(image, name, severity=severity, seed=3 + row, table="cifar") for row, image in enumerate(images)
            ]
            assert torch.equal(found[name][place], predict(torch.stack(changed)).argmax(1) == labels)
        assert torch.equal(found[name], again[name])
    if cached:
        assert len(cache) == 4


def test_a_long_tail_falls_exponentially():
    labels = torch.cat([torch.arange(1000) % 10, torch.full((20,), -1)])
    rows = ev.long_tail_rows(labels, imbalance=100)
    sizes = [int(100 * 100 ** (-i / 9) + 1e-9) for i in range(10)]
    assert torch.bincount(labels[rows]).tolist() == sizes
    assert sizes[0] == 100
    assert sizes[-1] == 1
    uneven = torch.tensor([0] * 10 + [1] * 90 + [3] * 60)  # 2 has none
    rows = ev.long_tail_rows(uneven, imbalance=9)
    assert torch.bincount(uneven[rows]).tolist() == [10, 90, 0, 30]
    assert len(ev.long_tail_rows(uneven, imbalance=1)) == 160
    assert not torch.equal(rows, ev.long_tail_rows(uneven, imbalance=9, seed=1))


def test_many_and_few_shot_accuracy():
    x, y = blobs(600, distance=1.0)
    found = ev.long_tail(x, y, *TEST, imbalance=100, many=100, few=10)
    rows = ev.long_tail_rows(y, imbalance=100)
    assert found["counts"].tolist() == [150, 32, 6, 1]
    assert (found["all"], found["many"], found["medium"], found["few"]) == ([0, 1, 2, 3], [0], [1], [2, 3])
    expected = ev.logistic_probe(x[rows], y[rows], *TEST, c=0.1, standardize=True)
    assert_same_bits(found["result"].logits, expected.logits)
    right = expected.logits.argmax(1) == TEST[1]
    shares = [right[TEST[1] == c].double().mean().item() for c in (2, 3)]
    few = ev.class_mean_accuracy(right, TEST[1], found["few"])
    assert few["accuracy"] == near64(sum(shares) / 2)
    assert few["low"] <= few["accuracy"] <= few["high"]
    assert ev.class_mean_accuracy(right, TEST[1], [0])["accuracy"] > few["accuracy"]


def test_the_interval_of_a_mean_of_classes():
    labels = torch.tensor([0] * 400 + [1] * 100)
    correct = rand(500) < torch.where(labels == 0, 0.8, 0.4)
    found = ev.class_mean_accuracy(correct, labels, [0, 1])
    p, q = (correct[labels == c].double().mean().item() for c in (0, 1))
    error = 1.96 * math.sqrt(p * (1 - p) / 400 + q * (1 - q) / 100) / 2
    assert (found["low"], found["high"]) == pytest.approx(((p + q) / 2 - error, (p + q) / 2 + error), abs=0.005)


def test_unseen_groups():
    x, y = blobs(400)
    groups = torch.arange(400) // 4 % 3 - (torch.arange(400) >= 396).long() * 9
    x = x + (groups == 2).unsqueeze(1) * torch.randn(12, generator=torch.Generator().manual_seed(4)) * 4
    found = ev.unseen_groups(x[:300], y[:300], groups[:300], x[300:], y[300:], groups[300:])
    assert list(found) == [0, 1, 2]
    rest, own = groups[:300] != 1, (groups[300:] == 1)
    expected = ev.logistic_probe(x[:300][rest], y[:300][rest], x[300:][own], y[300:][own], c=0.1, standardize=True)
    assert_same_bits(found[1]["unseen"].logits, expected.logits)
    assert torch.equal(found[1]["seen"].labels, found[1]["unseen"].labels)
    assert found[1]["images"][0] == int(rest.sum())
    assert abs(found[1]["images"][0] - found[1]["images"][1]) <= 12  # a rounding in each class and group
    assert found[1]["images"][0] == found[1]["images"][1]
    assert found[2]["seen"].top1 > found[2]["unseen"].top1 + 0.2
    with pytest.raises(ValueError, match="`test_groups` must have a group with 5 test images that can be left out"):
        ev.unseen_groups(*TRAIN, TRAIN[1] * 0, *TEST, TEST[1] * 0)
    with pytest.raises(ValueError, match="`train_groups` must be integers of shape"):
        ev.unseen_groups(*TRAIN, TRAIN[1][:3], *TEST, TEST[1])


def test_the_control_of_unseen_groups_is_as_large_where_cells_are_small(monkeypatch):
    """Of cells with two images each, a rounding in every cell would leave half of the images out or in."""
    groups, labels = (of.flatten().repeat(2) for of in torch.meshgrid(torch.arange(10), torch.arange(4), indexing="ij"))
    features = torch.arange(80.0).unsqueeze(1).repeat(1, 2)  # name the rows
    given = []
    monkeypatch.setattr(shifts, "logistic_probe", lambda x, *rest, **options: given.append(x[:, 0].long()))
    found = ev.unseen_groups(features, labels, groups, features, labels, groups)
    assert len(found) == 10
    assert {of["images"] for of in found.values()} == {(72, 72)}
    for control in given[1::2]:
        assert len(set(control.tolist())) == 72
        assert torch.bincount(labels[control]).tolist() == [18] * 4
        assert set(torch.bincount(labels[control] * 10 + groups[control]).tolist()) == {1, 2}  # of each cell 1.8
    seen = torch.bincount(groups[torch.cat(given[1::2])])
    assert all(count < 80 for count in seen.tolist())  # rounding does not always favor the same groups


SCENES = (rand(90, 3, 8, 8), torch.arange(90) % 3)
OTHERS = (rand(60, 3, 8, 8, seed=1), torch.arange(60) % 3)
OTHERS[0][:, :, :4, :4] += OTHERS[1].view(-1, 1, 1, 1) * 0.5
SCENES[0][:, :, :4, :4] += SCENES[1].view(-1, 1, 1, 1) * 0.5
SCENES[0].div_(2), OTHERS[0].div_(2)


def test_a_planted_color():
    images = (SCENES[0] * 255).to(torch.uint8)
    found = ev.plant_shortcut(images, SCENES[1], num_codes=3)
    colors = torch.eye(3)[SCENES[1]].view(-1, 3, 1, 1)
    assert found[:, :, 6:, 6:].equal(colors.expand(-1, -1, 2, 2))
    rest = torch.ones(8, 8, dtype=torch.bool)
    rest[6:, 6:] = False
    assert_same_bits(found[..., rest], (images.float() / 255)[..., rest])
    masks = rand(90, 8, 8) < 0.5
    found = ev.plant_shortcut(images, SCENES[1], num_codes=3, kind="background", masks=masks)
    expected = torch.where(masks[:, None], images.float() / 255, colors)
    assert_same_bits(found, expected)
    gray = ev.plant_shortcut(images[:5, :1], torch.arange(5), num_codes=5)
    assert gray[:, 0, 7, 7].tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_a_shortcut_fools_features_that_see_it():
    sees = ev.shortcut_test(lambda images: images[:, :, 6:, 6:].mean((2, 3)), *SCENES, *OTHERS)
    assert sees["right"].all()
    assert not sees["swapped"].any()
    assert sees["fooled"].all()
    blind = ev.shortcut_test(lambda images: images[:, :, :4, :4].mean((2, 3)), *SCENES, *OTHERS)
    for name in ("right", "swapped", "absent"):
        assert_same_bits(blind[name], blind["clean"])
    assert blind["clean"].double().mean() > 0.9
    assert not (blind["fooled"] & blind["swapped"]).any()
    masks = [torch.zeros(len(y), 8, 8, dtype=torch.bool) for _, y in (SCENES, OTHERS)]
    whole = ev.shortcut_test(lambda x: x.mean((2, 3)), *SCENES, *OTHERS, kind="background", masks=tuple(masks))
    assert whole["fooled"].all()


def test_images_with_conflicting_cues():
    count = 30
    labels = torch.arange(count) % 3
    colors = torch.eye(3)[labels].view(-1, 3, 1, 1) * 0.8 + 0.1 * rand(count, 3, 1, 1)
    masks = torch.zeros(count, 16, 16, dtype=torch.bool)
    for mask, label in zip(masks, labels.tolist(), strict=True):
        mask[4:12, 4 : 8 + 2 * label] = True  # wider for higher classes
    background = torch.linspace(0.9, 1, count).view(-1, 1, 1, 1)
    images = torch.where(masks[:, None], colors, background.expand(-1, 3, 16, 16))
    made, shapes, textures = ev.cue_conflict_images(images, masks, labels, count=50)
    assert (shapes != textures).all()
    assert len(set(shapes.tolist())) == len(set(textures.tolist())) == 3
    for image, shape, texture in zip(made, shapes.tolist(), textures.tolist(), strict=True):
        inside = masks[shape]
        assert (image[:, inside].mean(1).argmax() == texture).item()
        outside = image[:, ~inside]
        assert (outside >= 0.9).all()
        assert outside.unique().numel() == 1
        assert image[:, inside].unique(dim=1).shape[1] == 1
    by_color = made[:, :, 6, 6].argmax(1)
    assert ev.shape_decisions(by_color, shapes, textures) == {"shape": 0, "texture": 50, "other": 0, "share": 0.0}
    by_width = ((made[:, 0, 6] < 0.9) | (made[:, 1, 6] < 0.9)).sum(1) // 2 - 2
    assert ev.shape_decisions(by_width, shapes, textures)["share"] == 1.0
    agreeing = ev.shape_decisions(torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([1, 0]))
    assert agreeing == {"shape": 1, "texture": 0, "other": 0, "share": 1.0}
    assert math.isnan(ev.shape_decisions(torch.tensor([2]), torch.tensor([1]), torch.tensor([0]))["share"])
    again = ev.cue_conflict_images(images, masks, labels, count=50)[0]
    assert_same_bits(made, again)
    with pytest.raises(ValueError, match="`masks` must show objects of two classes"):
        ev.cue_conflict_images(images, torch.ones_like(masks), labels)


@pytest.mark.slow
def test_textures_of_large_images_are_the_largest_squares():
    g = torch.Generator().manual_seed(0)
    for height, width in ((40, 33), (24, 24), (56, 64)):
        for _ in range(6):
            mask = torch.rand(height, width, generator=g) < 0.995
            found = cue_conflict._largest_square(mask)
            edges = range(max(2, -(-min(height, width) // 8)), min(height, width) + 1)
            whole = {edge: mask.unfold(0, edge, 1).unfold(1, edge, 1).all(3).all(2).nonzero() for edge in edges}
            largest = max((edge for edge in edges if len(whole[edge])), default=None)
            places = whole[largest]
            assert found == (*places[len(places) // 2].tolist(), largest)
    assert cue_conflict._largest_square(torch.zeros(16, 16, dtype=torch.bool)) is None
    mask = (torch.arange(224) - 112).square() + (torch.arange(224)[:, None] - 112).square() < 80**2
    start = time.process_time()
    for _ in range(20):
        assert cue_conflict._largest_square(mask) == (56, 56, 113)
    assert time.process_time() - start < 5  # 0.03 s; 14 s if every square is summed


def test_associations_are_two_sided():
    g = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.randn(12, 6, generator=g) for _ in range(4))
    x = x + (a.mean(0) - b.mean(0)) * 4
    found = ev.association_audit(x, y, {"a": (a, b), "b": (b, a)}, permutations=500)
    forward, backward = (metrics.association_test(*of, a, b, permutations=500) for of in ((x, y), (y, x)))
    assert found["a"]["effect"] == near64(forward.effect.item())
    assert found["a"]["p"] == near64(2 * min(forward.p_value, backward.p_value))
    assert found["b"]["effect"] == near64(-forward.effect.item())
    assert found["a"]["effect"] > 0.5
    assert found["a"]["p"] < 0.05
    assert found["b"]["p"] < 0.05
    assert ev.association_audit(x, x, {"a": (a, b)}, permutations=50)["a"]["p"] > 0.5


def test_retrieval_by_group():
    x, y = blobs(60)
    x, y = torch.cat([x, x[:1] + 9]), torch.cat([y, torch.tensor([8])])  # one image alone in its class
    x, y = x.roll(1, 0), y.roll(1)
    first, second = torch.arange(1, 41, 8), torch.arange(5, 45, 8)
    found = ev.twin_retrieval(x, y, first, second, k=3)
    unit = F.normalize(x, dim=1)
    for name, rows in (("first", first), ("second", second)):
        for place, row in enumerate(rows.tolist()):
            others = torch.arange(61) != row
            expected = average_precision_score((y[others] == y[row]).numpy(), (unit @ unit[row])[others].numpy())
            assert found[name][place].item() == near64(expected, 2**30)
    both = torch.cat([first, second])
    for place, row in enumerate(both.tolist()):
        similar = (unit[both] @ unit[row]).masked_fill(both == row, -2)
        own = ((similar.topk(3).indices < 5) == (place < 5)).double().mean()
        assert (torch.cat([found["own_first"], found["own_second"]])[place] == own).item()
    with pytest.raises(ValueError, match="`labels` must have another image of the class of each query"):
        ev.twin_retrieval(x, y, torch.tensor([0]), torch.tensor([1]), k=1)
    with pytest.raises(ValueError, match="`k` must be <= 9"):
        ev.twin_retrieval(x, y, first, second, k=10)


def test_an_attribute_probe():
    shift = torch.zeros(12)
    shift[3] = 4.0
    pairs = [(x, x + shift) for x in (TRAIN[0], TEST[0])]
    found = ev.attribute_probe(*pairs)
    assert found.top1 > 0.75
    assert found.labels.tolist() == [0] * 60 + [1] * 60
    noise = [(x, x + 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))) for x, _ in pairs]
    assert abs(ev.attribute_probe(*noise).top1 - 0.5) < 0.2


X, Y = TRAIN
IMAGES = rand(6, 3, 8, 8)
SIX = torch.arange(6) % 2
PIXELS = (255 * IMAGES).to(torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ev.pgd_robustness(nn.Flatten(), nn.Linear(192, 2), IMAGES, SIX, steps=-1), "`steps` must be >= 0"),
        (lambda: ev.pgd_robustness(nn.Flatten(), nn.Linear(192, 2), IMAGES, SIX[:2]), "`labels` must be integers of"),
        (lambda: ev.pgd_robustness(nn.Flatten(), nn.Linear(192, 2), IMAGES * 9, SIX), "`images` must lie in 0..1"),
        (lambda: ev.pgd_robustness(nn.Flatten(), nn.Linear(192, 2), IMAGES, SIX - 1), "`labels` must be >= 0"),
        (lambda: ev.corruption_robustness(nn.Flatten(), PIXELS, SIX, corruptions=["fogg"]), "`name` must be one of"),
        (lambda: ev.corruption_robustness(nn.Flatten(), PIXELS, SIX, severities=[6]), "`severity` must be one of"),
        (lambda: ev.corruption_robustness(nn.Flatten(), PIXELS, SIX, severities=[]), "`severities` must be some of"),
        (lambda: ev.corruption_robustness(nn.Flatten(), PIXELS, SIX, corruptions=[]), "`corruptions` must be some"),
        (lambda: ev.corruption_robustness(nn.Flatten(), PIXELS, SIX, table="cifr"), "`table` must be one of"),
        (lambda: ev.corruption_robustness(nn.Flatten(), PIXELS, SIX[:2]), "`labels` must be integers of"),
        (lambda: ev.corruption_robustness(nn.Flatten(), PIXELS, SIX - 1), "`labels` must be >= 0"),
        (lambda: ev.long_tail_rows(Y, imbalance=0.5), r"`imbalance` must lie in \[1, inf\)"),
        (lambda: ev.long_tail_rows(Y * 0), "`labels` must hold two classes"),
        (lambda: ev.long_tail(*BOTH, many=5, few=10), "`many` must be >= 10"),
        (lambda: ev.class_mean_accuracy(Y > 1, Y, [7]), "`classes` must have images"),
        (lambda: ev.plant_shortcut(IMAGES, SIX, num_codes=1), "`num_codes` must be >= 2"),
        (lambda: ev.plant_shortcut(IMAGES, SIX + 1, num_codes=2), r"`codes` must lie in 0..1"),
        (lambda: ev.plant_shortcut(IMAGES, SIX, num_codes=2, kind="tags"), "`kind` must be one of"),
        (lambda: ev.plant_shortcut(IMAGES, SIX, num_codes=2, kind="background"), "`masks` must be given"),
        (lambda: ev.shortcut_test(nn.Flatten(), IMAGES, SIX - 1, IMAGES, SIX), "`train_labels` must be >= 0"),
        (lambda: ev.cue_conflict_images(IMAGES, IMAGES[:, 0], SIX), "`masks` must be bool of shape"),
        (lambda: ev.shape_decisions(SIX, SIX, SIX[:2]), "`predictions` must have the shape"),
        (lambda: ev.attribute_probe((X, X[:0]), (X, X)), "`train` must have images of both groups"),
        (lambda: ev.twin_retrieval(X, Y, Y[:2] + 200, Y[:2]), "`first` must name rows in 0..119"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

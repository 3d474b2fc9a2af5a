"""Selection of positives and negatives."""

import pytest
import torch
import torch.nn.functional as F

from lightning_contrast.losses.labels import global_classes
from lightning_contrast.losses.mining import mine


def situation(size=9, classes=3):
    generator = torch.Generator().manual_seed(4)
    anchors, candidates = (F.normalize(torch.randn(size, 5, generator=generator), dim=1) for _ in range(2))
    labels = torch.arange(size) % classes
    return anchors, candidates, labels[:, None] == labels, torch.arange(size)


def distances(anchors, candidates):
    return [[float((a - c).square().sum()) for c in candidates] for a in anchors]


def test_hardest_is_the_farthest_positive_and_the_nearest_negative():
    anchors, candidates, same, own = situation()
    positive, negative = mine(anchors, candidates, same, own, miner="hardest")
    for i, row in enumerate(distances(anchors, candidates)):
        assert positive[i] == max((j for j in own.tolist() if same[i, j]), key=row.__getitem__)
        assert negative[i] == min((j for j in own.tolist() if not same[i, j]), key=row.__getitem__)


@pytest.mark.parametrize("margin", [0.2, 1.0, 1e-6])
def test_semi_hard_is_just_farther_than_the_positive(margin):
    anchors, candidates, same, own = situation(classes=9)  # one positive each
    positive, negative = mine(anchors, candidates, same, own, miner="semi-hard", margin=margin)
    assert torch.equal(positive, own)
    for i, row in enumerate(distances(anchors, candidates)):
        others = [j for j in own.tolist() if j != i]
        fits = [j for j in others if row[i] < row[j] < row[i] + margin]
        assert negative[i] == (min(fits, key=row.__getitem__) if fits else max(others, key=row.__getitem__))


@pytest.mark.parametrize("miner", ["random", "semi-hard", "hardest"])
def test_classes_are_kept_and_an_anchor_without_negative_takes_itself(miner):
    anchors, candidates, same, own = situation()
    same[2] = True  # the class of everyone
    for seed in range(20):
        torch.manual_seed(seed)
        positive, negative = mine(anchors, candidates, same, own, miner=miner, margin=0.2)
        assert same.gather(1, positive[:, None]).all()
        assert not same.gather(1, negative[:, None]).squeeze(1)[own != 2].any()
        assert negative[2] == 2


def test_random_reaches_every_choice():
    anchors, candidates, same, own = situation()
    torch.manual_seed(0)
    seen = [mine(anchors, candidates, same, own, miner="random") for _ in range(200)]
    assert {int(positive[0]) for positive, _ in seen} == {0, 3, 6}
    assert {int(negative[0]) for _, negative in seen} == {1, 2, 4, 5, 7, 8}


def test_without_labels_each_image_is_a_class():
    classes, everyone = global_classes(None, 4, torch.device("cpu"))
    assert torch.equal(classes, torch.arange(4))
    assert torch.equal(everyone, torch.arange(4))

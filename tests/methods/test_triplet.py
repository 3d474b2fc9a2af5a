"""The triplet method's own properties."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, step_batch
from tests.tolerances import NETWORK, near


def embed(module, views):
    return F.normalize(module.projector(module.backbone(torch.cat(views))), dim=1).detach().double().chunk(2)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("distance", "scale"), [("euclidean", 1.0), ("cosine", 0.5)])
def test_loss_of_the_hardest_triplets(labelled, distance, scale):
    module, logged = make("Triplet", miner="hardest", use_labels=labelled, distance=distance, margin=0.01), {}
    module.log = lambda name, value, **_: logged.update({name: value.item()})
    views, labels = step_batch(CASES["Triplet"])
    a, b = embed(module, views)
    classes = labels.tolist() if labelled else list(range(BATCH))
    hinges = []
    for i in range(BATCH):
        far = [scale * float((a[i] - b[j]).square().sum()) for j in range(BATCH)]
        positive = max(far[j] for j in range(BATCH) if classes[j] == classes[i])
        negative = min(far[j] for j in range(BATCH) if classes[j] != classes[i])
        hinges.append(max(0.0, positive - negative + 0.01))
    assert module.training_step([views, labels], 0)["loss"].item() == near(sum(hinges) / BATCH, NETWORK)
    assert logged["train/active_triplets"] == near(sum(h > 0 for h in hinges) / BATCH)


def test_equal_embeddings_give_the_margin():
    module = make("Triplet", margin=0.3).eval()
    views, labels = step_batch(CASES["Triplet"])
    module.log = lambda *_, **__: None
    same = [view[:1].expand_as(view) for view in (views[0], views[0])]
    assert module.training_step([same, labels], 0)["loss"].item() == near(0.3, size=1)


def test_defaults_are_the_papers():
    module = lc.Triplet(TinyBackbone())
    assert (module.margin, module.miner, module.distance, module.use_labels) == (0.2, "semi-hard", "euclidean", False)
    assert module.projector.layers[-1].out_features == 128


def test_missing_labels_are_told():
    views, _ = step_batch(CASES["Triplet"])
    with pytest.raises(ValueError, match="`batch` must hold labels for Triplet with `use_labels`"):
        make("Triplet", use_labels=True).training_step([views], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"miner": "semihard"}, "`miner` must be one of .* Did you mean 'semi-hard'"),
        ({"distance": "cos"}, "`distance` must be one of"),
        ({"margin": 0.0}, "`margin` must be > 0"),
    ],
)
def test_bad_arguments(arguments, message):
    for method in (lc.Triplet, lc.SiameseMargin):
        with pytest.raises(ValueError, match=message):
            method(TinyBackbone(), **arguments)

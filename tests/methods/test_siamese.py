"""The margin method's own properties."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, run_step, step_batch
from tests.tolerances import NETWORK, near


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_loss_of_the_hardest_pairs(labelled, distance):
    module = make("SiameseMargin", miner="hardest", use_labels=labelled, distance=distance, margin=0.7)
    views, labels = step_batch(CASES["SiameseMargin"])
    z = module.projector(module.backbone(torch.cat(views))).detach().double()
    a, b = (F.normalize(z, dim=1) if distance == "cosine" else z).chunk(2)
    classes = labels.tolist() if labelled else list(range(BATCH))
    total = 0.0
    for i in range(BATCH):
        far = [float((a[i] - b[j]).norm()) for j in range(BATCH)]
        positive = max(far[j] for j in range(BATCH) if classes[j] == classes[i])
        negative = min(far[j] for j in range(BATCH) if classes[j] != classes[i])
        total += 0.5 * positive**2 + 0.5 * max(0.0, 0.7 - negative) ** 2
    assert run_step(module, [views, labels])["loss"].item() == near(total / (2 * BATCH), NETWORK)


def test_an_image_that_has_no_dissimilar_one_only_attracts():
    module = make("SiameseMargin", use_labels=True, miner="hardest")
    views, _ = step_batch(CASES["SiameseMargin"])
    a, b = module.projector(module.backbone(torch.cat(views))).detach().double().chunk(2)
    hardest = [max(float((x - y).square().sum()) for y in b) for x in a]
    own = (a - b).square().sum(1).tolist()
    expected = sum(0.5 * (h + o) for h, o in zip(hardest, own, strict=True)) / (2 * BATCH)
    one_class = torch.zeros(BATCH, dtype=torch.int64)
    assert run_step(module, [views, one_class])["loss"].item() == near(expected, NETWORK)


def test_defaults_are_the_papers():
    module = lc.SiameseMargin(TinyBackbone())
    assert (module.distance, module.margin, module.use_labels) == ("euclidean", 1.0, False)


def test_missing_labels_are_told():
    views, _ = step_batch(CASES["SiameseMargin"])
    with pytest.raises(ValueError, match="`batch` must hold labels for SiameseMargin with `use_labels`"):
        run_step(make("SiameseMargin", use_labels=True), [views])

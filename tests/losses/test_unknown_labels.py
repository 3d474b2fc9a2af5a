"""A label below 0 is unknown wherever labels are compared: such an image is of no other image's class."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_contrast import distributed, losses
from lightning_contrast.losses.labels import global_classes, separate_unknown
from tests.launch import run_processes
from tests.losses.cases import value_and_gradients
from tests.tolerances import CANCELLING, f64

ROWS = 6
UNKNOWN = torch.tensor([-1, 2, -1, 2, -7, 0])
OWN = torch.tensor([11, 2, 12, 2, 13, 0])  # the same with a class of its own for each unknown image
QUEUE = torch.tensor([-1, 2, -7, 0, 5])

LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": lambda a, b, q, g: losses.nt_xent(a, b, temperature=0.3, groups=g),
    "debiased": lambda a, b, q, g: losses.nt_xent(a, b, temperature=0.3, groups=g, weighting="debiased"),
    "top_k": lambda a, b, q, g: losses.nt_xent(a, b, temperature=0.3, groups=g, weighting="top_k"),
    "info_nce": lambda a, b, q, g: losses.info_nce(a, b, temperature=0.3, groups=g),
    "queue": lambda a, b, q, g: losses.info_nce(a, b, q, temperature=0.3, groups=g, negatives_groups=QUEUE),
    "queue, debiased": lambda a, b, q, g: losses.info_nce(
        a, b, q, temperature=0.3, groups=g, negatives_groups=QUEUE, weighting="debiased"
    ),
    "clip": lambda a, b, q, g: losses.clip_loss(a, b, logit_scale=3.0, groups=g),
    "sup_con": lambda a, b, q, g: losses.sup_con(a, b, g, temperature=0.3),
    "sup_con, one view": lambda a, b, q, g: losses.sup_con(a, g, temperature=0.3),
    "sup_con, three views": lambda a, b, q, g: losses.sup_con(a, b, a + b, g, temperature=0.3),
}


def _tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (ROWS, ROWS, len(QUEUE))]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", LOSSES)
def test_each_unknown_image_is_a_class_of_its_own(name: str, dtype: torch.dtype) -> None:
    found, expected, one_class = (
        value_and_gradients(lambda a, b, q, g=labels: LOSSES[name](a, b, q, g), _tensors())
        for labels in (UNKNOWN.to(dtype), OWN, UNKNOWN.clamp_min(-1) + 1)
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **f64(CANCELLING))
    assert name.startswith("queue") or abs(float(found[0] - one_class[0])) > 1e-3


def test_triplets_and_pairs_of_unknown_images() -> None:
    classes, everyone = global_classes(UNKNOWN, ROWS, torch.device("cpu"))
    assert torch.equal(classes, everyone)
    assert torch.equal(classes[:, None] == everyone, OWN[:, None] == OWN)


def test_known_labels_are_left_alone_and_unknown_ones_are_not_known() -> None:
    found = separate_unknown(UNKNOWN)
    assert torch.equal(found[UNKNOWN >= 0], UNKNOWN[UNKNOWN >= 0])
    assert (found[UNKNOWN < 0] < 0).all()
    assert not torch.isin(found, torch.tensor([-1, -7])).any()


def _over_ranks(rank: int) -> None:
    classes, everyone = global_classes(torch.tensor([-1, 3, -1]), 3, torch.device("cpu"))
    assert torch.equal(everyone[3 * rank : 3 * rank + 3], classes)
    assert len(everyone.unique()) == 2 * distributed.world_size() + 1


@pytest.mark.dist
def test_unknown_images_of_other_ranks_are_other_classes() -> None:
    run_processes(_over_ranks, 2)

"""In every method that compares labels, an image whose label is below 0 is of no other image's class."""

import pytest
import torch

from tests.methods.cases import CASES, make
from tests.methods.test_contract import run_step, step_batch
from tests.tolerances import CANCELLING, NETWORK, bound, f64

UNKNOWN = torch.tensor([0, -1, 0, -1, 2, -7, 1, 2])
OWN = torch.tensor([0, 11, 0, 12, 2, 13, 1, 2])
METHODS = {
    "SupCon": {},
    "Triplet": {"use_labels": True, "miner": "hardest"},
    "SiameseMargin": {"use_labels": True, "miner": "hardest"},
    "SimCLR": {"mask_same": "label"},
    "MoCo": {"mask_same": "label"},
}


def loss_of(name, labels):
    torch.manual_seed(0)
    module = make(name, **METHODS[name]).double()
    views = step_batch(CASES[name], torch.float64)[0]
    return run_step(module, [views, labels])["loss"].detach()


@pytest.mark.parametrize("name", METHODS)
def test_each_unknown_image_is_a_class_of_its_own(name):
    found = loss_of(name, UNKNOWN)
    torch.testing.assert_close(found, loss_of(name, OWN), **f64(CANCELLING))
    if name != "MoCo":  # its queue is empty in the first step
        assert abs(float(found - loss_of(name, UNKNOWN.clamp_min(-1) + 1))) > bound(NETWORK), "they are not one class"

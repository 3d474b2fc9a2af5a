"""NNCLR's own properties."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast.metrics.neighbours import nearest_row
from tests.methods.cases import CASES, TinyBackbone, fill_queue, make
from tests.methods.test_contract import run_step, step_batch

CASE = CASES["NNCLR"]


def loop_neighbours(queries, queue):
    """Return the filled row with the largest cosine for each query, in plain loops."""
    rows = F.normalize(queue.features[queue.mask], dim=1)
    if len(rows) == 0:
        return queries
    found = [max(rows, key=lambda row, q=q: float(row @ q / q.norm())) for q in queries]
    return torch.stack(found)


@pytest.mark.parametrize("filled", [False, True])
def test_loss_is_the_papers(filled):
    module = make("NNCLR", temperature=0.3).eval()
    module = fill_queue(module) if filled else module
    (view_a, view_b), _ = batch = step_batch(CASE)
    z_a, z_b = (module.projector(module.backbone(view)) for view in (view_a, view_b))
    losses = []
    for own, other in ((z_a, z_b), (z_b, z_a)):
        neighbours = F.normalize(loop_neighbours(own.detach(), module.queue), dim=1)
        predictions = F.normalize(module.predictor(other), dim=1)
        losses.append(F.cross_entropy(neighbours @ predictions.T / 0.3, torch.arange(len(own))))
    out = run_step(module, batch)
    torch.testing.assert_close(out["loss"], sum(losses) / 2)
    torch.testing.assert_close(out["keys"], F.normalize(z_a.detach(), dim=1))


def test_gradient_flows_through_the_predictions_only():
    queries = torch.randn(3, 4, requires_grad=True)
    bank, mask = torch.randn(6, 4), torch.tensor([True] * 5 + [False])
    bank[5] = queries[0].detach() * 9  # the best row is not filled yet
    found = nearest_row(queries, bank, mask)
    assert not found.requires_grad
    assert not torch.allclose(found[0], F.normalize(bank[5], dim=0))


def test_neighbours_are_searched_in_full_precision():
    queries, bank = torch.randn(64, 32), torch.randn(512, 32)
    mask = torch.ones(512, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_row(queries, bank, mask)
    assert torch.equal(found, nearest_row(queries, bank, mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"queue_size": 0}, "`queue_size` must be >= 1"), ({"temperature": -1.0}, "`temperature` must be > 0")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lc.NNCLR(TinyBackbone(), hidden_dim=8, predictor_dim=8, **arguments)

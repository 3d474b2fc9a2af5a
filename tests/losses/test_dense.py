"""Losses of grids of features: official values, formulas in loops, ranks, bad inputs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_contrast import losses
from tests.launch import run_processes
from tests.tolerances import CANCELLING, NETWORK, f64, near

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parents[1] / "official_dense.json").read_text(encoding="utf-8"))
}
CALLS = {"dense_cl": losses.dense_info_nce}


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_reference_implementation(name):
    record = RECORDS[name]
    inputs = {key: torch.tensor(value) for key, value in record["inputs"].items()}
    inputs = {key: value.requires_grad_(key in record["grad_norm"]) for key, value in inputs.items()}
    loss = CALLS[name](**inputs, **record["params"])
    loss.backward()
    assert float(loss.detach()) == near(record["loss"])
    for key, norm in record["grad_norm"].items():
        assert float(inputs[key].grad.norm()) == near(norm, NETWORK), key


def test_every_official_record_is_used():
    assert {*CALLS} == set(RECORDS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRIDS = [draw(5, 6, 4), draw(5, 6, 4, seed=1), draw(5, 3, 4, seed=2), draw(5, 3, 4, seed=3)]
QUEUE, FILLED = draw(7, 6, seed=4), torch.arange(7) != 2


def dense_by_loops(queue):
    query, key, query_backbone, key_backbone = GRIDS
    found = []
    for i in range(5):
        for s in range(4):
            cosines = [F.cosine_similarity(query_backbone[i, :, s], key_backbone[i, :, t], dim=0) for t in range(4)]
            match = max(range(4), key=lambda t, cosines=cosines: cosines[t])
            others = [key[j].mean(1) for j in range(5) if j != i] if queue is None else queue[FILLED]
            logits = [F.cosine_similarity(query[i, :, s], row, dim=0) / 0.2 for row in (key[i, :, match], *others)]
            found.append(F.cross_entropy(torch.stack(logits)[None], torch.tensor([0])))
    return torch.stack(found).mean()


@pytest.mark.parametrize("queue", [None, QUEUE])
def test_dense_contrast_equals_its_loops(queue):
    mask = None if queue is None else FILLED
    found = losses.dense_info_nce(*GRIDS, queue, temperature=0.2, queue_mask=mask)
    torch.testing.assert_close(found, dense_by_loops(queue), **f64(CANCELLING))


def run(kind, rows):
    """Return a loss of five images, of which a rank has some, and the gradients."""
    leaves = [grid.clone().requires_grad_() for grid in GRIDS[:1]]
    loss = losses.dense_info_nce(*(grid[rows] for grid in (*leaves, *GRIDS[1:])), temperature=0.2)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def of_rank(rank, kind):
    loss, gradients = run(kind, slice(0, 3) if rank == 0 else slice(3, 5))
    for gradient in gradients:  # what DDP does
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return loss, gradients


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["dense"])
def test_two_unequal_ranks_equal_one(kind):
    loss, gradients = run(kind, slice(0, 5))
    for found, of_ranks in run_processes(of_rank, 2, kind):
        torch.testing.assert_close(found, loss, **f64(CANCELLING))
        for a, b in zip(of_ranks, gradients, strict=True):
            torch.testing.assert_close(a, b, **f64(CANCELLING))


GRID, PLACES = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
BAD = {
    "a row": (lambda: losses.dense_info_nce(GRID[0], GRID, PLACES, PLACES, temperature=1.0), r"be \(B, D, S\)"),
    "key": (
        lambda: losses.dense_info_nce(GRID, GRID[..., :3], PLACES, PLACES, temperature=1.0),
        r"`key_grid` must be \(2, 3, 4\), got \(2, 3, 3\). Use views of one size",
    ),
    "places": (
        lambda: losses.dense_info_nce(GRID, GRID, *2 * (PLACES[..., :3],), temperature=1.0),
        r"`query_backbone` must be \(2, C, 4\)",
    ),
    "temperature": (
        lambda: losses.dense_info_nce(GRID, GRID, PLACES, PLACES, temperature=0.0),
        "`temperature` must be > 0",
    ),
    "queue": (
        lambda: losses.dense_info_nce(GRID, GRID, PLACES, PLACES, GRID[0].mT[:, :2], temperature=1.0),
        r"`negatives` must have shape \(rows, 3\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()

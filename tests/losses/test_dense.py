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


def gram(student, teacher, *, normalize, clip_negative, clip_teacher_negative):
    assert (normalize, clip_teacher_negative) == (True, False)
    return losses.gram_loss(student, teacher, clip_negative=clip_negative)


CALLS = {
    "dense_cl": losses.dense_info_nce,
    "vicregl_global": losses.vicregl_global_loss,
    "vicregl_local": losses.vicregl_local_loss,
    "gram": gram,
    "gram_clip_both": gram,
    "gram_batch": lambda student, teacher: losses.gram_loss(student, teacher, per_image=False),
    "dinov3_dino": lambda student, teacher, **p: losses.dino_loss(student, teacher.softmax(2), **p),
    "dinov3_ibot": lambda student, teacher, mask, **p: losses.ibot_patch_loss(
        student, teacher, None, mask, teacher_temperature=1.0, **p
    ),
    "dinov3_koleo": losses.koleo_loss,
}


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
    assert {*CALLS, "rope"} == set(RECORDS)


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


MAPS, LOCATIONS = [draw(5, 4, 6), draw(5, 4, 6, seed=1), draw(5, 2, 6, seed=2)], [draw(5, 2, 2, 2), draw(5, 4, 1, 2)]
LOCATIONS.append(draw(5, 1, 2, 2, seed=2))
WEIGHTS = {"invariance_weight": 3.0, "variance_weight": 5.0, "covariance_weight": 7.0}


def regularization(rows):
    """Return the weighted variance and covariance of rows (B, C)."""
    c = rows.T.cov()
    off_diagonal = sum(c[i, j] ** 2 for i in range(6) for j in range(6) if i != j) / 6
    return 5 * (1 - (c.diagonal() + 1e-4).sqrt()).relu().mean() + 7 * off_diagonal


def matched(x, y, points, others, count):
    """Return the loss of the cells of x that are nearest to a cell of y, slot by slot."""
    mine, theirs = [], []
    for i in range(5):
        near = [[float((p - q).square().sum()) for q in others[i]] for p in points[i]]
        best = [min(range(len(row)), key=row.__getitem__) for row in near]
        order = sorted(range(len(near)), key=lambda s, near=near: min(near[s]))[:count]
        mine.append(torch.stack([x[i, s] for s in sorted(order)]))
        theirs.append(torch.stack([y[i, best[s]] for s in sorted(order)]))
    mine, theirs = torch.stack(mine), torch.stack(theirs)  # (B, M, C)
    slots = [(regularization(mine[:, m]) + regularization(theirs[:, m])) / 2 for m in range(mine.shape[1])]
    return 3 * (mine - theirs).square().mean() + torch.stack(slots).mean()


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("located", [True, False])
def test_local_loss_equals_its_loops(every, located):
    places = [place.flatten(1, 2) for place in LOCATIONS]
    pairs, total = [(0, 1), (0, 2), (1, 0), (1, 2)], 0.0
    for i, j in pairs:
        for points, counts in [(MAPS, (9, 9) if every else (3, 2)), *([(places, (3, 2))] if located else [])]:
            total = total + matched(MAPS[i], MAPS[j], points[i], points[j], counts[0]) / 2
            total = total + matched(MAPS[j], MAPS[i], points[j], points[i], counts[1]) / 2
    options = WEIGHTS | {"matches": (3, 2), "all_feature_matches": every}
    found = losses.vicregl_local_loss(MAPS, LOCATIONS if located else None, **options)
    torch.testing.assert_close(found, total / len(pairs), **f64(CANCELLING))


def test_global_loss_equals_its_formula():
    views = [view[:, 0] for view in MAPS]
    squares = [(views[i] - views[j]).square().mean() for i, j in [(0, 1), (0, 2), (1, 0), (1, 2)]]
    expected = 3 * sum(squares) / 4 + sum(map(regularization, views)) / 3
    torch.testing.assert_close(losses.vicregl_global_loss(views, **WEIGHTS), expected, **f64(CANCELLING))


def run(kind, rows):
    """Return a loss of five images, of which a rank has some, and the gradients."""
    leaves = [grid.clone().requires_grad_() for grid in (GRIDS[:1] if kind == "dense" else MAPS)]
    own = [leaf[rows] for leaf in leaves]
    if kind == "dense":
        loss = losses.dense_info_nce(*own, *(grid[rows] for grid in GRIDS[1:]), temperature=0.2)
    elif kind.startswith("gram"):
        loss = losses.gram_loss(own[0], own[1].detach().flip(1), per_image=kind == "gram")
    elif kind == "koleo":
        loss = losses.koleo_loss(own[0].mean(1), neighbours=3)
    elif kind == "global":
        loss = losses.vicregl_global_loss([view.mean(1) for view in own])
    else:
        loss = losses.vicregl_local_loss(own, [place[rows] for place in LOCATIONS], matches=(3, 2))
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def of_rank(rank, kind):
    loss, gradients = run(kind, slice(0, 3) if rank == 0 else slice(3, 5))
    for gradient in gradients:  # what DDP does
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return loss, gradients


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["dense", "global", "local", "gram", "gram of all", "koleo"])
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
    "one view": (lambda: losses.vicregl_global_loss([GRID[0]]), "`embeddings` must be a list of at least 2 tensors"),
    "one image": (lambda: losses.vicregl_global_loss(2 * [GRID[0, :1]]), "have a batch of at least 2"),
    "weight": (lambda: losses.vicregl_global_loss(GRID, variance_weight=-1.0), "`variance_weight` must be >= 0"),
    "gram": (lambda: losses.gram_loss(GRID, GRID[:, :2]), r"`student` must have the patches \(B, P\) of the teacher"),
    "neighbours": (lambda: losses.koleo_loss(GRID[0], neighbours=3), "`z` must have a batch of at least 4, got 3"),
    "one map": (lambda: losses.vicregl_local_loss([GRID], None), "`maps` must be a list of at least 2 maps"),
    "many matches": (
        lambda: losses.vicregl_local_loss([GRID, GRID], None, matches=(4, 1)),
        r"`matches` must be at most the 3 cells of a view, got \(4, 1\)",
    ),
    "no matches": (lambda: losses.vicregl_local_loss([GRID, GRID], None, matches=(1, 0)), "`matches` must be >= 1"),
    "other cells": (
        lambda: losses.vicregl_local_loss([GRID, GRID], 2 * [torch.ones(2, 2, 2, 2)], matches=(1, 1)),
        r"`locations` must be \(B, h, w, 2\) with 3 cells",
    ),
    "other channels": (
        lambda: losses.vicregl_local_loss([GRID, GRID[..., :2]], None, matches=(1, 1)),
        r"`maps` must be \(B, S, C\) with one B and C",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()

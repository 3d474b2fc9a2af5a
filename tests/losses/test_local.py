"""GLoRIA's and CPC's losses: official values, formulas in loops, ranks, chunks, drawn negatives, bad inputs."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_contrast import losses
from lightning_contrast.losses import local_image_text
from tests.launch import run_processes
from tests.tolerances import CANCELLING, NETWORK, f32, f64, near

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parents[1] / "official_local.json").read_text(encoding="utf-8"))
}


def sampled(z, context, predictors, negative_index, **params):
    return losses.cpc_sampled_loss(context, z, predictors, negative_index.long(), **params)


def over_time(context, z, predictors, negative_batch, negative_time, negatives):
    assert negative_batch.shape[1] == negatives
    return losses.cpc_time_loss(context, z, predictors, negative_batch.long(), negative_time.long())


CALLS = {
    "gloria_global": losses.gloria_global_loss,
    "gloria_local": lambda regions, words, lengths, **p: losses.gloria_local_loss(regions, words, lengths.long(), **p),
    "cpc_rows": lambda targets, predictions, **p: losses.cpc_loss(predictions, targets, **p),
    "cpc_rows_sampled": sampled,
    "cpc_time": over_time,
}


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_reference_implementation(name):
    record = RECORDS[name]
    inputs = {key: torch.tensor(value) for key, value in record["inputs"].items()}
    inputs = {key: value.requires_grad_(key in record["grad_norm"]) for key, value in inputs.items()}
    loss = CALLS[name](**inputs, **record["params"])
    loss.backward()
    assert float(loss.detach()) == near(record["loss"])
    assert len(record["grad_norm"]) >= 2
    for key, norm in record["grad_norm"].items():
        assert float(inputs[key].grad.norm()) == near(norm, NETWORK), key


def test_attended_regions_equal_the_reference_implementation():
    record = RECORDS["gloria_attention"]
    words, regions = (torch.tensor(record["inputs"][key]) for key in ("words", "regions"))
    found = losses.attend_regions(words, regions, **record["params"])
    torch.testing.assert_close(found, torch.tensor(record["value"]), **f32(NETWORK))


def test_every_official_record_is_used():
    assert {*CALLS, "gloria_attention"} == set(RECORDS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_is_a_picture_in_which_words_beyond_the_length_take_no_part():
    words, regions, lengths = draw(3, 6, 5), draw(3, 6, 2, 4, seed=1), torch.tensor([5, 1, 3])
    weights = losses.region_attention(words, regions, attention_scale=3.0, lengths=lengths)
    assert weights.shape == (3, 5, 2, 4)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(3, 5, dtype=torch.float64))
    for i, length in enumerate(lengths.tolist()):
        alone = losses.region_attention(words[i : i + 1, :, :length], regions[i : i + 1], attention_scale=3.0)
        torch.testing.assert_close(weights[i : i + 1, :length], alone)
        torch.testing.assert_close(weights[i, length:], torch.full((5 - length, 2, 4), 1 / 8, dtype=torch.float64))


def local_by_loops(regions, words, lengths, groups=None):
    count = len(words)
    scores = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            text = words[j : j + 1, :, : lengths[j]]
            attended = losses.attend_regions(text, regions[i : i + 1], attention_scale=4.0)
            cosines = F.cosine_similarity(text, attended, dim=1)[0]
            scores[i, j] = 10 * (5 * cosines).exp().sum().log()
    if groups is not None:
        for i in range(count):
            for j in range(count):
                if i != j and groups[i] == groups[j] >= 0:
                    scores[i, j] = -torch.inf
    match = torch.arange(count)
    return F.cross_entropy(scores, match) + F.cross_entropy(scores.T, match)


LENGTHS, GROUPS = torch.tensor([5, 2, 1, 4, 3]), torch.tensor([1, -1, 1, -1, 0])


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("chunk", [None, 1])
def test_local_loss_equals_its_loops_in_chunks_and_whole(groups, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(local_image_text, "_CHUNK", chunk)  # one image at a time, computed again in backward
    regions, words = draw(5, 6, 2, 3).requires_grad_(), draw(5, 6, 5, seed=1).requires_grad_()
    loss = losses.gloria_local_loss(regions, words, LENGTHS, groups=groups)
    expected = local_by_loops(regions, words, LENGTHS, groups)
    torch.testing.assert_close(loss, expected, **f64(CANCELLING))
    found, exact = (torch.autograd.grad(value, (regions, words)) for value in (loss, expected))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, **f64(CANCELLING))


def test_values_at_equal_scores():
    same = torch.ones(4, 3)
    assert float(losses.gloria_global_loss(same, same)) == near(2 * math.log(4))
    words, lengths = torch.ones(4, 3, 2), torch.tensor([2, 2, 2, 2])
    assert float(losses.gloria_local_loss(torch.ones(4, 3, 2, 2), words, lengths)) == near(2 * math.log(4))
    maps = torch.ones(2, 3, 4, 5)
    assert float(losses.cpc_loss(maps, maps, offset=1)) == near(math.log(2 * 4 * 5))
    index = losses.draw_row_negatives(maps, steps=2, negatives=7)
    loss = losses.cpc_sampled_loss(maps, maps, torch.ones(2, 3, 3), index, negatives=7)
    assert float(loss) == near(math.log(8), NETWORK)  # with 1e-11 in the logarithm
    times = torch.ones(2, 5, 3)
    negatives = losses.draw_time_negatives(times, steps=2, negatives=7)
    assert float(losses.cpc_time_loss(times, times, torch.ones(2, 3, 3), *negatives)) == near(math.log(8))
    assert float(losses.cpc_all_times_loss(times, times, torch.ones(2, 3, 3))) == near(math.log(2 * 5))


def test_all_times_are_told_apart_by_a_softmax():
    context, z, predictors = draw(3, 5, 2), draw(3, 5, 4, seed=1), draw(2, 4, 2, seed=2)
    losses_of_steps = []
    for k in (1, 2):
        each = []
        for b in range(3):
            for t in range(5 - k):
                logits = z.flatten(0, 1) @ (predictors[k - 1] @ context[b, t]) / 4  # the mean over 4 channels
                each.append(logits.logsumexp(0) - logits[5 * b + t + k])
        losses_of_steps.append(torch.stack(each).mean())
    found = losses.cpc_all_times_loss(context, z, predictors)
    torch.testing.assert_close(found, torch.stack(losses_of_steps).mean(), **f64(CANCELLING))


def run(kind, rows, ragged=False):
    """Return a loss and its gradients for all pairs, of which a rank has some; 5 pairs in all."""
    if kind == "gloria":
        regions, words = draw(5, 6, 2, 3).requires_grad_(), draw(5, 6, 5, seed=1).requires_grad_()
        leaves, own = (regions, words), words[rows]
        if ragged:  # a rank's batch is as long as its longest text
            own = own[:, :, : int(LENGTHS[rows].max())]
        loss = losses.gloria_local_loss(regions[rows], own, LENGTHS[rows], groups=GROUPS[rows])
    elif kind == "cpc_all_times":
        leaves = draw(5, 4, 3).requires_grad_(), draw(5, 4, 6, seed=1).requires_grad_()
        loss = losses.cpc_all_times_loss(*(leaf[rows] for leaf in leaves), draw(2, 6, 3, seed=2))
    else:
        leaves = draw(5, 6, 4, 3).requires_grad_(), draw(5, 6, 4, 3, seed=1).requires_grad_()
        loss = losses.cpc_loss(*(leaf[rows] for leaf in leaves), offset=2, scale=1.0)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def of_rank(rank, kind):
    loss, gradients = run(kind, slice(0, 3) if rank == 0 else slice(3, 5), ragged=True)
    for gradient in gradients:  # what DDP does
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return loss, gradients


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["gloria", "cpc", "cpc_all_times"])
def test_two_unequal_ranks_equal_one(kind):
    loss, gradients = run(kind, slice(0, 5))
    for found, of_ranks in run_processes(of_rank, 2, kind):
        torch.testing.assert_close(found, loss, **f64(CANCELLING))
        for a, b in zip(of_ranks, gradients, strict=True):
            torch.testing.assert_close(a, b, **f64(CANCELLING))


def test_drawn_negatives_lie_in_their_pools():
    maps = torch.zeros(2, 3, 6, 4)
    index = losses.draw_row_negatives(maps, steps=3, negatives=50, skip=1, generator=torch.Generator().manual_seed(0))
    assert index.shape == (3, 4 * 4 * 2 * 50)
    for row, pool in zip(index, (32, 24, 16), strict=True):
        assert {*row[: pool * 50].tolist()} == set(range(pool))
        assert not row[pool * 50 :].any()
    chosen, time = losses.draw_time_negatives(torch.zeros(3, 7, 2), steps=2, negatives=90)
    assert chosen.shape == time.shape == (3, 90, 5)
    assert {*chosen.flatten().tolist()} == {0, 1, 2}
    assert {*time.flatten().tolist()} == set(range(1, 7))


WORDS, REGIONS, MAPS, TIMES = torch.ones(2, 3, 4), torch.ones(2, 3, 2, 2), torch.ones(2, 3, 4, 4), torch.ones(2, 5, 3)
INDEX = torch.zeros(1, 80, dtype=torch.int64)
BAD = {
    "length above": (lambda: losses.gloria_local_loss(REGIONS, WORDS, torch.tensor([5, 1])), r"lie in 1\.\.4"),
    "no words": (lambda: losses.gloria_local_loss(REGIONS, WORDS, torch.tensor([0, 1])), r"lie in 1\.\.4"),
    "one pair": (lambda: losses.gloria_local_loss(REGIONS[:1], WORDS[:1], torch.tensor([1])), "batch of at least 2"),
    "width": (lambda: losses.gloria_local_loss(REGIONS[:, :2], WORDS, torch.tensor([1, 1])), r"shape \(2, 3, H, W\)"),
    "lengths": (
        lambda: losses.gloria_local_loss(REGIONS, WORDS, torch.tensor([1])),
        r"`lengths` must have shape \(2,\)",
    ),
    "scale": (lambda: losses.attend_regions(WORDS, REGIONS, attention_scale=0.0), "`attention_scale` must be > 0"),
    "flat words": (lambda: losses.attend_regions(WORDS[0], REGIONS), r"`words` must have shape \(B, D, T\)"),
    "offset": (lambda: losses.cpc_loss(MAPS, MAPS, offset=4), "`offset` must be < 4"),
    "no offset": (lambda: losses.cpc_loss(MAPS, MAPS, offset=0), "`offset` must be >= 1"),
    "steps": (
        lambda: losses.cpc_sampled_loss(MAPS, MAPS, torch.ones(3, 3, 3), INDEX, negatives=1),
        r"`predictors` must be 1 to 2 matrices, got 3",
    ),
    "few negatives": (
        lambda: losses.cpc_sampled_loss(MAPS, MAPS, torch.ones(1, 3, 3), INDEX[:, :15], negatives=1),
        r"`negative_index` must be \(1, >= 16\)",
    ),
    "wide predictors": (
        lambda: losses.cpc_sampled_loss(MAPS, MAPS, torch.ones(1, 3, 2), INDEX, negatives=1),
        r"`predictors` must be \(K, 3, 3\)",
    ),
    "clip too short": (
        lambda: losses.cpc_time_loss(TIMES, TIMES, torch.ones(5, 3, 3), *2 * (torch.zeros(2, 1, 0).long(),)),
        "`predictors` must be 1 to 4 matrices, got 5",
    ),
    "all times": (
        lambda: losses.cpc_all_times_loss(TIMES, TIMES, torch.ones(5, 3, 3)),
        "`predictors` must be 1 to 4 matrices, got 5",
    ),
    "window": (
        lambda: losses.cpc_time_loss(TIMES, TIMES, torch.ones(2, 3, 3), *2 * (torch.zeros(2, 1, 4).long(),)),
        r"`negative_batch` must have shape \(2, N, 3\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_indices_must_be_integers():
    with pytest.raises(TypeError, match="`negative_index` must be an integer tensor"):
        losses.cpc_sampled_loss(MAPS, MAPS, torch.ones(1, 3, 3), INDEX.float(), negatives=1)
    with pytest.raises(TypeError, match="`lengths` must be an integer tensor"):
        losses.gloria_local_loss(REGIONS, WORDS, torch.ones(2))

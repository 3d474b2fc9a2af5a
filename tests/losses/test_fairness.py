"""Losses against a protected attribute: official values, formulas in loops, and what is refused."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import losses, nn
from tests.launch import run_processes
from tests.tolerances import CANCELLING, FORMULA, NETWORK, assert_same_bits, f32, f64, near, near64

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parent / "official_fairness.json").read_text(encoding="utf-8"))
}


def _call(name: str) -> tuple[Tensor, Tensor]:
    record = RECORDS[name]
    x = {key: torch.tensor(value) for key, value in record["inputs"].items()}
    features = x["features"].requires_grad_()
    labels = None if name == "fair_supcon_unlabelled" else x["labels"].long()
    options = {"group_norm": True} if name == "fair_supcon_group_norm" else {}
    return losses.fair_supcon_loss(features, labels, x["groups"].long(), **record["params"], **options), features


@pytest.mark.parametrize("name", ["fair_supcon", "fair_supcon_group_norm", "fair_supcon_unlabelled"])
def test_fair_supcon_equals_the_reference_implementation(name: str) -> None:
    loss, features = _call(name)
    loss.backward()
    assert float(loss.detach()) == near(RECORDS[name]["loss"])
    assert features.grad is not None
    assert float(features.grad.norm()) == near(RECORDS[name]["grad_norm"]["features"], NETWORK)


def _unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def _fscl(z: Tensor, labels: list[int] | None, groups: list[int], t: float, group_norm: bool) -> float:
    """Return FSCL in loops."""
    images, views, _ = z.shape
    rows = list(itertools.product(range(images), range(views)))
    total = 0.0
    for i, v in rows:
        dot = {(j, w): float(z[i, v] @ z[j, w]) / t for j, w in rows}
        others = [key for key in rows if key != (i, v)]
        alike = lambda j, k: labels is not None and labels[j] == labels[k] and groups[j] == groups[k]  # noqa: E731
        if labels is None:
            positives = [key for key in others if key[0] == i]
            negatives = [key for key in others if groups[key[0]] == groups[i]]
        else:
            positives = [key for key in others if labels[key[0]] == labels[i]]
            negatives = [key for key in rows if labels[key[0]] != labels[i] and groups[key[0]] == groups[i]]
        lse = math.log(sum(math.exp(dot[key]) for key in negatives)) if negatives else dot[i, v]
        if not group_norm:
            total += sum(lse - dot[key] for key in positives) / len(positives)
            continue
        count = {j: sum(alike(j, k) for k, _ in rows) - 1 for j in range(images)}  # besides itself
        total += sum((lse - dot[key]) / count[key[0]] for key in positives) / (count[i] + 1) * len(rows) / 8
    return total / len(rows)


@pytest.mark.parametrize(("labeled", "group_norm"), [(True, False), (True, True), (False, False)])
def test_fair_supcon_in_loops(labeled: bool, group_norm: bool) -> None:
    z, labels, groups = _unit(5, 3, 4), [0, 1, 0, 2, 1], [0, 0, 1, 1, 1]  # three views; image 1 is alone in no class
    given = torch.tensor(labels) if labeled else None
    found = losses.fair_supcon_loss(z, given, torch.tensor(groups), temperature=0.3, group_norm=group_norm)
    assert float(found) == near64(_fscl(z, labels if labeled else None, groups, 0.3, group_norm))


def test_an_anchor_without_negatives_is_compared_with_itself() -> None:
    """Rows of one class, in two groups: the reference implementation's logarithm of 1 is the similarity to itself."""
    z, same = _unit(3, 2, 4), torch.zeros(3, dtype=torch.long)
    found = losses.fair_supcon_loss(z, same, same, temperature=0.5)
    cosines = z.flatten(0, 1) @ z.flatten(0, 1).T
    expected = 2 * (1 - (cosines.sum() - 6) / 30)
    assert float(found) == near64(float(expected))
    one = losses.fair_supcon_loss(z[:, :1], torch.arange(3), same, temperature=0.5)
    assert float(one) == 0  # no positives either


def test_unknown_classes_and_groups_are_like_no_other() -> None:
    z, labels, groups = _unit(4, 2, 4), torch.tensor([0, -1, -1, 0]), torch.tensor([0, 0, 0, -1])
    found = losses.fair_supcon_loss(z, labels, groups, temperature=0.3)
    alone = losses.fair_supcon_loss(z, torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 1]), temperature=0.3)
    assert_same_bits(found, alone)


def _hsic(z: Tensor, groups: list[int], bandwidth: float) -> float:
    """Return tr(K H L H) / (n - 1)^2 with the matrices."""
    z, n = F.normalize(z, dim=1), len(z)
    kernel = (-torch.cdist(z, z).square() / (2 * bandwidth**2)).exp()
    same = torch.tensor([[float(a == b) for b in groups] for a in groups], dtype=z.dtype)
    center = torch.eye(n, dtype=z.dtype) - 1 / n
    return float((kernel @ center @ same @ center).trace()) / (n - 1) ** 2


@pytest.mark.parametrize("bandwidth", [0.3, 1.0])
def test_hsic_with_the_matrices(bandwidth: float) -> None:
    z, groups = 3 * _unit(7, 4), [0, 2, 0, 1, 2, 2, 0]
    expected = _hsic(z, groups, bandwidth)
    assert float(losses.hsic_loss(z, torch.tensor(groups), bandwidth=bandwidth)) == near64(expected)
    more, unknown = torch.cat([z, _unit(2, 4, seed=1)]), torch.tensor([*groups, -1, -5])
    assert float(losses.hsic_loss(more, unknown, bandwidth=bandwidth)) == near64(expected)


def test_hsic_tells_dependent_features_from_others_and_its_gradient_lowers_it() -> None:
    groups = torch.arange(40) % 2
    z = torch.cat([_unit(40, 4), 2 * groups[:, None].double() - 1], dim=1)
    dependent, free = losses.hsic_loss(z, groups), losses.hsic_loss(z[:, :4], groups)
    assert float(dependent) > 5 * float(free) > 0
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    for _ in range(100):
        losses.hsic_loss(z @ weight, groups).backward()
        assert weight.grad is not None
        weight.data -= 3 * weight.grad
        weight.grad = None
    assert float(losses.hsic_loss(z @ weight, groups).detach()) < float(dependent) / 4


@pytest.mark.parametrize("groups", [[0, 0, 0], [-1, -1, -1], [-1, 4, -1]])
def test_hsic_of_one_group_is_zero(groups: list[int]) -> None:
    z = _unit(3, 4).requires_grad_()
    loss = losses.hsic_loss(z, torch.tensor(groups))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.zeros_like(loss), **f64(FORMULA))
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.zeros_like(z), **f64(FORMULA))


def test_group_dro_equals_the_reference_implementation() -> None:
    record = RECORDS["group_dro"]
    criterion = losses.GroupDRO(groups=4, step_size=record["params"]["step_size"])
    assert nn.GroupDRO is losses.GroupDRO
    for batch, expected in zip(record["inputs"]["batches"], record["value"], strict=True):
        logits, labels, groups = (torch.tensor(batch[key]) for key in ("logits", "labels", "groups"))
        loss = criterion(logits, labels.long(), groups.long())
        assert float(loss) == near(expected["loss"])
        assert criterion.group_weights.tolist() == near(expected["group_weights"], NETWORK)


def _batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    return logits, torch.randint(3, (9,), generator=generator), torch.randint(3, (9,), generator=generator)


def test_group_dro_in_loops() -> None:
    """With four groups, of which the last is never in a batch and keeps its weight before the sum is set to 1."""
    criterion, q = losses.GroupDRO(4, step_size=0.5), [0.25] * 4
    for seed in range(3):
        logits, labels, groups = _batch(seed)
        losses_of = F.cross_entropy(logits, labels, reduction="none").tolist()
        rows = {g: [loss for loss, at in zip(losses_of, groups.tolist(), strict=True) if at == g] for g in range(4)}
        means = [sum(rows[g]) / len(rows[g]) if rows[g] else 0.0 for g in range(4)]
        q = [weight * math.exp(0.5 * mean) for weight, mean in zip(q, means, strict=True)]
        q = [weight / sum(q) for weight in q]
        expected = sum(weight * mean for weight, mean in zip(q, means, strict=True))
        assert float(criterion(logits, labels, groups)) == near(expected)
    assert means[3] == 0
    before = criterion.group_weights
    criterion.eval()(*_batch())
    assert_same_bits(criterion.group_weights, before, "eval")
    again = losses.GroupDRO(4)
    again.load_state_dict(criterion.state_dict())
    assert_same_bits(again.group_weights, before, "loaded")
    assert_same_bits(again.to(torch.bfloat16).group_weights, before, "bf16-true")


def test_group_dro_leaves_unknown_images_out_and_survives_a_bad_loss() -> None:
    logits, labels, groups = _batch()
    unknown = torch.arange(9) >= 6
    one, two = losses.GroupDRO(3), losses.GroupDRO(3)
    some = one(logits, labels.masked_fill(unknown, -1), groups)
    torch.testing.assert_close(some, two(logits, labels, groups.masked_fill(unknown, -1)))
    torch.testing.assert_close(some, losses.GroupDRO(3)(logits[:6], labels[:6], groups[:6]))
    before = one.group_weights
    assert not bool(one(logits * torch.inf, labels, groups).isfinite())
    assert_same_bits(one.group_weights, before, "after infinite logits")


def test_half_precision_is_computed_in_float32() -> None:
    z, groups = _unit(6, 2, 4).to(torch.bfloat16), torch.tensor([0, 1, 1, 0, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            losses.fair_supcon_loss(z, groups.roll(1), groups, temperature=0.1),
            losses.hsic_loss(z[:, 0], groups),
            losses.GroupDRO(2)(z[:, 0], groups, groups),
        ]
    wide = z.float()
    expected = [
        losses.fair_supcon_loss(wide, groups.roll(1), groups, temperature=0.1),
        losses.hsic_loss(wide[:, 0], groups),
        losses.GroupDRO(2)(wide[:, 0], groups, groups),
    ]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, **f32(FORMULA))


@pytest.mark.dist
@pytest.mark.parametrize("sizes", [[5, 4], [7, 0, 2]])
def test_group_dro_on_ranks_equals_one_process(sizes: list[int]) -> None:
    """Weights, loss and gradient; a group is on one rank alone, and a rank may have no images."""

    def work(rank: int | None) -> Any:
        rows = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        criterion, found = losses.GroupDRO(4, step_size=0.5), []
        for seed in range(2):
            logits, labels, groups = _batch(seed)
            own = logits.requires_grad_()
            loss = criterion(own[rows], labels[rows], groups[rows])
            loss.backward()
            assert own.grad is not None
            found.append((loss.detach(), own.grad, criterion.group_weights))
        return found

    expected, ranks = work(None), run_processes(work, len(sizes))
    for step, (loss, gradient, weights) in enumerate(expected):
        for found in ranks:
            torch.testing.assert_close(found[step][0], loss, **f64(CANCELLING))
            torch.testing.assert_close(found[step][2], weights, **f32(FORMULA))
            assert_same_bits(found[step][2], ranks[0][step][2], "weights of the ranks")
        mean = torch.stack([found[step][1] for found in ranks]).mean(0)
        torch.testing.assert_close(mean, gradient, **f32(FORMULA))  # the weights are float32


Z, Y = torch.ones(4, 2, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: losses.fair_supcon_loss(Z[:, 0], Y, Y, temperature=0.1), ValueError, r"`features` must have shape"),
        (lambda: losses.fair_supcon_loss(Z[:1], Y[:1], Y[:1], temperature=0.1), ValueError, "at least 2"),
        (lambda: losses.fair_supcon_loss(Z.long(), Y, Y, temperature=0.1), TypeError, "`features`"),
        (lambda: losses.fair_supcon_loss(Z, Y[:3], Y, temperature=0.1), ValueError, "`labels`"),
        (lambda: losses.fair_supcon_loss(Z, Y, Y.float(), temperature=0.1), TypeError, "`groups`"),
        (lambda: losses.fair_supcon_loss(Z, Y, Y, temperature=0.0), ValueError, "`temperature`"),
        (lambda: losses.fair_supcon_loss(Z, None, Y, temperature=0.1, group_norm=True), ValueError, "`group_norm`"),
        (lambda: losses.hsic_loss(Z, Y), ValueError, "`features` must have shape"),
        (lambda: losses.hsic_loss(Z[:, 0], Y[:3]), ValueError, "`groups`"),
        (lambda: losses.hsic_loss(Z[:, 0], Y, bandwidth=0.0), ValueError, "`bandwidth`"),
        (lambda: losses.GroupDRO(0), ValueError, "`groups`"),
        (lambda: losses.GroupDRO(2.0), TypeError, "`groups`"),  # type: ignore[arg-type]
        (lambda: losses.GroupDRO(2, step_size=0.0), ValueError, "`step_size`"),
        (lambda: losses.GroupDRO(2)(Z[:, 0], Y, Y + 2), ValueError, "`groups` must be below 2, got 2"),
        (lambda: losses.GroupDRO(2)(Z[:, 0], Y.float(), Y), TypeError, "`labels`"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

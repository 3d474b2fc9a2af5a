"""The k-NN vote and its metric, compared with plain loops."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_contrast.metrics import KNNAccuracy, knn_predict, knn_scores, nearest_neighbours
from lightning_contrast.metrics.neighbours import top_k
from tests.launch import run_processes
from tests.tolerances import NETWORK, ROUNDED, f32, near


def sample(queries=20, bank=60, width=8, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(queries, width, generator=g),
        torch.randn(bank, width, generator=g) * torch.rand(bank, 1, generator=g),
        torch.randint(0, classes, (bank,), generator=g),
    )


def scores_by_hand(queries, bank, labels, classes, k, temperature):
    """Compute the published vote in float64, not divided by its sum."""
    rows = []
    for query in queries.double():
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in bank.double()]
        votes = defaultdict(float)
        for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            votes[int(labels[i])] += math.exp(cosines[i] / temperature)
        rows.append([votes[c] for c in range(classes)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_scores_equal_the_published_vote(k, temperature):
    queries, bank, labels = sample()
    scores = knn_scores(queries, bank, labels, num_classes=4, k=k, temperature=temperature)
    expected = scores_by_hand(queries, bank, labels, 4, k, temperature)
    torch.testing.assert_close(scores.double(), expected / expected.sum(1, keepdim=True), **f32(NETWORK, size=0.01))
    predicted = knn_predict(queries, bank, labels, num_classes=4, k=k, temperature=temperature)
    assert torch.equal(predicted, expected.argmax(1))


def test_a_low_temperature_does_not_overflow():
    queries, bank, labels = sample()
    scores = knn_scores(queries, bank, labels, num_classes=4, k=5, temperature=1e-3)
    assert scores.isfinite().all()
    nearest = nearest_neighbours(queries, bank, 1)[1].squeeze(1)
    assert torch.equal(scores.argmax(1), labels[nearest])


def test_classes_that_are_missing_from_the_bank_get_nothing():
    queries, bank, labels = sample()
    scores = knn_scores(queries, bank, labels, num_classes=9, k=10)
    assert not scores[:, 4:].any()
    torch.testing.assert_close(scores.sum(1), torch.ones(20))


def test_equal_votes_go_to_the_smallest_class():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    for labels in ([2, 1, 0], [1, 2, 0]):
        predicted = knn_predict(bank[:1], bank, torch.tensor(labels), num_classes=3, k=2)
        assert predicted.item() == 1


def test_the_result_does_not_depend_on_chunks_or_the_length_of_features():
    queries, bank, labels = sample()
    whole = knn_scores(queries, bank, labels, num_classes=4, k=7)
    for chunk_size in (1, 3, 20, 99):
        torch.testing.assert_close(knn_scores(queries, bank, labels, num_classes=4, k=7, chunk_size=chunk_size), whole)
    torch.testing.assert_close(knn_scores(queries * 1e3, bank * 1e-3, labels, num_classes=4, k=7), whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 400), st.data())
def test_the_tournament_finds_what_sorting_finds(rows, columns, data):
    k = data.draw(st.integers(1, columns))
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if data.draw(st.booleans()):
        values = values.round()  # many ties
    found, where = top_k(values, k)
    assert torch.equal(found, values.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(values.gather(1, where), found)
    assert all(len(set(row)) == k for row in where.tolist())


def test_neighbours_are_sorted_and_right():
    queries, bank, _ = sample(bank=500)
    similarities, indices = nearest_neighbours(queries, bank, 6)
    cosine = torch.nn.functional.cosine_similarity(queries.unsqueeze(1).double(), bank.unsqueeze(0).double(), dim=2)
    expected = cosine.sort(dim=1, descending=True)
    assert torch.equal(indices, expected.indices[:, :6])
    torch.testing.assert_close(similarities.double(), expected.values[:, :6], **f32(ROUNDED))


def filled(queries, labels, bank, bank_labels, **kwargs):
    metric = KNNAccuracy(4, k=5, **kwargs)
    for part, part_labels in zip(bank.split(17), bank_labels.split(17), strict=True):
        metric.update_bank(part, part_labels)
    for part, part_labels in zip(queries.split(6), labels.split(6), strict=True):
        metric.update(part, part_labels)
    return metric


def case():
    queries, bank, bank_labels = sample()
    labels = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(7))
    right = scores_by_hand(queries, bank, bank_labels, 4, 5, 0.07).argmax(1) == labels
    return queries, labels, bank, bank_labels, right.float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_metric_equals_the_vote_by_hand(dtype):
    *data, expected = case()
    metric = filled(*data, dtype=dtype, chunk_size=3)
    assert metric.compute().item() == near(expected)
    assert metric.bank[0].dtype == dtype
    metric.reset()
    assert metric.bank == []


def test_the_bank_may_grow_after_a_value_was_computed():
    metric = KNNAccuracy(2, k=1)
    metric.update_bank(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    metric.update(torch.tensor([[0.1, 1.0]]), torch.tensor([1]))
    assert metric.compute() == 0
    metric.update_bank(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    assert metric.compute() == 1


@pytest.mark.dist
def test_ranks_with_unequal_shares_compute_the_value_of_one_process():
    queries, labels, bank, bank_labels, expected = case()

    def on_rank(rank):
        q, b = (slice(0, 5), slice(0, 40)) if rank == 0 else (slice(5, 20), slice(40, 60))
        return filled(queries[q], labels[q], bank[b], bank_labels[b]).compute().item()

    assert run_processes(on_rank, 2) == [pytest.approx(expected)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "`k` must be >= 1"),
        ({"k": 61}, "`k` must be <= 60, the number of rows in the bank, got 61"),
        ({"temperature": 0.0}, "`temperature` must be > 0"),
        ({"num_classes": 2}, r"`labels` must lie in 0\.\.1, got \(0, 3\)"),
        ({"chunk_size": 0}, "`chunk_size` must be >= 1"),
        ({"queries": torch.ones(3)}, r"`queries` must be floating and 2-D, got '\(3,\) torch.float32'"),
        ({"bank": torch.ones(60, 8, dtype=torch.int64)}, "`bank` must be floating and 2-D"),
        ({"queries": torch.ones(3, 7)}, r"`queries` must be as wide as `bank`, got \(7, 8\)"),
        ({"labels": torch.ones(60)}, r"`labels` must be integers of shape \(60,\)"),
        ({"labels": torch.ones(59, dtype=torch.int64)}, r"`labels` must be integers of shape \(60,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    queries, bank, labels = sample()
    arguments = {"queries": queries, "bank": bank, "labels": labels, "num_classes": 4} | change
    with pytest.raises(ValueError, match=message):
        knn_scores(**arguments)


def test_the_metric_names_what_is_wrong():
    for arguments, message in (
        ({"k": 0}, "`k` must be >= 1"),
        ({"num_classes": 1}, "`num_classes` must be >= 2"),
        ({"temperature": -1.0}, "`temperature` must be > 0"),
        ({"dtype": torch.int8}, "`dtype` must be one of"),
        ({"chunk_size": 0}, "`chunk_size` must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            KNNAccuracy(**({"num_classes": 4} | arguments))
    metric = KNNAccuracy(4)
    with pytest.raises(ValueError, match=r"`labels` must lie in 0\.\.3, got \(0, 4\)"):
        metric.update(torch.ones(2, 3), torch.tensor([0, 4]))
    with (
        pytest.raises(ValueError, match="`KNNAccuracy` must have a bank and queries"),
        pytest.warns(UserWarning, match="before the ``update`` method"),
    ):
        KNNAccuracy(4).compute()


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_accuracy_of_the_first_classes_of_the_vote(top_k, distance):
    """Compare with the vote by hand; every query counts once all classes are allowed."""
    queries, bank, labels = sample()
    targets = torch.arange(len(queries)) % 4
    metric = KNNAccuracy(4, k=7, temperature=0.2, top_k=top_k, distance=distance, chunk_size=6)
    for start in range(0, len(bank), 25):
        metric.update_bank(bank[start : start + 25], labels[start : start + 25])
    metric.update(queries, targets)
    scores = scores_by_hand(queries, bank, labels, 4, 7, 0.2) if distance == "cosine" else torch.zeros(len(queries), 4)
    if distance == "euclidean":
        for row, query in enumerate(queries):
            distances = [float((query - other).norm()) for other in bank]
            for i in sorted(range(len(bank)), key=lambda i: distances[i])[:7]:
                scores[row, labels[i]] += 1 / (distances[i] + 1e-5)
    correct = [
        int(t) in row.argsort(descending=True, stable=True)[:top_k] for row, t in zip(scores, targets, strict=True)
    ]
    assert metric.compute().item() == near(sum(correct) / len(correct))
    if top_k == 4:
        assert metric.compute() == 1
    if top_k == 1:
        assert 0 < metric.compute() < 1


def test_top_k_and_distance_are_checked():
    for number in (0, 3):
        with pytest.raises(ValueError, match="`top_k` must be"):
            KNNAccuracy(2, top_k=number)
    with pytest.raises(ValueError, match="`distance` must be"):
        KNNAccuracy(2, distance="l1")
    metric = KNNAccuracy(2, k=3, distance="euclidean")
    metric.update_bank(torch.eye(2), torch.tensor([0, 1]))
    metric.update(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`k` must be <= 2"):
        metric.compute()

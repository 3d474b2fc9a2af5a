"""Recall of the counterpart against plain loops."""

import pytest
import torch

from lightning_contrast.metrics import RetrievalRecall
from tests.launch import run_processes
from tests.tolerances import near


def pairs(count=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    queries = torch.randn(count, 5, generator=g)
    return queries, queries * torch.rand(count, 1, generator=g) + 0.5 * torch.randn(count, 5, generator=g)


def recall_by_hand(queries, gallery, k):
    found = 0
    for i, query in enumerate(queries.double()):
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in gallery.double()]
        found += i in sorted(range(len(gallery)), key=lambda j: -cosines[j])[:k]
    return found / len(queries)


@pytest.mark.parametrize("k", [1, 3, 30, 99])
def test_recall_equals_plain_loops(k):
    queries, gallery = pairs()
    metric = RetrievalRecall(k)
    for part in range(0, 30, 8):
        metric.update(queries[part : part + 8], gallery[part : part + 8])
    assert metric.compute().item() == near(recall_by_hand(queries, gallery, k))


def test_chunks_do_not_matter(monkeypatch):
    monkeypatch.setattr("lightning_contrast.metrics.retrieval.CHUNK", 7)
    queries, gallery = pairs()
    metric = RetrievalRecall(2)
    metric.update(queries, gallery)
    assert metric.compute().item() == near(recall_by_hand(queries, gallery, 2))


def test_features_that_are_all_equal_score_the_chance_of_a_draw():
    metric = RetrievalRecall(3)
    metric.update(torch.ones(12, 4), torch.ones(12, 4))
    assert metric.compute().item() == near(3 / 12)


def test_both_ways_and_median_rank_equal_plain_loops():
    queries, gallery = pairs(20, seed=1)
    gallery = gallery + torch.randn(20, 5, generator=torch.Generator().manual_seed(2))
    metric = RetrievalRecall((1, 5), both_ways=True)
    metric.update(queries, gallery)
    found = metric.compute()
    for key, (one, other) in {"to_gallery": (queries, gallery), "to_queries": (gallery, queries)}.items():
        cosine = torch.nn.functional.cosine_similarity(one[:, None].double(), other[None].double(), dim=2)
        ranks = sorted(1 + sum(float(c) > float(row[i]) for c in row) for i, row in enumerate(cosine))
        assert found[f"{key}/median_rank"].item() == (ranks[9] + ranks[10]) / 2
        for k in (1, 5):
            assert found[f"{key}/recall@{k}"].item() == near(recall_by_hand(one, other, k))
    assert found["to_gallery/recall@5"] != found["to_queries/recall@5"]  # the directions differ on these pairs
    one_way = RetrievalRecall((1, 5))
    one_way.update(queries, gallery)
    assert one_way.compute() == {key: found[f"to_gallery/{key}"] for key in ("recall@1", "recall@5", "median_rank")}


def test_ties_have_their_mean_rank():
    metric = RetrievalRecall((1,))
    metric.update(torch.ones(12, 4), torch.ones(12, 4))
    assert metric.compute()["median_rank"].item() == 6.5


@pytest.mark.dist
def test_two_ranks_search_one_gallery():
    queries, gallery = pairs()

    def on_rank(rank):
        rows = slice(0, 11) if rank == 0 else slice(11, 30)
        metric = RetrievalRecall(1)
        metric.update(queries[rows], gallery[rows])
        return metric.compute().item()

    assert run_processes(on_rank, 2) == [pytest.approx(recall_by_hand(queries, gallery, 1))] * 2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`k` must be >= 1"):
        RetrievalRecall(0)
    with pytest.raises(ValueError, match="`k` must hold different numbers"):
        RetrievalRecall((1, 1))
    with pytest.raises(ValueError, match="`queries` and `gallery` must have the same 2-D shape"):
        RetrievalRecall().update(torch.ones(3, 2), torch.ones(4, 2))
    with (
        pytest.raises(ValueError, match="`RetrievalRecall` must have pairs"),
        pytest.warns(UserWarning, match="before the ``update`` method"),
    ):
        RetrievalRecall().compute()

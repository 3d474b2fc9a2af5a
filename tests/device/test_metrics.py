"""Every metric on the pretended device: an update reads only what is documented; ``compute`` equals the CPU's."""

import pytest
import torch

from lightning_contrast import metrics
from tests.device.documented import METRICS
from tests.device.pretended import PretendedDevice, in_own_process

# The metric, and how it is fed two batches of features (8, 12) and labels (8,).
UPDATES = {
    "Alignment": (metrics.Alignment, lambda m, a, b, y: m.update(a, b)),
    "AlphaReQ": (lambda: metrics.AlphaReQ((1, 4)), lambda m, a, b, y: m.update(a)),
    "AlphaReQ sums": (lambda: metrics.AlphaReQ((1, 4), num_features=12), lambda m, a, b, y: m.update(a)),
    "CKA": (metrics.CKA, lambda m, a, b, y: m.update(a, b)),
    "EffectiveRank": (metrics.EffectiveRank, lambda m, a, b, y: m.update(a)),
    "EffectiveRank sums": (lambda: metrics.EffectiveRank(True, num_features=12), lambda m, a, b, y: m.update(a)),
    "GroupAccuracy": (lambda: metrics.GroupAccuracy(3), lambda m, a, b, y: m.update(y.flip(0), y, y)),
    "KNNAccuracy": (lambda: metrics.KNNAccuracy(3, k=3), lambda m, a, b, y: (m.update_bank(a, y), m.update(b, y))),
    "LiDAR": (metrics.LiDAR, lambda m, a, b, y: m.update([a, b])),
    "LiDAR sums": (lambda: metrics.LiDAR(num_features=12), lambda m, a, b, y: m.update([a, b])),
    "LiDAR groups": (metrics.LiDAR, lambda m, a, b, y: m.update(a, y)),
    "RankMe": (metrics.RankMe, lambda m, a, b, y: m.update(a)),
    "RankMe sums": (lambda: metrics.RankMe(num_features=12), lambda m, a, b, y: m.update(a)),
    "RetrievalRecall": (metrics.RetrievalRecall, lambda m, a, b, y: m.update(a, b)),
    "Uniformity": (metrics.Uniformity, lambda m, a, b, y: m.update(a)),
}
FUNCTIONS = {
    "alpha_req": lambda a, b, y: metrics.alpha_req(a, fit_range=(1, 4)),
    "association": lambda a, b, y: metrics.association(a, b, b.flip(1)),
    "association_test": lambda a, b, y: metrics.association_test(a, b, b.flip(1), a.flip(1), permutations=9).effect,
    "cka": lambda a, b, y: metrics.cka(a, b),
    "effective_rank": lambda a, b, y: metrics.effective_rank(a, center=True),
    "knn_predict": lambda a, b, y: metrics.knn_predict(a, b, y, num_classes=3, k=3),
    "knn_scores": lambda a, b, y: metrics.knn_scores(a, b, y, num_classes=3, k=3, chunk_size=3),
    "lidar": lambda a, b, y: metrics.lidar([a, b]),
    "nearest_neighbours": lambda a, b, y: metrics.nearest_neighbours(a, b, 3)[1],
    "neighbour_vote": lambda a, b, y: metrics.neighbour_vote(a, b.view(8, 1, 12), a.view(8, 1, 12), temperature=0.1),
    "participation_ratio": lambda a, b, y: metrics.participation_ratio(a),
    "rankme": lambda a, b, y: metrics.rankme(a),
    "wilson_interval": lambda a, b, y: metrics.wilson_interval(y, y + 1)[0],
}
WITHOUT_READS = ("cka", "knn_predict", "knn_scores", "nearest_neighbours", "neighbour_vote")


def test_every_metric_is_called():
    assert {name.split()[0] for name in UPDATES | FUNCTIONS} == set(metrics.__all__) - {"AssociationTest"}


def _batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        yield torch.randn(8, 12, generator=generator), torch.randn(8, 12, generator=generator), torch.arange(8) % 3


def _host(result):
    """Return tensors, or a dict of them, on the host."""
    return {key: value.host for key, value in result.items()} if isinstance(result, dict) else result.host


@pytest.mark.parametrize("name", UPDATES)
@in_own_process
def test_an_update_reads_nothing(name):
    make, update = UPDATES[name]
    ours, theirs = make(), make()
    with PretendedDevice(METRICS) as pretended:
        ours.to(pretended.device)
        for batch in _batches():
            update(ours, *(tensor.to(pretended.device) for tensor in batch))
        reads = list(pretended.faults)
        result = ours.compute()
        assert not [fault for fault in pretended.faults if "of the host" in fault], pretended.faults
        pretended.faults.clear()
    for batch in _batches():
        update(theirs, *batch)
    torch.testing.assert_close(_host(result), theirs.compute(), check_dtype=False)
    assert not reads, reads


@pytest.mark.parametrize("name", FUNCTIONS)
@in_own_process
def test_a_function_mixes_nothing_and_some_read_nothing(name):
    batch = next(_batches())
    with PretendedDevice(METRICS) as pretended:
        result = FUNCTIONS[name](*(tensor.to(pretended.device) for tensor in batch))
        faults = list(pretended.faults)
        pretended.faults.clear()
    torch.testing.assert_close(result.host, FUNCTIONS[name](*batch))
    assert not [fault for fault in faults if "of the host" in fault], pretended.faults
    if name in WITHOUT_READS:
        assert not faults, faults

"""TCLR's losses: values of the reference implementation, plain loops, and inputs that are refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_contrast import losses
from tests.tolerances import CANCELLING, NETWORK, f64, near

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parent / "official_temporal.json").read_text(encoding="utf-8"))
}
LOSSES = {
    "tclr_instance_sparse": lambda view_a, view_b, temperature: losses.nt_xent(view_a, view_b, temperature=temperature),
    "tclr_instance_dense": losses.tclr_instance_loss,
    "tclr_local_local": losses.tclr_local_loss,
    "tclr_global_local": losses.tclr_global_local_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_reference_implementation(name: str) -> None:
    record = RECORDS[name]
    inputs = {key: torch.tensor(value).requires_grad_() for key, value in record["inputs"].items()}
    loss = LOSSES[name](**inputs, **record["params"])
    loss.backward()
    assert float(loss.detach()) == near(record["loss"])
    for key, norm in record["grad_norm"].items():
        assert float(inputs[key].grad.norm()) == near(norm, NETWORK), key


def test_every_record_is_used() -> None:
    assert set(LOSSES) == set(RECORDS)


def _rows(*shape: int, seed: int = 0) -> Tensor:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1)


def _cross_entropy(anchor: Tensor, positive: Tensor, others: list[Tensor], t: float) -> Tensor:
    logits = torch.stack([anchor @ other / t for other in [positive, *others]])
    return logits.logsumexp(0) - logits[0]


def test_instance_loss_in_loops() -> None:
    z, t, total = _rows(2, 3, 4, 5), 0.2, 0.0
    clips = [(a, j) for a in range(2) for j in range(3)]
    for one in clips:
        for two in clips:
            for i in range(4 if one != two else 0):
                for own, other in ((one, two), (two, one)):  # both directions of the pair's NT-Xent
                    rest = [z[(*c, k)] for c in (own, other) for k in range(4) if k != i]
                    total += _cross_entropy(z[(*own, i)], z[(*other, i)], rest, t) / 8
    assert float(losses.tclr_instance_loss(3 * z, temperature=t)) == near(float(total / 3))


def test_local_and_global_local_loss_in_loops() -> None:
    z, steps, t, local, both = _rows(2, 3, 4, 5), _rows(2, 3, 4, 5, seed=1), 0.2, 0.0, 0.0
    for b in range(4):
        for a in range(2):
            for j in range(3):
                rest = [z[x, k, b] for x in range(2) for k in range(3) if k != j]
                local += _cross_entropy(z[a, j, b], z[1 - a, j, b], rest, t) / 6
                for c in range(2):
                    others = [k for k in range(3) if k != j]
                    both += _cross_entropy(steps[a, j, b], z[c, j, b], [z[c, k, b] for k in others], t) / 8
                    both += _cross_entropy(z[c, j, b], steps[a, j, b], [steps[a, k, b] for k in others], t) / 8
    assert float(losses.tclr_local_loss(z, temperature=t)) == near(float(local))
    assert float(losses.tclr_global_local_loss(steps, z, temperature=t)) == near(float(both))


def test_one_video_has_only_negatives_in_time() -> None:
    z = _rows(2, 3, 1, 5)
    assert float(losses.tclr_instance_loss(z, temperature=0.1)) == 0
    torch.testing.assert_close(
        losses.tclr_local_loss(z.repeat(1, 1, 3, 1), temperature=0.1),
        3 * losses.tclr_local_loss(z, temperature=0.1),
        **f64(CANCELLING),
    )


@pytest.mark.parametrize("loss", [losses.tclr_instance_loss, losses.tclr_local_loss])
def test_shapes_and_temperature_are_checked(loss) -> None:
    with pytest.raises(ValueError, match=r"`dense` must have the shape \(2 augmentations, J clips"):
        loss(_rows(2, 1, 4, 5), temperature=0.1)
    with pytest.raises(ValueError, match="`dense` must have the shape"):
        loss(_rows(3, 2, 4, 5), temperature=0.1)
    with pytest.raises(ValueError, match="`temperature`"):
        loss(_rows(2, 2, 4, 5), temperature=0.0)
    with pytest.raises(TypeError, match="dense"):
        loss(_rows(2, 2, 4, 5).long(), temperature=0.1)


def test_steps_must_be_as_many_as_local_clips() -> None:
    with pytest.raises(ValueError, match="`dense` must have the shape of `sparse_steps`"):
        losses.tclr_global_local_loss(_rows(2, 2, 4, 5), _rows(2, 3, 4, 5), temperature=0.1)

"""Losses of a frozen teacher: official values, masks of queues that are not full, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_contrast import losses
from lightning_contrast.nn import MemoryBank
from tests.tolerances import FORMULA, NETWORK, f32, f64, near, near64

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parent / "official_distillation.json").read_text(encoding="utf-8"))
}


def _crd_inputs(x: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = {
        name: F.normalize(x[name] @ x[f"{name}_weight"].T + x[f"{name}_bias"], dim=1) for name in ("student", "teacher")
    }
    places = {name: x[name].long() for name in ("indices", "negative_indices")}
    return rows | places | {name: x[name] for name in ("student_memory", "teacher_memory")}


def _crd(x: dict[str, Tensor], p: dict[str, Any]) -> Tensor:
    return losses.crd_loss(**_crd_inputs(x), temperature=p["temperature"], samples=p["samples"])


LOSSES: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Tensor]] = {
    "seed": lambda x, p: losses.seed_loss(**x, **p),
    "seed_code_temperature": lambda x, p: losses.seed_loss(**x, **p),
    "seed_soft_teacher": lambda x, p: losses.seed_loss(**x, **p),
    "crd": _crd,
    "crd_soft": _crd,
    "compress_two_queues": lambda x, p: losses.compress_loss(**x, **p),
    "compress_one_queue": lambda x, p: losses.compress_loss(x["student"], x["teacher"], x["queue"], x["queue"], **p),
    "simreg": lambda x, p: losses.simreg_loss(**x),
    "disco": lambda x, p: losses.disco_loss(**x),
    "kd_kl": lambda x, p: losses.kd_loss(**x, **p),
    "fitnet_hint": lambda x, p: losses.hint_loss(**x),
    "rkd": lambda x, p: losses.rkd_loss(**x, **p),
}


def test_every_record_is_used() -> None:
    assert set(LOSSES) == set(RECORDS)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_reference_implementation(name: str) -> None:
    record = RECORDS[name]
    inputs = {key: torch.tensor(value) for key, value in record["inputs"].items()}
    for key in record["grad_norm"]:
        inputs[key].requires_grad_()
    loss = LOSSES[name](inputs, record["params"])
    loss.backward()
    assert float(loss.detach()) == near(record["loss"])
    for key, norm in record["grad_norm"].items():
        assert float(inputs[key].grad.norm()) == near(norm, NETWORK), key


@pytest.mark.parametrize("name", ["crd", "crd_soft"])
def test_constants_and_memories_of_crd_equal_those_of_the_reference_implementation(name: str) -> None:
    record = RECORDS[name]
    x, p = _crd_inputs({key: torch.tensor(value) for key, value in record["inputs"].items()}), record["params"]
    found = losses.crd_normalizers(**x, temperature=p["temperature"], samples=p["samples"])
    expected = [record["student_normaliser"], record["teacher_normaliser"]]
    assert [float(z) for z in found] == near(expected, NETWORK)
    given = losses.crd_loss(**x, temperature=p["temperature"], samples=p["samples"], normalisers=found)
    assert float(given) == near(record["loss"])
    for role in ("student", "teacher"):
        bank = MemoryBank(p["samples"], 8, p["memory_momentum"])
        bank.features.copy_(x[f"{role}_memory"])
        bank.push(x[role], x["indices"])
        rows = bank.features[x["indices"]]
        torch.testing.assert_close(rows, torch.tensor(record[f"{role}_memory_after"]), **f32(FORMULA, size=1.0))


def _rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_seed_in_loops() -> None:
    s, t, queue = _rows(3, 4), _rows(3, 4, seed=1), _rows(5, 4, seed=2)
    cosine = lambda a, b: float(F.cosine_similarity(a, b, dim=0))  # noqa: E731
    total = 0.0
    for a, b in zip(s, t, strict=True):
        columns = [b, *queue]
        target = torch.tensor([cosine(b, c) / 0.05 for c in columns]).double().softmax(0)
        logits = [cosine(a, c) / 0.2 for c in columns]
        lse = math.log(sum(math.exp(x) for x in logits))
        total -= sum(float(p) * (x - lse) for p, x in zip(target, logits, strict=True))
    found = losses.seed_loss(s, t, queue, student_temperature=0.2, teacher_temperature=0.05)
    assert float(found) == pytest.approx(total / 3, rel=1e-3)


MASKED = {
    "seed": lambda s, t, a, b, **m: losses.seed_loss(s, t, b, student_temperature=0.2, teacher_temperature=0.1, **m),
    "compress": lambda s, t, a, b, **m: losses.compress_loss(s, t, a, b, temperature=0.1, **m),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_rows_do_not_count(name: str) -> None:
    loss = MASKED[name]
    s, t, a, b = (_rows(n, 4, seed=i) for i, n in enumerate((3, 3, 6, 6)))
    mask = torch.tensor([True, False, True, True, False, True])
    some = loss(s, t, a, b, queue_mask=mask)
    torch.testing.assert_close(some, loss(s, t, a[mask], b[mask]), **f64(FORMULA))
    assert not torch.equal(some, loss(s, t, a, b))
    s.requires_grad_()
    none = loss(s, t, a, b, queue_mask=torch.zeros(6, dtype=torch.bool))
    none.backward()
    assert float(none.detach()) == 0
    assert bool((s.grad == 0).all())


def test_only_the_student_gets_gradient_and_both_of_crd() -> None:
    s, t, queue = (_rows(4, 3, seed=i).requires_grad_() for i in range(3))
    for loss in (
        losses.seed_loss(s, t, queue, student_temperature=0.2, teacher_temperature=0.1),
        losses.compress_loss(s, t, queue, queue, temperature=0.1),
        losses.simreg_loss(s, t),
        losses.disco_loss(s, s, t, t),
        losses.kd_loss(s, t, temperature=4.0),
        losses.hint_loss(s, t),
        losses.rkd_loss(s, t, distance_weight=1.0, angle_weight=1.0),
    ):
        loss.backward()
        assert s.grad is not None
        s.grad = None
        assert t.grad is None
        assert queue.grad is None
    index = torch.arange(4)
    losses.crd_loss(s, t, queue, queue, index, index.roll(1)[:, None], temperature=0.5, samples=4).backward()
    assert s.grad is not None
    assert t.grad is not None
    assert queue.grad is None


def test_rkd_of_scaled_and_turned_features_is_zero() -> None:
    x = _rows(5, 3)
    turn = torch.linalg.qr(_rows(3, 3, seed=1)).Q
    settings = {"distance_weight": 25.0, "angle_weight": 50.0}
    assert float(losses.rkd_loss(7 * x @ turn + 2, x, **settings)) == near64(0.0, size=100.0)
    assert float(losses.rkd_loss(x.square(), x, **settings)) > 0.1


def test_equal_images_give_finite_gradients_of_rkd() -> None:
    x = _rows(1, 3).expand(4, 3).clone().requires_grad_()
    losses.rkd_loss(x, _rows(4, 3), distance_weight=1.0, angle_weight=1.0).backward()
    assert bool(x.grad.isfinite().all())


A, W, Q = torch.randn(4, 3), torch.randn(4, 2), torch.randn(6, 3)
INDEX, J = torch.arange(4), torch.arange(8).reshape(4, 2) % 6
SEED = {"student_temperature": 0.2, "teacher_temperature": 0.01}
CRD = {"temperature": 0.1, "samples": 6}
VALUE_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "a teacher of another width": (lambda: losses.seed_loss(A, W, Q, **SEED), "`student` and `teacher` must have the"),
    "a narrower queue": (lambda: losses.seed_loss(A, A, Q[:, :2], **SEED), r"`queue` must have shape \(rows, 3\)"),
    "student temperature": (lambda: losses.seed_loss(A, A, Q, **SEED | {"student_temperature": 0.0}), "`student_temp"),
    "teacher temperature": (lambda: losses.seed_loss(A, A, Q, **SEED | {"teacher_temperature": -1}), "`teacher_temp"),
    "mask": (lambda: losses.seed_loss(A, A, Q, **SEED, queue_mask=torch.ones(6)), r"`queue_mask` must be bool \(6,\)"),
    "anchors": (
        lambda: losses.compress_loss(A, W, Q, Q[:4, :2], temperature=1.0),
        "`student_queue` must have the rows",
    ),
    "anchor width": (lambda: losses.compress_loss(A, W, Q, Q, temperature=1.0), "`teacher_queue` must have shape"),
    "rows": (lambda: losses.compress_loss(A, W[:3], Q, Q, temperature=1.0), "`student` must have one row for each"),
    "temperature": (lambda: losses.compress_loss(A, A, Q, Q, temperature=0.0), "`temperature` must be > 0"),
    "memories": (
        lambda: losses.crd_loss(A, A, Q, Q[:5], INDEX, J, **CRD),
        "`student_memory` and `teacher_memory`",
    ),
    "indices": (lambda: losses.crd_loss(A, A, Q, Q, INDEX[:3], J, **CRD), r"`indices` must have shape \(4,\)"),
    "negatives": (
        lambda: losses.crd_loss(A, A, Q, Q, INDEX, J[:3], **CRD),
        "`negative_indices` must have",
    ),
    "samples": (lambda: losses.crd_loss(A, A, Q, Q, INDEX, J, **CRD | {"samples": 0}), "`samples` must be >= 1"),
    "simreg": (lambda: losses.simreg_loss(A, W), "`prediction` and `target` must have the same"),
    "kd": (lambda: losses.kd_loss(A, A, temperature=0.0), "`temperature` must be > 0"),
    "hint": (lambda: losses.hint_loss(A, W), "`student` and `teacher` must have the same"),
    "rkd": (lambda: losses.rkd_loss(A, W, distance_weight=-1.0, angle_weight=1.0), "`distance_weight` must be >= 0"),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_bad_values_are_refused(name: str) -> None:
    call, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a floating point tensor"):
        losses.hint_loss(A.long(), A.long())
    with pytest.raises(TypeError, match="`indices` must be an integer tensor"):
        losses.crd_loss(A, A, Q, Q, INDEX.float(), J, **CRD)

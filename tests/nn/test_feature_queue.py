"""The queue, against a Python list that keeps the newest rows."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_contrast.nn import FeatureQueue
from lightning_contrast.testing import HostSyncs
from tests.tolerances import NETWORK, bound, near


def ring(size, pushes):
    """Return rows of a ring buffer in plain Python: None where nothing was written."""
    rows, position = [None] * size, 0
    for push in pushes:
        for row in push:
            rows[position] = row
            position = (position + 1) % size
    return rows


@given(
    size=st.integers(1, 13), counts=st.lists(st.integers(0, 13), max_size=8), labels=st.booleans()
)  # batches that do and do not divide the size
def test_it_equals_a_ring_buffer_in_plain_python(size, counts, labels):
    queue = FeatureQueue(size, 3, labels=labels)
    pushes = [torch.randn(min(count, size), 3) for count in counts]
    numbers = [torch.randint(0, 9, (len(push),)) for push in pushes]
    for push, own in zip(pushes, numbers, strict=True):
        queue.push(push, own if labels else None)
    expected = ring(size, pushes)
    assert queue.mask.tolist() == [row is not None for row in expected]
    for row, found in zip(expected, queue.features, strict=True):
        assert torch.equal(found, torch.zeros(3) if row is None else row)
    if labels:
        assert queue.labels.tolist() == [-1 if n is None else int(n) for n in ring(size, numbers)]


def test_after_size_over_batch_pushes_no_initial_row_is_left():
    queue = FeatureQueue(12, 2)
    for step in range(3):
        assert not queue.mask.all()
        queue.push(torch.full((4, 2), step + 1.0))
    assert queue.mask.all()
    assert queue.features.min() == 1


@pytest.mark.parametrize("dtype", [torch.float32, "float32", torch.float16, "float16", torch.int8, "int8"])
def test_every_dtype_keeps_the_rows_within_its_rounding(dtype):
    queue = FeatureQueue(5, 64, dtype)
    keys = torch.randn(4, 64) * torch.tensor([[1e-3], [1.0], [30.0], [0.0]])
    queue.push(keys)
    # float16: half a unit in the last place, and its smallest number; int8: half a step of the row's own scale.
    bound = {
        torch.float32: torch.zeros(4, 1),
        torch.float16: keys.abs().amax(1, keepdim=True) * 2**-11 + 2**-25,
        torch.int8: keys.abs().amax(1, keepdim=True) / 254 * 1.001,
    }[queue.dtype]
    assert queue.features.dtype == torch.float32
    assert ((queue.features[:4] - keys).abs() <= bound).all()
    assert queue.features[4].tolist() == [0.0] * 64


def test_int8_takes_a_quarter_of_the_memory():
    def megabytes(dtype):
        queue = FeatureQueue(65_536, 128, dtype)
        return sum(b.numel() * b.element_size() for b in queue.buffers()) / 1e6

    assert megabytes("int8") == pytest.approx(8.7, abs=0.05)
    assert megabytes("float32") == pytest.approx(33.6, abs=0.05)


def test_the_effect_of_int8_on_the_loss_is_small():
    """Unit rows as in MoCo: the loss moves by less than 1e-4 nats of 4."""
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(4096, 128), dim=1)
    query = torch.nn.functional.normalize(torch.randn(256, 128), dim=1)
    positive = torch.nn.functional.normalize(query + 0.05 * torch.randn(256, 128), dim=1)

    def loss(dtype):
        queue = FeatureQueue(4096, 128, dtype)
        queue.push(keys)
        logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ queue.features.T], dim=1) / 0.2
        return torch.nn.functional.cross_entropy(logits.double(), torch.zeros(256, dtype=torch.int64)).item()

    assert abs(loss("int8") - loss("float32")) < bound(NETWORK)
    assert loss("float16") == near(loss("float32"), size=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_nothing_is_read_on_the_host(dtype):
    queue = FeatureQueue(6, 2, dtype, labels=True)
    with HostSyncs() as syncs:
        for _ in range(3):
            queue.push(torch.randn(4, 2), torch.arange(4))
            _ = queue.features, queue.mask
    assert syncs.places == []


def test_keys_that_are_not_finite_are_never_used():
    queue = FeatureQueue(4, 2)
    queue.push(torch.tensor([[1.0, 1.0], [float("nan"), 1.0], [1.0, float("inf")]]))
    assert queue.mask.tolist() == [True, False, False, False]
    assert queue.features.isfinite().all()
    queue.push(torch.ones(4, 2))
    assert queue.mask.all()


def test_casts_leave_the_numbers_alone():
    queue = FeatureQueue(3, 8)
    keys = torch.randn(3, 8)
    queue.push(keys)
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double):
        assert torch.equal(cast(queue).features, keys)
        assert queue.features.dtype == torch.float32


def test_keys_enter_without_gradient_in_any_precision():
    queue = FeatureQueue(4, 2)
    keys = torch.randn(2, 2, dtype=torch.bfloat16, requires_grad=True)
    queue.push(keys)
    assert not queue.features.requires_grad
    assert torch.equal(queue.features[:2], keys.detach().float())


def test_a_push_between_forward_and_backward_is_noticed():
    queue = FeatureQueue(4, 2)
    query = torch.randn(2, 2, requires_grad=True)
    loss = (query @ queue.features.T).sum()
    queue.push(torch.randn(2, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_and_state_go_on_where_the_queue_was(dtype, copied):
    queue = FeatureQueue(5, 2, dtype, labels=True)
    queue.push(torch.randn(4, 2), torch.arange(4))
    restored = FeatureQueue(5, 2, dtype, labels=True)
    restored.load_state_dict(queue.state_dict())
    more = torch.randn(3, 2)
    others = [copied(queue), restored]
    for each in (queue, *others):
        each.push(more, torch.arange(3))
    for other in others:
        assert torch.equal(other.features, queue.features)
        assert torch.equal(other.mask, queue.mask)
        assert torch.equal(other.labels, queue.labels)


def test_state_of_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match="the checkpoint has a float16 queue; make this one with that `dtype`"):
        FeatureQueue(5, 2).load_state_dict(FeatureQueue(5, 2, "float16").state_dict())


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: FeatureQueue(0, 2), ValueError, "`size` must be >= 1, got 0"),
        (lambda: FeatureQueue(4.0, 2), TypeError, "`size` must be a whole number"),
        (lambda: FeatureQueue(4, 0), ValueError, "`dim` must be >= 1"),
        (lambda: FeatureQueue(4, 2, torch.int32), ValueError, "`dtype` must be one of 'float32', 'float16', 'int8'"),
        (lambda: FeatureQueue(4, 2, "flaot16"), ValueError, "Did you mean 'float16'"),
        (
            lambda: FeatureQueue(4, 2).push(torch.ones(5, 2)),
            ValueError,
            "Cannot push 5 keys into a queue of size 4; raise `queue_size`.",
        ),
        (lambda: FeatureQueue(4, 2).push(torch.ones(2, 3)), ValueError, r"`keys` must be \(N, 2\), got \(2, 3\)"),
        (lambda: FeatureQueue(4, 2).push(torch.ones(2)), ValueError, r"`keys` must be \(N, 2\), got \(2,\)"),
        (lambda: FeatureQueue(4, 2, labels=True).push(torch.ones(2, 2)), ValueError, "`labels` must be given"),
        (lambda: FeatureQueue(4, 2).push(torch.ones(2, 2), torch.ones(2)), ValueError, "Leave them out"),
        (
            lambda: FeatureQueue(4, 2, labels=True).push(torch.ones(2, 2), torch.ones(3)),
            ValueError,
            r"`labels` must be \(2,\), got \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused(act, error, words):
    with pytest.raises(error, match=words):
        act()

"""The queue, against a Python list that keeps the newest rows."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_contrast import distributed
from lightning_contrast.nn import FeatureQueue
from lightning_contrast.testing import HostSyncs
from tests.launch import run_processes
from tests.tolerances import NETWORK, bound, near

DOCS = Path(__file__).parents[2] / "docs" / "negatives.md"


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


@pytest.mark.parametrize(
    "dtype", [torch.float32, "float32", torch.float16, "float16", torch.int8, "int8", torch.int4, "int4"]
)
def test_every_dtype_keeps_the_rows_within_its_rounding(dtype):
    queue = FeatureQueue(5, 64, dtype)
    keys = torch.randn(4, 64) * torch.tensor([[1e-3], [1.0], [30.0], [0.0]])
    queue.push(keys)
    # float16: half a unit in the last place, and its smallest number; int8, int4: half a step of the row's own scale.
    bound = {
        torch.float32: torch.zeros(4, 1),
        torch.float16: keys.abs().amax(1, keepdim=True) * 2**-11 + 2**-25,
        torch.int8: keys.abs().amax(1, keepdim=True) / 254 * 1.001,
        torch.int4: keys.abs().amax(1, keepdim=True) / 14 * 1.001,
    }[queue.dtype]
    assert queue.features.dtype == torch.float32
    assert ((queue.features[:4] - keys).abs() <= bound).all()
    assert queue.features[4].tolist() == [0.0] * 64


@pytest.mark.parametrize("dim", [1, 6, 7])
def test_int4_holds_every_number_of_its_range_in_half_a_byte(dim):
    queue = FeatureQueue(2, dim, "int4")
    keys = torch.tensor([[-7.0, -3, 0, 1, 4, 7, 2], [7.0, 6, 5, -1, -2, -6, -5]])[:, :dim]
    queue.push(keys)
    assert queue.bits.shape == (2, (dim + 1) // 2)
    torch.testing.assert_close(queue.features, keys)


def test_the_memory_is_that_of_the_documentation():
    def size(dtype):
        return sum(b.numel() * b.element_size() for b in FeatureQueue(65_536, 128, dtype).buffers())

    rows = {line.split("|")[1].strip(): line for line in DOCS.read_text().splitlines() if line.startswith("| `")}
    for dtype in ("float32", "float16", "int8", "int4"):
        assert f" {size(dtype):,} " in rows[f'`"{dtype}"`']


def test_the_effect_of_int8_and_int4_on_the_loss_is_small():
    """Unit rows as in MoCo: the loss moves by less than 1e-4 nats of 4, with int4 by less than 1e-2."""
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
    assert abs(loss("int4") - loss("float32")) < 1e-2
    assert loss("float16") == near(loss("float32"), size=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
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
    with pytest.raises(RuntimeError, match="the checkpoint has a int4 queue"):
        FeatureQueue(5, 2, "int8").load_state_dict(FeatureQueue(5, 2, "int4").state_dict())


def pushes():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, 3, generator=generator) for count in (1, 5, 4, 6, 3, 1)]  # all sizes modulo the ranks


def joined(dtype):
    queue = FeatureQueue(6, 3, dtype, labels=True)
    for push in pushes():
        queue.push(push, torch.arange(len(push)))
    return queue


def share(rank, dtype):
    """Push to a shard, save it, and load that into another one."""
    queue = FeatureQueue(6, 3, dtype, labels=True, sharded=True)
    assert queue.is_empty
    queue.shard()
    for push in pushes():
        queue.push(push, torch.arange(len(push)))
    again = FeatureQueue(6, 3, dtype, labels=True, sharded=True)
    again.shard()
    again.load_state_dict(queue.state_dict())
    uneven = FeatureQueue(7, 3, sharded=True)
    with pytest.raises(ValueError, match=f"`size` must be a multiple of the {distributed.world_size()} ranks, got 7"):
        uneven.shard()
    few = FeatureQueue(6, 3, sharded=True)
    few.shard()
    few.push(torch.ones(1, 3))
    few.load_state_dict(few.state_dict())
    return queue, queue.state_dict(), again, few.is_empty


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), (3, "int4")])
def test_each_rank_keeps_its_rows_and_saves_all(ranks, dtype):
    whole = joined(dtype)
    for rank, (queue, state, again, is_empty) in enumerate(run_processes(share, ranks, dtype)):
        for one in (queue, again):
            assert len(one.bits) == 6 // ranks
            assert torch.equal(one.features, whole.features[rank::ranks])
            assert torch.equal(one.mask, whole.mask[rank::ranks])
            assert torch.equal(one.labels, whole.labels[rank::ranks])
        assert not is_empty  # on no rank, although only one has a row
        assert state.keys() == whole.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(state[name], value)


def test_in_one_process_a_sharded_queue_is_whole():
    queue = FeatureQueue(5, 2, sharded=True)
    queue.shard()
    queue.push(torch.ones(5, 2))
    assert torch.equal(queue.features, torch.ones(5, 2))


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

"""Dynamic batches: sizes, order, errors, limits and the end."""

import threading
import time

import pytest

from lightning_contrast.serving.batching import Batcher, FullError


def doubled(batch):
    return [2 * item for item in batch]


def made(run=doubled, prepare=int, **options):
    return Batcher(prepare, run, **({"max_batch": 4, "max_delay": 0.05, "max_waiting": 100} | options))


def test_results_belong_to_their_items_and_batches_are_bounded():
    sizes = []
    batcher = made(on_batch=lambda size, seconds: sizes.append(size))
    futures = batcher.submit([str(item) for item in range(10)])
    assert [future.result(5) for future in futures] == [2 * item for item in range(10)]
    assert sum(sizes) == 10
    assert max(sizes) == 4
    assert batcher.close()


def test_a_batch_does_not_wait_longer_than_its_delay():
    batcher = made(max_delay=0.1)
    start = time.monotonic()
    batcher.submit(["1"])[0].result(5)
    assert time.monotonic() - start < 2
    start = time.monotonic()
    full = batcher.submit(["1"] * 4)
    assert [future.result(5) for future in full] == [2] * 4
    assert time.monotonic() - start < 0.1  # it was full
    batcher.close()


def test_an_error_of_an_item_is_its_own():
    batcher = made()
    good, bad, other = batcher.submit(["1", "x", "3"])
    assert (good.result(5), other.result(5)) == (2, 6)
    with pytest.raises(ValueError, match="invalid literal"):
        bad.result(5)
    batcher.close()


def test_an_error_of_the_model_reaches_all_and_the_next_batch_runs():
    def run(batch):
        if 0 in batch:
            raise RuntimeError("broken")
        return doubled(batch)

    batcher = made(run)
    for future in batcher.submit(["0", "1"]):
        with pytest.raises(RuntimeError, match="broken"):
            future.result(5)
    assert batcher.submit(["4"])[0].result(5) == 8
    assert batcher.at_work == 0
    batcher.close()


def test_it_is_full_at_its_limit_and_takes_all_or_none():
    free = threading.Event()
    batcher = made(lambda batch: free.wait(5) and doubled(batch), max_waiting=3)
    held = batcher.submit(["1", "2"])
    with pytest.raises(FullError, match="2 items are at work"):
        batcher.submit(["3", "4"])
    held += batcher.submit(["3"])
    free.set()
    assert [future.result(5) for future in held] == [2, 4, 6]
    assert batcher.submit(["5"])[0].result(5) == 10
    batcher.close()


def test_cancelled_items_do_not_run_and_free_their_places():
    free, ran = threading.Event(), []

    def run(batch):
        free.wait(5)
        ran.extend(batch)
        return doubled(batch)

    batcher = made(run, max_batch=1, max_waiting=3)
    first, second, third = batcher.submit(["1", "2", "3"])
    while not first.running():
        time.sleep(0.01)
    assert second.cancel()
    free.set()
    assert third.result(5) == 6
    assert ran == [1, 3]
    deadline = time.monotonic() + 5
    while batcher.at_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batcher.at_work == 0
    batcher.close()


def test_close_finishes_what_is_at_work_and_takes_no_more():
    batcher = made(lambda batch: time.sleep(0.2) or doubled(batch))
    futures = batcher.submit(["1", "2", "3"])
    assert batcher.close()
    assert [future.result(0) for future in futures] == [2, 4, 6]
    with pytest.raises(FullError, match="stopping"):
        batcher.submit(["4"])


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_waiting": 0}, {"max_delay": -1}])
def test_wrong_numbers(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        made(**wrong)

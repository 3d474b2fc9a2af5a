"""Collectives: rank order, unequal rows, gradients of one process, and the launcher itself."""

import os

import pytest
import torch
import torch.distributed as dist

from lightning_contrast import distributed
from tests.launch import ChildError, run_processes
from tests.tolerances import CANCELLING, NETWORK, f64

SIZES = {"equal": [3, 3, 3], "unequal": [2, 5, 1], "one empty": [2, 0, 3]}


def _rows(sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in sizes]


def test_one_process_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.world_size(), distributed.rank(), distributed.is_distributed()) == (1, 0, False)
    assert distributed.batch_sizes(7) == [7]
    assert distributed.gather_with_gradient(x) is x
    assert distributed.all_reduce_sum_with_gradient(x) is x
    for function in (distributed.gather, distributed.all_reduce_sum, distributed.all_reduce_mean):
        result = function(x)
        assert torch.equal(result, x)
        assert not result.requires_grad


@pytest.mark.dist
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_gather_keeps_rank_order_and_cuts_the_padding(sizes: list[int]) -> None:
    parts = _rows(sizes)

    def work(rank: int) -> tuple[torch.Tensor, list[int], torch.Tensor, bool]:
        gathered = distributed.gather(parts[rank].requires_grad_())
        mask = distributed.gather(parts[rank].detach()[:, 0] > 0)
        return gathered, distributed.batch_sizes(sizes[rank]), mask, gathered.requires_grad

    for gathered, found, mask, has_grad in run_processes(work, len(sizes)):
        assert torch.equal(gathered, torch.cat(parts))
        assert found == sizes
        assert mask.dtype == torch.bool
        assert torch.equal(mask, torch.cat(parts)[:, 0] > 0)
        assert not has_grad


@pytest.mark.dist
@pytest.mark.parametrize("sizes", [SIZES["equal"], SIZES["unequal"]], ids=["equal", "unequal"])
def test_mean_gradient_over_ranks_is_that_of_one_process(sizes: list[int]) -> None:
    parts = _rows(sizes)
    weight = torch.eye(4, dtype=torch.float64) + 0.1

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return (rows @ rows.T).logsumexp(1).mean()

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = weight.clone().requires_grad_()
        loss = loss_of(distributed.gather_with_gradient(parts[rank] @ own))
        loss.backward()
        return loss.detach(), distributed.all_reduce_mean(own.grad)

    alone = weight.clone().requires_grad_()
    expected = loss_of(torch.cat(parts) @ alone)
    expected.backward()
    for loss, grad in run_processes(work, len(sizes)):
        torch.testing.assert_close(loss, expected.detach(), **f64(NETWORK))
        torch.testing.assert_close(grad, alone.grad, **f64(CANCELLING, size=0.01))


@pytest.mark.dist
def test_reductions_and_their_gradients() -> None:
    def work(rank: int) -> dict[str, torch.Tensor]:
        x = torch.tensor([1.0, 2.0], dtype=torch.float64) * (rank + 1)
        results = {"sum": distributed.all_reduce_sum(x), "mean": distributed.all_reduce_mean(x), "x": x}
        leaf = x.clone().requires_grad_()
        value = distributed.all_reduce_sum_with_gradient(leaf)
        (value.square().sum() * (rank + 1)).backward()
        results["with gradient"], results["gradient"] = value.detach(), leaf.grad
        return results

    for rank, found in enumerate(run_processes(work, 2)):
        total = torch.tensor([3.0, 6.0], dtype=torch.float64)
        assert torch.equal(found["x"], torch.tensor([1.0, 2.0], dtype=torch.float64) * (rank + 1))
        assert torch.equal(found["sum"], total)
        assert torch.equal(found["mean"], total / 2)
        assert torch.equal(found["with gradient"], total)
        # each rank's own loss weighs 1 and 2, so the sum of the ranks' gradients weighs 3
        assert torch.equal(found["gradient"], 3 * 2 * total)


@pytest.mark.dist
def test_launcher_returns_values_in_rank_order_and_sets_the_environment() -> None:
    def work(rank: int, add: int) -> tuple[int, str, str, bool, int]:
        env = os.environ
        return rank + add, env["LOCAL_RANK"], env["WORLD_SIZE"], dist.is_initialized(), torch.get_num_threads()

    assert run_processes(work, 2, 10, init=False) == [(10, "0", "2", False, 1), (11, "1", "2", False, 1)]
    assert run_processes(work, 2, 10) == [(10, "0", "2", True, 1), (11, "1", "2", True, 1)]
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.dist
def test_launcher_raises_the_traceback_of_a_child_and_does_not_wait_for_the_others() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise KeyError("broken on purpose")
        dist.barrier()

    with pytest.raises(ChildError, match=r"Rank 1 failed:(?s:.*)KeyError: 'broken on purpose'"):
        run_processes(work, 2, timeout=60)


@pytest.mark.dist
def test_launcher_kills_its_children_at_the_timeout() -> None:
    def work(rank: int) -> None:
        if rank == 0:
            torch.distributed.barrier()  # rank 1 never comes
        else:
            import time

            time.sleep(60)

    with pytest.raises(TimeoutError, match=r"Ranks \[0, 1\]"):
        run_processes(work, 2, timeout=1.0)

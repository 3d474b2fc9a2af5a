"""Two and three ranks give the loss and the gradient of one process that holds the joined batch."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from lightning_contrast import distributed
from tests.launch import run_processes
from tests.losses.cases import CASES, DIM, Case, make_inputs

SPLITS = {"equal": [4, 4], "unequal": [5, 3], "three": [2, 1, 5]}


def _weight() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.eye(DIM, dtype=torch.float64) + 0.3 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)


def _run(case: Case, tensors: list[Tensor], rows: slice, **options: int) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of some rows behind a shared linear map, and the gradients of all that is shared."""
    weight = _weight().requires_grad_()
    shared, total = [weight], case.inputs + case.shared
    arguments: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        if index < case.inputs:
            arguments.append(tensor[rows] @ weight)
        elif index < total or tensor.is_floating_point():
            shared.append(tensor.clone().requires_grad_())
            arguments.append(shared[-1])
        else:
            arguments.append(tensor[rows])
    loss = case.loss(*arguments, **options)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in shared]


@pytest.mark.dist
@pytest.mark.parametrize("split", SPLITS)
def test_ranks_equal_one_process(split: str) -> None:
    sizes = SPLITS[split]
    ends = list(accumulate(sizes))

    def work(rank: int) -> dict[str, tuple[Tensor, list[Tensor]]]:
        rows = slice(ends[rank] - sizes[rank], ends[rank])
        found = {}
        for name, case in CASES.items():
            loss, grads = _run(case, make_inputs(case, 8), rows, **({"tile_size": 3} if case.tiled else {}))
            found[name] = loss, [distributed.all_reduce_mean(grad) for grad in grads]
        return found

    expected = {name: _run(case, make_inputs(case, 8), slice(0, 8)) for name, case in CASES.items()}
    for found in run_processes(work, len(sizes)):
        for name, (loss, grads) in found.items():
            torch.testing.assert_close(
                loss, expected[name][0], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
            for mine, theirs in zip(grads, expected[name][1], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.dist
def test_a_global_batch_too_small_is_an_error_on_every_rank() -> None:
    from lightning_contrast import losses

    def work(rank: int) -> str:
        z = torch.randn(1 - rank, 4)  # one pair in all
        with pytest.raises(ValueError, match="batch of at least 2") as error:
            losses.nt_xent(z, z, temperature=0.1)
        return str(error.value)

    assert len(run_processes(work, 2)) == 2

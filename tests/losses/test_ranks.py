"""Two and three ranks give the loss and the gradient of one process that holds the joined batch."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from lightning_contrast import distributed, losses
from lightning_contrast.callbacks.feature_regularizer import REGULARIZERS
from tests.launch import run_processes
from tests.losses.cases import CASES, DIM, Case, make_inputs
from tests.tolerances import CANCELLING, f64

# Losses without an oracle in loops: their values are those of the reference implementations, in test_official.
_VIEWS = {"temperature": 0.1, "epsilon": 0.05, "iterations": 3}
_DINO = {"student_temperature": 0.1, "teacher_temperature": 0.07}


def _msn(anchors: Tensor, targets: Tensor, prototypes: Tensor, sinkhorn: bool) -> Tensor:
    options = {"temperature": 0.1, "target_sharpen_temperature": 0.25, "me_max_weight": 1.0, "sinkhorn": sinkhorn}
    return losses.msn_loss(anchors, targets, prototypes, **options)


def _case(loss: Callable[..., Tensor], inputs: int, shared: int = 0) -> Case:
    return Case(loss, loss, inputs=inputs, shared=shared, tiled=False)


def _clips(rows: tuple[Tensor, ...]) -> Tensor:
    """Return the embeddings of two augmentations of two clips, ``(2, 2, B, D)``."""
    return torch.stack(rows).unflatten(0, (2, 2))


def _views(*rows: Tensor) -> Tensor:
    """Return the embeddings of several views, ``(V, B, DIM)``."""
    return torch.stack(rows)


def _directions(z: Tensor) -> Tensor:
    return losses.draw_directions(z, slices=5, generator=torch.Generator().manual_seed(4))


def _queue(z: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 5 * DIM, dtype=z.dtype).reshape(5, DIM).sin()


def _sharded_queue(weighting: str) -> Callable[..., Tensor]:
    """Return InfoNCE with each rank's part of a queue, of which rank 1 of two has no filled row."""

    def loss(query: Tensor, key: Tensor, learned: Tensor) -> Tensor:
        part = slice(distributed.rank(), None, distributed.world_size())
        filled, groups = torch.tensor([True, False, True, False, True]), torch.tensor([0, 1, 2, 0, -1])
        return losses.info_nce(
            query,
            key.detach(),
            _queue(query)[part],
            temperature=learned[:1, 0].abs() + 0.2,
            negatives_mask=filled[part],
            weighting=weighting,
            groups=(query.detach() > 0).sum(1) % 3,
            negatives_groups=groups[part],
            negatives_sharded=True,
        )

    return loss


def _second_moment(z: Tensor) -> Tensor:
    return torch.eye(DIM, dtype=z.dtype) + 0.1


MORE = {
    **{
        f"info_nce, sharded queue, {kind}": _case(_sharded_queue(kind), 2, shared=1)
        for kind in ("uniform", "hard", "decoupled_weighted", "top_k", "heated")
    },
    "seed": _case(
        lambda a, b: losses.seed_loss(a, b.detach(), _queue(a), student_temperature=0.2, teacher_temperature=0.1), 2
    ),
    "compress": _case(lambda a, b: losses.compress_loss(a, b.detach(), _queue(a), _queue(a), temperature=0.3), 2),
    "disco": _case(lambda *x: losses.disco_loss(x[0], x[1], x[2].detach(), x[3].detach()), 4),
    "kd": _case(lambda a, b: losses.kd_loss(a, b, temperature=4.0), 2),
    "hint": _case(losses.hint_loss, 2),
    "rocl": _case(lambda *x: losses.rocl_loss(*x, temperature=0.5), 3),
    "fair_supcon": Case(
        lambda a, b, g: losses.fair_supcon_loss(torch.stack([a, b], 1), g + 1, g, temperature=0.5, group_norm=True),
        losses.fair_supcon_loss,
        groups=1,
        tiled=False,
    ),
    "fair_supcon, no labels": Case(
        lambda a, b, g: losses.fair_supcon_loss(torch.stack([a, b], 1), None, g, temperature=0.5),
        losses.fair_supcon_loss,
        groups=1,
        tiled=False,
    ),
    "hsic": Case(losses.hsic_loss, losses.hsic_loss, inputs=1, groups=1, tiled=False),
    "rkd": _case(lambda a, b: losses.rkd_loss(a, b, distance_weight=25.0, angle_weight=50.0), 2),
    "sigreg": _case(lambda *x: losses.sigreg_loss(_views(*x), _directions(x[0])), 3),
    "lejepa": _case(
        lambda a, b, c: losses.lejepa_loss(_views(a, b), _views(c), _directions(a), regularizer_weight=0.3), 3
    ),
    "visreg": _case(lambda *x: losses.visreg_loss(_views(*x), _directions(x[0])), 2),
    "sliced gaussian": _case(lambda *x: losses.sliced_gaussian_loss(_views(*x), _directions(x[0])), 2),
    "tico": _case(lambda a, b: losses.tico_loss(a, b, _second_moment(a)), 2),
    "tico, detached": _case(lambda a, b: losses.tico_loss(a, b, _second_moment(a), detach_covariance=True), 2),
    "w_mse": _case(
        lambda *x: losses.w_mse_loss(
            _views(*x)[..., :2], torch.tensor([[6, 1, 0, 3, 7, 5, 2, 4], [0, 1, 2, 3, 7, 6, 5, 4]]), whitening_size=4
        ),
        3,
    ),
    "mmcr": _case(
        lambda *x: losses.mmcr_loss(_views(*x).transpose(0, 1), _views(*x[1:], x[0]).transpose(0, 1), local_weight=0.4),
        3,
    ),
    "barlow": _case(lambda a, b: losses.barlow_twins_loss(a, b, off_diagonal_weight=0.0051), 2),
    "vicreg": _case(losses.vicreg_loss, 2),
    "koleo": _case(losses.koleo_loss, 1),
    "log det": _case(losses.log_det_loss, 1),
    **{f"regularizer {name}": _case(regularizer, 1) for name, regularizer in REGULARIZERS.items()},
    "ijepa": _case(losses.ijepa_loss, 2),
    "swav": _case(lambda *x: losses.swav_loss(x, **_VIEWS), 3),
    "dino": _case(lambda a, b, c, d, e: losses.dino_loss([a, b, c], [d, e], None, **_DINO), 5),
    "dino, center": _case(lambda a, b, c, d: losses.dino_loss([a, b], [c, d], a.new_ones(1, DIM), **_DINO), 4),
    "dino, sinkhorn": _case(
        lambda a, b, c, d: losses.dino_loss([a, b], [c, d], None, centering="sinkhorn", **_DINO), 4
    ),
    "ibot": _case(
        lambda s, t: losses.ibot_patch_loss(
            s.unflatten(0, (-1, 1)), t.unflatten(0, (-1, 1)), None, t[:, :1] > 0, **_DINO
        ),
        2,
    ),
    "msn": _case(lambda a, t, p: _msn(a, t, p, sinkhorn=False), 2, shared=1),
    "tclr, instance": _case(lambda *x: losses.tclr_instance_loss(_clips(x), temperature=0.1), 4),
    "tclr, local": _case(lambda *x: losses.tclr_local_loss(_clips(x), temperature=0.1), 4),
    "tclr, global-local": _case(
        lambda *x: losses.tclr_global_local_loss(_clips(x[:4]), _clips(x[4:]), temperature=0.1), 8
    ),
    "msn, sinkhorn": _case(lambda a, t, p: _msn(a, t, p, sinkhorn=True), 2, shared=1),
}
ALL = {**CASES, **MORE}
SPLITS = {"equal": [4, 4], "unequal": [5, 3], "three": [2, 1, 5], "one row": [7, 1], "an empty rank": [5, 0, 3]}


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
        for name, case in ALL.items():
            loss, grads = _run(case, make_inputs(case, 8), rows, **({"tile_size": 3} if case.tiled else {}))
            found[name] = loss, [distributed.all_reduce_mean(grad) for grad in grads]
        return found

    expected = {name: _run(case, make_inputs(case, 8), slice(0, 8)) for name, case in ALL.items()}
    for found in run_processes(work, len(sizes)):
        for name, (loss, grads) in found.items():
            torch.testing.assert_close(loss, expected[name][0], **f64(CANCELLING), msg=lambda m, n=name: f"{n}: {m}")
            for mine, theirs in zip(grads, expected[name][1], strict=True):
                torch.testing.assert_close(mine, theirs, **f64(CANCELLING), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.dist
def test_a_global_batch_too_small_is_an_error_on_every_rank() -> None:
    def work(rank: int) -> str:
        z = torch.randn(1 - rank, 4)  # one pair in all
        with pytest.raises(ValueError, match="batch of at least 2") as error:
            losses.nt_xent(z, z, temperature=0.1)
        return str(error.value)

    assert len(run_processes(work, 2)) == 2

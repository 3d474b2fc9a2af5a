"""The loss of masked patches against plain loops, `ibot_patch_loss` and one process."""

import math

import pytest
import torch

from lightning_contrast.losses import dino_loss, ibot_patch_loss, masked_patch_loss, sinkhorn
from tests.launch import run_processes

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 6, 5, dtype=dtype, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [0] * 6, [0, 0, 0, 0, 0, 1], [1] * 6]).bool()
    return student, teacher, torch.randn(5, dtype=dtype, generator=generator) * 0.1, mask


def loss_of(student, teacher, center, mask, **kwargs):
    images = mask.nonzero()[:, 0]
    return masked_patch_loss(student[mask], teacher[mask], center, images, count=len(mask), **TEMPERATURES, **kwargs)


def test_loops():
    student, teacher, center, mask = inputs()
    total = 0.0
    for image in range(4):
        patches = [n for n in range(6) if mask[image, n]]
        for n in patches:
            logits = [x / 0.1 for x in student[image, n].tolist()]
            target = [(x - c) / 0.05 for x, c in zip(teacher[image, n].tolist(), center.tolist(), strict=True)]
            norm, weight = math.log(sum(map(math.exp, logits))), sum(map(math.exp, target))
            total -= sum(math.exp(t) / weight * (x - norm) for t, x in zip(target, logits, strict=True)) / len(patches)
    torch.testing.assert_close(loss_of(student, teacher, center, mask).item(), total / 4)


def test_equals_the_loss_of_all_patches():
    student, teacher, center, mask = inputs()
    student.requires_grad_()
    teacher.requires_grad_()
    found = loss_of(student, teacher, center, mask)
    expected = ibot_patch_loss(student, teacher, center, mask, **TEMPERATURES)
    torch.testing.assert_close(found, expected)
    (a,) = torch.autograd.grad(found, student)
    (b,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(a, b)
    assert torch.autograd.grad(loss_of(student, teacher, center, mask), teacher, allow_unused=True) == (None,)


def test_sinkhorn_balances_the_masked_patches():
    student, teacher, center, mask = inputs()
    target = sinkhorn(teacher[mask], epsilon=0.05, iterations=3)
    each = -(target * (student[mask] / 0.1).log_softmax(1)).sum(1)
    weights = (1 / mask.double().sum(1).clamp(min=1))[mask.nonzero()[:, 0]]
    torch.testing.assert_close(
        loss_of(student, teacher, center, mask, centering="sinkhorn"), (each * weights).sum() / 4
    )


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_no_masked_patch_at_all(centering):
    student, teacher, center, mask = inputs()
    student.requires_grad_()
    loss = loss_of(student, teacher, center, torch.zeros_like(mask), centering=centering)
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_autocast_and_half_precision_equal_float32():
    student, teacher, center, mask = (x.bfloat16() if x.is_floating_point() else x for x in inputs())
    expected = loss_of(student.float(), teacher.float(), center.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss_of(student, teacher, center, mask), expected)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_scores(scale):
    student, teacher, center, mask = inputs(torch.float32)
    for centering in ("mean", "sinkhorn"):
        assert torch.isfinite(loss_of(scale * student, scale * teacher, center, mask, centering=centering))


def rank_loss(rank, centering):
    student, teacher, center, mask = inputs()
    student.requires_grad_()
    rows = slice(2 * rank, 2 * rank + 2)  # 3 masked patches here, 7 there
    loss = loss_of(student[rows], teacher[rows], center, mask[rows], centering=centering)
    return loss.detach(), torch.autograd.grad(loss, student)[0] / 2


@pytest.mark.dist
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_two_ranks_with_unequal_numbers_of_patches_equal_one(centering):
    student, teacher, center, mask = inputs()
    student.requires_grad_()
    alone = loss_of(student, teacher, center, mask, centering=centering)
    (gradient,) = torch.autograd.grad(alone, student)
    found = run_processes(rank_loss, 2, centering)
    for loss, _ in found:
        torch.testing.assert_close(loss, alone.detach())
    torch.testing.assert_close(found[0][1] + found[1][1], gradient)


def test_dino_targets_are_balanced_over_both_views_together():
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(4)]
    student, teacher = views[:2], views[2:]
    target = sinkhorn(torch.cat(teacher), epsilon=0.05, iterations=3).split(6)
    terms = [-(target[t] * (student[1 - t] / 0.1).log_softmax(1)).sum(1).mean() for t in range(2)]
    found = dino_loss(student, teacher, None, centering="sinkhorn", **TEMPERATURES)
    torch.testing.assert_close(found, sum(terms) / 2)


def test_errors():
    student, teacher, center, mask = inputs()
    rows = student[mask], teacher[mask]
    images = mask.nonzero()[:, 0]
    with pytest.raises(ValueError, match="`student` must have one row for each"):
        masked_patch_loss(*rows, center, images[1:], count=4, **TEMPERATURES)
    with pytest.raises(ValueError, match="`count` must be >= 1"):
        masked_patch_loss(*rows, center, images, count=0, **TEMPERATURES)
    with pytest.raises(ValueError, match="`center` must have 5 numbers"):
        masked_patch_loss(*rows, center[1:], images, count=4, **TEMPERATURES)
    with pytest.raises(ValueError, match="`teacher_temperature` must be > 0"):
        masked_patch_loss(*rows, center, images, count=4, student_temperature=0.1, teacher_temperature=0.0)
    with pytest.raises(ValueError, match="`centering` must be one of"):
        loss_of(student, teacher, center, mask, centering="none")
    with pytest.raises(TypeError, match="`student` must be a floating point tensor"):
        masked_patch_loss(rows[0].long(), rows[1], center, images, count=4, **TEMPERATURES)

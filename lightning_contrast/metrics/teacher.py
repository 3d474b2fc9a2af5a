"""Statistics of the teacher's targets in self-distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_contrast.losses.distillation import teacher_probabilities


@torch.no_grad()
def teacher_statistics(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    temperature: float,
    centering: str = "mean",
) -> dict[str, Tensor]:
    """Compute statistics of the teacher's targets that reveal a collapse.

    Args:
        student: Logits of the global views, ``(B, K)`` each; further views are ignored.
        teacher: Logits of the two global views, ``(B, K)`` each.
        center: Running mean of the teacher's logits, ``(K,)``; None: zero.
        temperature: Temperature of the teacher; unitless, > 0.
        centering: ``"mean"`` or ``"sinkhorn"``, as in `losses.dino_loss`.

    Returns:
        Scalars on the device of the logits. ``teacher_entropy``: mean entropy of the targets in nats, 0..ln K; 0 for
        one-hot targets, ln K for uniform ones. ``prototype_entropy``: entropy of the mean target in nats, 0..ln K; 0
        if all images share one prototype. ``agreement``: share of images for which the student's most likely
        prototype of one view is the teacher's of the other view, 0..1.
    """
    targets = teacher_probabilities(torch.cat(list(teacher)).float(), center, temperature, centering)
    best = targets.argmax(1).view(len(teacher), -1)
    same = [student[0].argmax(1) == best[1], student[1].argmax(1) == best[0]]
    return {
        "teacher_entropy": torch.special.entr(targets).sum(1).mean(),
        "prototype_entropy": torch.special.entr(targets.mean(0)).sum(),
        "agreement": torch.cat(same).float().mean(),
    }

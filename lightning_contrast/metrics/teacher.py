"""Statistics of a teacher's targets."""

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
    """Return what shows a collapse, as scalars on the device.

    Args:
        student: Logits of the global views, (B, K) each; further ones are not looked at.
        teacher: Logits of the two global views, (B, K) each.
        center: The centre, (K,), or None where there is none.
        temperature: The teacher's.
        centering: "mean" or "sinkhorn": how the teacher's logits become targets.

    Returns:
        ``teacher_entropy``: mean entropy of the targets in nats, 0..ln K: 0 where one prototype takes all, ln K where
        they say nothing. ``prototype_entropy``: entropy of the mean target in nats: how many prototypes are in use.
        ``agreement``: share of the images in which the student's best prototype of one view is the teacher's best of
        the other, 0..1.
    """
    targets = teacher_probabilities(torch.cat(list(teacher)).float(), center, temperature, centering)
    best = targets.argmax(1).view(len(teacher), -1)
    same = [student[0].argmax(1) == best[1], student[1].argmax(1) == best[0]]
    return {
        "teacher_entropy": torch.special.entr(targets).sum(1).mean(),
        "prototype_entropy": torch.special.entr(targets.mean(0)).sum(),
        "agreement": torch.cat(same).float().mean(),
    }

"""What a student is trained on with a frozen teacher: the head, the memories and the loss of each objective by name."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_positive, require
from lightning_contrast.losses import (
    compress_loss,
    crd_loss,
    crd_normalizers,
    disco_loss,
    hint_loss,
    info_nce,
    rkd_loss,
    seed_loss,
    simreg_loss,
)
from lightning_contrast.nn.feature_queue import FeatureQueue, QueueDtype
from lightning_contrast.nn.heads import build_head
from lightning_contrast.nn.memory_bank import MemoryBank
from lightning_contrast.nn.mlp import Norm
from lightning_contrast.precision import unit_rows

DistillationLoss: TypeAlias = Literal[
    "simreg", "seed", "compress", "compress_momentum", "compress_one_queue", "crd", "disco", "features", "rkd"
]


@dataclass(frozen=True)
class ObjectiveSettings:
    """Numbers of the objectives; each uses those that it needs.

    Attributes:
        student_dim: F, the width of the student's features.
        teacher_dim: T, the width of the teacher's.
        head_norm: Norm of SimReg's predictor.
        queue_size: K, rows of the queues of SEED, CompRess and DisCo.
        queue_dtype: Storage of the queues.
        temperature: Divisor of the student's similarities; None: the published one.
        teacher_temperature: Divisor of the teacher's similarities in SEED.
        embedding_dim: Width of CRD's embeddings.
        num_samples: N, the number of training images, for CRD.
        num_negatives: Random images per image in CRD; 0: all others.
        contrastive_weight: Weight of DisCo's InfoNCE loss.
        small_crops: Number of small crops in SEED.
    """

    student_dim: int
    teacher_dim: int
    head_norm: Norm = "batch"
    queue_size: int = 65536
    queue_dtype: QueueDtype = "float32"
    temperature: float | None = None
    teacher_temperature: float = 0.01
    embedding_dim: int = 128
    num_samples: int | None = None
    num_negatives: int = 16384
    contrastive_weight: float = 1.0
    small_crops: int = 0


class Objective(nn.Module):
    """Head, memories and loss of a distillation.

    `forward` takes outputs of the head and features of the teacher, one (B, P) and one (B, T) per view, unit rows of
    the student's EMA network, one (B, P) per view (none unless ``has_momentum``), and the sample indices (B,) or None.
    It returns the loss, and what `QueueUpdate` writes to ``queues``.
    """

    views: int = 1
    """Views per image."""
    needs_indices: ClassVar[bool] = False
    has_momentum: ClassVar[bool] = False
    """Whether the student has an EMA network."""
    published_temperature: ClassVar[float] = 1.0

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__()
        self.settings = settings
        given = settings.temperature
        self.temperature = self.published_temperature if given is None else given
        check_positive("temperature", self.temperature)
        check_at_least("small_crops", settings.small_crops, 0)
        small = settings.small_crops == 0 or isinstance(self, SeedObjective)
        require(small, "small_crops", 'be 0 unless loss="seed"', settings.small_crops, "Leave it out")

    def build_head(self) -> nn.Module:
        """Return the student's head (B, F) -> (B, P): a linear layer to the teacher's width."""
        return nn.Linear(self.settings.student_dim, self.settings.teacher_dim)

    def queues(self) -> dict[str, nn.Module]:
        """Return the memories by the name of the output that is written to them."""
        return {}

    def new_queue(self, dim: int) -> FeatureQueue:
        """Return an empty queue of embeddings of this width."""
        return FeatureQueue(self.settings.queue_size, dim, self.settings.queue_dtype)


class SimRegObjective(Objective):
    """Regression on the unit sphere by a deep predictor that is thrown away (https://arxiv.org/abs/2201.05131)."""

    def build_head(self) -> nn.Module:
        """Return the predictor of four layers: F to 2 F to F to 2 F to T."""
        width, norm = self.settings.student_dim, self.settings.head_norm
        first = build_head("simreg", width, hidden_dim=2 * width, out_dim=width, norm=norm)
        second = build_head("simreg", width, hidden_dim=2 * width, out_dim=self.settings.teacher_dim, norm=norm)
        return nn.Sequential(first, second)

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], keys: list[Tensor], indices: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of predictions (B, T)."""
        return simreg_loss(student[0], teacher[0]), {}


class FeatureObjective(Objective):
    """Mean squared error of the features after a linear layer, a hint of FitNets (https://arxiv.org/abs/1412.6550)."""

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], keys: list[Tensor], indices: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of regressed features (B, T)."""
        return hint_loss(student[0], teacher[0]), {}


class RelationObjective(Objective):
    """Distances and angles between the images of a batch, without a head (https://arxiv.org/abs/1904.05068)."""

    def build_head(self) -> nn.Module:
        """Return the identity: the features are compared among themselves."""
        return nn.Identity()

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], keys: list[Tensor], indices: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of features (B, F) and (B, T)."""
        return rkd_loss(student[0], teacher[0], distance_weight=25.0, angle_weight=50.0), {}


class SeedObjective(Objective):
    """Similarities to a queue of the teacher's embeddings (https://arxiv.org/abs/2101.04731).

    Small crops have a queue and a loss of their own, the mean over all of them; the first one of an image is queued.
    """

    published_temperature: ClassVar[float] = 0.2

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        check_positive("teacher_temperature", settings.teacher_temperature)
        self.queue = self.new_queue(settings.teacher_dim)
        self.small_queue = self.new_queue(settings.teacher_dim) if settings.small_crops else None
        self.views = 1 + settings.small_crops

    def build_head(self) -> nn.Module:
        """Return MoCo v2's MLP to the teacher's width."""
        return build_head("moco", self.settings.student_dim, out_dim=self.settings.teacher_dim)

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], keys: list[Tensor], indices: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of embeddings (B, T) of each view, and the teacher's for the queues."""
        loss, outputs = self._loss(student[0], teacher[0], self.queue), {"keys": unit_rows(teacher[0])}
        if self.small_queue is not None:
            loss = loss + self._loss(torch.cat(student[1:]), torch.cat(teacher[1:]), self.small_queue)
            outputs["small_keys"] = unit_rows(teacher[1])
        return loss, outputs

    def _loss(self, student: Tensor, teacher: Tensor, queue: FeatureQueue) -> Tensor:
        return seed_loss(
            student,
            teacher,
            queue.features,
            student_temperature=self.temperature,
            teacher_temperature=self.settings.teacher_temperature,
            queue_mask=queue.mask,
        )

    def queues(self) -> dict[str, nn.Module]:
        """Return the queues of the teacher's embeddings."""
        small: dict[str, nn.Module] = {} if self.small_queue is None else {"small_keys": self.small_queue}
        return {"keys": self.queue, **small}


class CompressObjective(Objective):
    """Similarities to anchor images, of each network in its own space, without a head (CompRess, 2010.14713).

    The student's queue holds the student's own features: the plain variant of the reference implementation, whose
    default is `CompressMomentumObjective`.
    """

    published_temperature: ClassVar[float] = 0.04

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.student_queue = self.new_queue(settings.student_dim)
        self.teacher_queue = self.new_queue(settings.teacher_dim)

    def build_head(self) -> nn.Module:
        """Return the identity: the features are compared with those of the anchors."""
        return nn.Identity()

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], keys: list[Tensor], indices: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of features (B, F) and (B, T), and both for the queues."""
        mask = self.student_queue.mask & self.teacher_queue.mask
        queues = self.student_queue.features, self.teacher_queue.features
        loss = compress_loss(student[0], teacher[0], *queues, temperature=self.temperature, queue_mask=mask)
        own = keys[0] if self.has_momentum else unit_rows(student[0].detach())
        return loss, {"keys": unit_rows(teacher[0]), "student_keys": own}

    def queues(self) -> dict[str, nn.Module]:
        """Return both queues of anchors."""
        return {"keys": self.teacher_queue, "student_keys": self.student_queue}


class CompressMomentumObjective(CompressObjective):
    """CompRess whose student's queue holds the features of an EMA network, as in the default script of the authors."""

    has_momentum: ClassVar[bool] = True


class CompressOneQueueObjective(Objective):
    """CompRess with one queue: both networks are compared with the teacher's features of the anchor images.

    It needs features of one width. A student of another one gets a linear layer to the teacher's as its head, which
    the reference implementation does not have.
    """

    published_temperature: ClassVar[float] = 0.04

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.queue = self.new_queue(settings.teacher_dim)

    def build_head(self) -> nn.Module:
        """Return the identity, or a linear layer (B, F) -> (B, T) if the widths differ."""
        return nn.Identity() if self.settings.student_dim == self.settings.teacher_dim else super().build_head()

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], keys: list[Tensor], indices: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of features (B, T) of both, and the teacher's for the queue."""
        queues, mask = (self.queue.features, self.queue.features), self.queue.mask
        loss = compress_loss(student[0], teacher[0], *queues, temperature=self.temperature, queue_mask=mask)
        return loss, {"keys": unit_rows(teacher[0])}

    def queues(self) -> dict[str, nn.Module]:
        """Return the queue of anchors."""
        return {"keys": self.queue}


class CRDObjective(Objective):
    """Noise-contrastive estimation with memories of both networks (CRD, https://arxiv.org/abs/1910.10699).

    Differs from the reference implementation: negatives are drawn from all other images, not those of other classes,
    and there is no cross entropy with labels.
    """

    needs_indices: ClassVar[bool] = True
    published_temperature: ClassVar[float] = 0.07
    normalizer_bits: Tensor

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        count = settings.num_samples
        require(
            count is not None, "num_samples", 'be given for loss="crd"', count, "Give the number of training images"
        )
        self.num_samples = int(count or 0)
        check_at_least("num_samples", self.num_samples, 2)
        check_at_least("num_negatives", settings.num_negatives, 0)
        width = settings.embedding_dim
        check_at_least("embedding_dim", width, 1)
        self.teacher_head = nn.Linear(settings.teacher_dim, width)
        self.student_bank = MemoryBank(self.num_samples, width, seed=0)
        self.teacher_bank = MemoryBank(self.num_samples, width, seed=1)
        # Z of both directions, once, from the first batch; 0 until then. Integers, since strategies cast floats.
        self.register_buffer("normalizer_bits", torch.zeros(2, dtype=torch.int32))
        self._is_known = False

    def build_head(self) -> nn.Module:
        """Return the student's embedding layer, (B, F) -> (B, embedding_dim)."""
        return nn.Linear(self.settings.student_dim, self.settings.embedding_dim)

    def negatives(self, indices: Tensor) -> Tensor:
        """Return other images (B, K) of each image (B,): drawn uniformly, or all of them."""
        count, others = self.settings.num_negatives, self.num_samples - 1
        if count:
            drawn = torch.randint(others, (len(indices), count), device=indices.device)
        else:
            drawn = torch.arange(others, device=indices.device).expand(len(indices), -1)
        return drawn + (drawn >= indices[:, None])  # skips the image itself

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], keys: list[Tensor], indices: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of embeddings (B, embedding_dim), and both for the memories."""
        own, other = student[0], self.teacher_head(teacher[0].to(self.teacher_head.weight.dtype))
        banks = self.student_bank.features, self.teacher_bank.features
        index = cast("Tensor", indices)
        places = index, self.negatives(index)
        t, count = self.temperature, self.num_samples
        stored = self.normalizer_bits.view(torch.float32)
        if not self._is_known:  # costs as much as the loss
            with torch.no_grad():
                first = torch.stack(crd_normalizers(own, other, *banks, *places, temperature=t, samples=count))
                stored.copy_(torch.where(stored > 0, stored, first.to(stored)))
            self._is_known = bool((stored > 0).all())  # synchronizes with the device, in the first step
        z = stored.clone().unbind()
        loss = crd_loss(own, other, *banks, *places, temperature=t, samples=count, normalisers=(z[0], z[1]))
        rows = {"keys": unit_rows(other.detach()), "student_keys": unit_rows(own.detach())}
        return loss, rows | {"indices": index}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Look at the constants again after loading: those of a checkpoint may be unknown."""
        self._is_known = False
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def queues(self) -> dict[str, nn.Module]:
        """Return both memories."""
        return {"keys": self.teacher_bank, "student_keys": self.student_bank}


class DisCoObjective(Objective):
    """Regression of unit embeddings of two views next to MoCo v2's loss (DisCo, https://arxiv.org/abs/2104.09124)."""

    views = 2
    has_momentum: ClassVar[bool] = True
    published_temperature: ClassVar[float] = 0.2

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.queue = self.new_queue(settings.teacher_dim)

    def build_head(self) -> nn.Module:
        """Return MoCo v2's MLP, widened to the hidden layer of a ResNet-50's, to the teacher's width."""
        return build_head("moco", self.settings.student_dim, hidden_dim=2048, out_dim=self.settings.teacher_dim)

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], keys: list[Tensor], indices: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of embeddings (B, T) of two views, and the keys for the queue."""
        key = keys[1]
        if self.queue.is_empty:
            contrast = info_nce(student[0], key, temperature=self.temperature)
        else:
            rows, mask = self.queue.features, self.queue.mask
            contrast = info_nce(student[0], key, rows, temperature=self.temperature, negatives_mask=mask)
        loss = disco_loss(student[0], student[1], teacher[0], teacher[1]) + self.settings.contrastive_weight * contrast
        return loss, {"keys": key}

    def queues(self) -> dict[str, nn.Module]:
        """Return the queue of the student's keys."""
        return {"keys": self.queue}


OBJECTIVES: dict[str, type[Objective]] = {
    "simreg": SimRegObjective,
    "seed": SeedObjective,
    "compress": CompressObjective,
    "compress_momentum": CompressMomentumObjective,
    "compress_one_queue": CompressOneQueueObjective,
    "crd": CRDObjective,
    "disco": DisCoObjective,
    "features": FeatureObjective,
    "rkd": RelationObjective,
}
"""The objectives by the name of their loss."""

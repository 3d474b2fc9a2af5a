"""Distillation: a student learns the features of a frozen teacher, by one of several losses.

Papers: SimReg https://arxiv.org/abs/2201.05131, SEED https://arxiv.org/abs/2101.04731, CompRess
https://arxiv.org/abs/2010.14713, CRD https://arxiv.org/abs/1910.10699, DisCo https://arxiv.org/abs/2104.09124, RKD
https://arxiv.org/abs/1904.05068, FitNets https://arxiv.org/abs/1412.6550; what differs from them: `nn.OBJECTIVES`.
Queues start empty instead of random: the first steps have fewer columns. Learning rate and weight decay are SimReg's,
with a cosine, for every loss.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack, cast

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, check_probability, fail, require
from lightning_contrast.augment import ViewPolicy, ViewSpec, make_policy
from lightning_contrast.augment.view_spec import ViewOptions
from lightning_contrast.callbacks import MomentumUpdate, QueueUpdate
from lightning_contrast.contracts import require_indices
from lightning_contrast.exported import load_teacher
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import FeatureCache, Norm, check_image_size
from lightning_contrast.nn.distillation_objectives import OBJECTIVES, DistillationLoss, ObjectiveSettings
from lightning_contrast.nn.feature_queue import QueueDtype
from lightning_contrast.nn.memory_bank import check_sample_indices
from lightning_contrast.nn.multi_crop import forward_by_size
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.method_options import MethodOptions


class Distill(SelfSupervisedModule):
    """Train a backbone, the student, on the features of a frozen teacher.

    A batch holds one view (B, C, h, w), for "disco" two, and ``small_crops`` further ones; both networks see all of
    them. `forward` gives the student's features (B, F). The teacher is no part of the module: see `nn.FrozenTeacher`. A
    checkpoint holds a digest of its weights; a run that is resumed with another teacher is refused.

    Args:
        backbone: The student: name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        teacher: A timm name, whose published weights are downloaded; the path of a file that
            `export.export` wrote (".pt"), or of a checkpoint (".ckpt"); or a module (B, C, H, W) ->
            (B, T), such as a backbone with its projector. Views are normalized alike for both networks. None, with
            ``teacher_dim``, to use a student that is trained already; it is refused in a fit.
        loss: "simreg", "seed", "compress", "compress_momentum" (the student's queue is filled by its EMA network),
            "compress_one_queue" (the teacher's queue for both), "crd" (needs sample indices), "disco", "features"
            (mean squared error after a linear layer) or "rkd".
        teacher_dim: T, the width of the teacher's features; None reads it.
        teacher_kwargs: Further arguments of a teacher that is given by name, as ``backbone_kwargs``.
        projector: A module (B, F) -> (B, P) that replaces the head; P is T, 128 for "crd", F for "compress",
            "compress_momentum" and "rkd".
        head_norm: Norm of the head of "simreg", "batch", "layer" or None.
        queue_size: Rows K of the queues of "seed", "compress..." and "disco", at least the images of one step.
        queue_dtype: "float32", "float16", "int8" or "int4".
        temperature: Divisor of similarities, > 0; None is the loss's own: 0.2, 0.04 ("compress...") or 0.07 ("crd").
        teacher_temperature: Divisor of the teacher's similarities for "seed", > 0.
        num_samples: Number N of training images, for "crd" and ``cache_features``: indices lie in [0, N).
        num_negatives: Random images per image for "crd"; 0: all others.
        contrastive_weight: Weight of MoCo's loss in "disco"; 0 leaves the regression alone.
        momentum: EMA momentum of the student's key network in "disco" and "compress_momentum", in [0, 1].
        small_crops: Number of small crops that follow the view in "seed", >= 0; see `SEED`.
        cache_features: Keep the teacher's features of each image from the first view of it, by sample index, and use
            them from then on; the teacher is not run for batches of which all are known, which is read on the host.
            To fill it from whole images before the run: ``model.cache.push(encode(teacher, loader), indices)``.
        optimizer: "sgd" as published, "adamw", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is 0.05 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.05
    teacher_digest: Tensor

    def __init__(
        self,
        backbone: str | nn.Module,
        teacher: str | Path | nn.Module | None = None,
        *,
        loss: DistillationLoss = "simreg",
        teacher_dim: int | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
        projector: nn.Module | None = None,
        head_norm: Norm = "batch",
        queue_size: int = 65536,
        queue_dtype: QueueDtype = "float32",
        temperature: float | None = None,
        teacher_temperature: float = 0.01,
        num_samples: int | None = None,
        num_negatives: int = 16384,
        contrastive_weight: float = 1.0,
        momentum: float = 0.999,
        small_crops: int = 0,
        cache_features: bool = False,
        optimizer: OptimizerLike = "sgd",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_choice("loss", loss, OBJECTIVES)
        check_probability("momentum", momentum)
        self.frozen_teacher = None
        if teacher is None:
            hint = "Give a teacher, or the width of its features to use a trained student"
            require(teacher_dim is not None, "teacher_dim", "be given without a teacher", teacher_dim, hint)
            check_at_least("teacher_dim", teacher_dim or 0, 1)
        else:
            if isinstance(teacher, nn.Module):
                own, theirs = (set(map(id, network.parameters())) for network in (self.backbone, teacher))
                hint = "Give a copy of it, as a teacher is frozen"
                require(not own & theirs, "teacher", "share no weights with `backbone`", type(teacher).__name__, hint)
            self.frozen_teacher = load_teacher(teacher, teacher_dim=teacher_dim, teacher_kwargs=teacher_kwargs)
            teacher_dim = self.frozen_teacher.feature_dim
        self.objective = OBJECTIVES[loss](
            ObjectiveSettings(
                self.feature_dim,
                cast("int", teacher_dim),
                head_norm=head_norm,
                queue_size=queue_size,
                queue_dtype=queue_dtype,
                temperature=temperature,
                teacher_temperature=teacher_temperature,
                num_samples=num_samples,
                num_negatives=num_negatives,
                contrastive_weight=contrastive_weight,
                small_crops=small_crops,
            )
        )
        self.projector = projector or self.objective.build_head()
        self.momentum, self.num_samples = momentum, num_samples
        self.momentum_backbone: nn.Module | None = None
        self.momentum_projector: nn.Module | None = None
        if self.objective.has_momentum:
            self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
            self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.cache: FeatureCache | None = None
        if cache_features:
            hint = "Give the number of training images"
            require(num_samples is not None, "num_samples", "be given with `cache_features`", num_samples, hint)
            require(self.objective.views == 1, "cache_features", "be False for several views", True, "Leave it out")
            self.cache = FeatureCache(num_samples or 0, cast("int", teacher_dim))
        digest = 0 if self.frozen_teacher is None else self.frozen_teacher.digest
        self.register_buffer("teacher_digest", torch.tensor([digest]))
        self.save_hyperparameters()

    @staticmethod
    def views(
        size: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Unpack[ViewOptions],
    ) -> ViewPolicy:
        """Return the policy of CompRess and SimReg, one view: crop 0.08..1 and flip. "disco" has `moco_v2_views`."""
        return make_policy([ViewSpec(size, (0.08, 1.0), gray_p=0.0)], mean=mean, std=std, **options)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen network itself."""
        return None if self.frozen_teacher is None else self.frozen_teacher.module

    def on_train_start(self) -> None:
        """Refuse a run without teacher, or with one that is not that of the checkpoint, and plan the run."""
        if self.frozen_teacher is None:
            fail("teacher", "be given for a fit", None, "Give its name, the path of its file, or a module")
        if int(self.teacher_digest) != self.frozen_teacher.digest:
            hint = "Give the teacher of the first run; for another one start a new run from the student's weights"
            fail("teacher", "be that of the checkpoint", type(self.teacher).__name__, hint)
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, the student's features (B, F), and what the queues keep."""
        views = self.batch_views(batch, self.objective.views)  # 1 or 2 x (B, C, h, w)
        indices = None
        if self.objective.needs_indices or self.cache is not None:
            indices = require_indices(batch, type(self).__name__)  # (B,)
            if batch_idx == 0 or indices.device.type == "cpu":  # synchronizes with the device
                check_sample_indices(indices, self.num_samples or 0)
        features = self.student_features(views)  # (B, F) each
        student = [self.projector(rows) for rows in features]  # (B, P) each
        dtype = torch.promote_types(student[0].dtype, torch.float32)
        teacher = [rows.to(dtype) for rows in self.targets(views, indices)]  # (B, T) each
        loss, outputs = self.objective(student, teacher, self.keys(views), indices)
        self.log("train/loss", loss, batch_size=len(views[0]))
        if self.cache is not None and indices is not None:
            outputs |= {"teacher_features": teacher[0], "indices": indices}
        # QueueUpdate writes the outputs to the queues after the batch.
        return {"loss": loss, "features": features[0].detach(), **outputs}

    def student_features(self, views: list[Tensor]) -> list[Tensor]:
        """Return the student's features of each view, (B, F); small crops are one batch for BatchNorm."""
        if len(views) > 2:
            return forward_by_size(self.backbone, views)
        return [self.backbone(view) for view in views]

    def targets(self, views: list[Tensor], indices: Tensor | None) -> list[Tensor]:
        """Return the teacher's features of each view, (B, T), or of the images (B,) that are cached."""
        teacher = self.frozen_teacher
        if teacher is None:
            fail("teacher", "be given for a training step", None, "Give its name, the path of its file, or a module")
        for view in views:
            check_image_size(teacher.module, view)
        if self.cache is None or indices is None:
            return [teacher(view) for view in views]
        known, rows = self.cache.mask[indices], self.cache.features[indices]
        if bool(known.all()):
            return [rows]
        return [torch.where(known[:, None], rows, teacher(views[0]))]

    @torch.no_grad()
    def keys(self, views: list[Tensor]) -> list[Tensor]:
        """Return the unit keys of each view, (B, P); none without an EMA network."""
        if self.momentum_backbone is None or self.momentum_projector is None:
            return []
        return [unit_rows(self.momentum_projector(self.momentum_backbone(view))) for view in views]

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, momentum) modules; only "disco" and "compress_momentum" have any."""
        if self.momentum_backbone is None or self.momentum_projector is None:
            return []
        head = [(self.projector, self.momentum_projector)]  # that of CompRess is an identity
        return [(self.backbone, self.momentum_backbone), *(head if not isinstance(self.projector, nn.Identity) else [])]

    def queues(self) -> dict[str, nn.Module]:
        """Return the memories of the loss, and the cache."""
        return self.objective.queues() | ({} if self.cache is None else {"teacher_features": self.cache})

    def default_callbacks(self) -> list[L.Callback]:
        """Return the callbacks of the queues and of the EMA network, if there are any."""
        queue: list[L.Callback] = [QueueUpdate()] if self.queues() else []
        return [*queue, *([MomentumUpdate(self.momentum, schedule="constant")] if self.momentum_pairs() else [])]

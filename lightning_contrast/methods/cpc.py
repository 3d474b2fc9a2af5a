"""CPC: predict the features of patches further down an image from those above, and tell them from other patches.

Papers: https://arxiv.org/abs/1807.03748 (v1), https://arxiv.org/abs/1905.09272 (v2). There is no public implementation
by the authors; the losses equal lightning-bolts (all patches) and Greedy InfoMax (drawn negatives).
Differs from the papers: losses are the mean over offsets and directions, not their sum; LayerNorm, of v2, is also the
default for one direction; the optimizer is AdamW with a cosine.
"""

from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, check_positive, check_probability, require
from lightning_contrast.augment import cpc_views
from lightning_contrast.losses import cpc_loss, cpc_sampled_loss, draw_row_negatives
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Backbone, GridPredictors, PatchGrid, build_backbone, replace_batchnorm
from lightning_contrast.nn.patch_grid import turn_grid
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import full_precision
from lightning_contrast.runtime.method_options import MethodOptions, backbone_options

Directions = Literal["down", "all"]
_COUNT = {"down": 1, "all": 4}


class CPC(SelfSupervisedModule):
    """Tell the patch some rows below from other patches, by the context of the rows above.

    A batch holds one view (B, C, h, w). It is cut into overlapping patches, which are encoded one by one; `forward`
    gives features (B, F), the mean over the patches of an image, and ``backbone`` is a `nn.PatchGrid`. Logs
    ``train/loss``, which is ``ln(B R S)`` (all patches) or ``ln(1 + negatives)`` at the start.

    Args:
        backbone: Name of a timm model, or a module that maps patches (P, C, p, p) to features (P, F); a `nn.PatchGrid`
            of these sizes is used as it is.
        patch_size: Edge p of the patches in pixels; 64 in v1, 80 in v2.
        stride: Distance of neighboring patches in pixels; 32 in v1, 36 in v2.
        directions: "down" as in v1, or "all" for v2's four, each with a context and predictions of its own.
        steps: Number of row offsets that are predicted, >= 1; 5 in v1.
        skip: Rows next to a context that are not predicted, since patches overlap, >= 0.
        negatives: None: all patches of all images of the global batch, in a projection to ``target_dim``, as in v2; a
            number: so many drawn ones of this rank's batch, by bilinear scores, as in v1.
        target_dim: Width of targets and predictions where all patches are negatives.
        logit_scale: Multiplier of dot products where all patches are negatives, > 0.
        context_dim: Width of the context; None is F.
        context_layers: Number of masked convolution blocks of the context, >= 1.
        context_hidden_dim: Width inside those blocks.
        layer_norm: Replace BatchNorm by LayerNorm in a backbone that is given by name, see `nn.replace_batchnorm`. A
            module is used as it is.
        drop_channels: Probability of setting all color channels but one of a patch to 0, in [0, 1].
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is 4e-4 x global batch / 512; v2 has 4e-4 with Adam.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`.
    """

    adamw_options: ClassVar[dict[str, Any]] = {"betas": (0.8, 0.999)}
    """Options of ``optimizer="adamw"``."""
    base_lr: ClassVar[float] = 2e-4
    sharded_methods: ClassVar = {"backbone": ("maps",)}
    views = staticmethod(cpc_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        patch_size: int = 64,
        stride: int = 32,
        directions: Directions = "down",
        steps: int = 5,
        skip: int = 0,
        negatives: int | None = None,
        target_dim: int = 64,
        logit_scale: float = 0.1,
        context_dim: int | None = None,
        context_layers: int = 5,
        context_hidden_dim: int = 256,
        layer_norm: bool = True,
        drop_channels: float = 0.0,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        weight_decay: float = 1e-5,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        network, width = build_backbone(backbone, **backbone_options(options))
        if layer_norm and isinstance(backbone, str):
            network = replace_batchnorm(network)
        grid = network if isinstance(network, PatchGrid) else PatchGrid(network, patch_size, stride, feature_dim=width)
        found = (grid.patch_size, grid.stride)
        hint = "Give the `patch_size` and `stride` of the `PatchGrid`"
        require(found == (patch_size, stride), "backbone", f"cut patches {(patch_size, stride)}", found, hint)
        super().__init__(
            Backbone(grid, width),
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            **options,
        )
        check_choice("directions", directions, tuple(_COUNT))
        check_at_least("steps", steps, 1)
        check_at_least("skip", skip, 0)
        check_at_least("target_dim", target_dim, 1)
        check_positive("logit_scale", logit_scale)
        check_probability("drop_channels", drop_channels)
        if negatives is not None:
            check_at_least("negatives", negatives, 1)
        self.steps, self.skip, self.negatives = steps, skip, negatives
        self.logit_scale, self.drop_channels = logit_scale, drop_channels
        sizes = {"context_dim": context_dim or width, "layers": context_layers, "hidden_dim": context_hidden_dim}
        out_dim = None if negatives else target_dim
        self.predictors = GridPredictors(width, out_dim, steps, directions=_COUNT[directions], **sizes)
        self.target: nn.Module = nn.Identity() if negatives else nn.Conv2d(width, target_dim, 1)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of one view, and features (B, F)."""
        (images,) = self.batch_views(batch, count=1)
        grid: Any = self.backbone
        maps = grid.maps(images, drop_channels=self.drop_channels)  # (B, F, R, S)
        self._check_grid(maps)
        targets = self.target(maps)  # (B, D, R, S)
        made = self.predictors(maps)
        losses = [self._direction_loss(made[turn], _turned_targets(targets, turn)) for turn in range(len(made))]
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, batch_size=len(images))
        return {"loss": loss, "features": _mean_of_patches(maps.detach())}

    def _direction_loss(self, made: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the loss of what was predicted down the rows of a grid, with targets (B, D, R, S)."""
        if self.negatives is not None:
            index = draw_row_negatives(targets, steps=self.steps, negatives=self.negatives, skip=self.skip)
            return cpc_sampled_loss(made[0], targets, made[1], index, negatives=self.negatives, skip=self.skip)
        each = [
            cpc_loss(predictions, targets, offset=self.skip + 1 + k, scale=self.logit_scale)
            for k, predictions in enumerate(made)
        ]
        return torch.stack(each).mean()

    def _check_grid(self, maps: Tensor) -> None:
        """Check that the farthest predicted row exists in maps (B, F, R, S)."""
        edges = maps.shape[2:] if len(self.predictors) > 1 else maps.shape[2:3]
        hint = "Lower `steps` or `skip`, or make larger views or a smaller `stride`"
        reach = self.steps + self.skip
        require(min(edges) > reach, "images", f"give more than {reach} rows of patches", tuple(maps.shape[2:]), hint)


_turned_targets = full_precision(turn_grid)


@full_precision
def _mean_of_patches(maps: Tensor) -> Tensor:
    """Return the features (B, F) of maps (B, F, R, S)."""
    return maps.mean((2, 3))

"""VICRegL: VICReg of whole views, and of the cells of their maps, matched by feature and by place in the image.

Paper: https://arxiv.org/abs/2210.01571.
Reference implementation: facebookresearch/VICRegL.
Differs from it: no classifier is trained at the same time (`OnlineLinearProbe` is one); invariance terms are means over
the global batch, the same on every rank.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast._checks import check_at_least, check_not_negative, check_probability, require
from lightning_contrast.augment import cell_locations, vicregl_views
from lightning_contrast.losses import vicregl_global_loss, vicregl_local_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.nn import Norm, RegionMaps, build_head
from lightning_contrast.nn.region_maps import LAST_MAPS, project_cells
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.runtime.method_options import MethodOptions


class VICRegL(SelfSupervisedModule):
    """Regularize invariance, variance and covariance of whole views and of matched cells.

    A batch holds two large views (B, C, h, w) of one size and any number of smaller local views after them; `forward`
    gives features (B, F). With ``match_locations`` the views are `augment.LocatedView`, which policies make with
    ``locations=True``. Logs ``train/global_loss`` and ``train/local_loss``, of which the loss is a weighted mean.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        global_weight: Share alpha of the global loss, in [0, 1]; 0.75 and 0.9 in the paper.
        hidden_dim: Width of the expander's hidden layers.
        projection_dim: D, the width of the embedding of a view.
        map_hidden_dim: Width of the hidden layers of the cells' expander.
        map_projection_dim: Width of the embedding of a cell.
        head_norm: Norm of the hidden layers, "batch", "layer" or None.
        projector: A module (B, F) -> (B, D) that replaces the expander.
        map_projector: A module (N, C') -> (N, D') that replaces the expander of the cells.
        region_layer: Name of the backbone's submodule whose output (B, C', h, w) has the cells; None is "layer4" of a
            ResNet, "stages" of `nn.SmallConvNet`, else the backbone itself, which must then return a map.
        region_dim: C', the number of its channels; None reads it from the last norm or convolution of the layer.
        match_locations: Match cells by their places in the image too.
        matches: How many matches by place are kept of the cells of the first and of the second view of a pair.
        all_feature_matches: Keep the matches by feature of all cells; False keeps as many as by place.
        invariance_weight: Weight of the mean squared difference of the views, >= 0.
        variance_weight: Weight of the hinge that keeps each dimension's standard deviation at 1, >= 0.
        covariance_weight: Weight of the squared covariances between dimensions, >= 0.
        optimizer: "lars" as in the paper, "sgd", "adamw", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is the paper's 0.3 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.001 of the peak; None is 10, fewer in short runs.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 0.3
    views = staticmethod(vicregl_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        global_weight: float = 0.75,
        hidden_dim: int = 8192,
        projection_dim: int = 8192,
        map_hidden_dim: int = 512,
        map_projection_dim: int = 512,
        head_norm: Norm = "batch",
        projector: nn.Module | None = None,
        map_projector: nn.Module | None = None,
        region_layer: str | None = None,
        region_dim: int | None = None,
        match_locations: bool = True,
        matches: tuple[int, int] = (20, 4),
        all_feature_matches: bool = True,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        optimizer: OptimizerLike = "lars",
        lr: float | None = None,
        weight_decay: float = 1e-6,
        warmup_epochs: int | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_probability("global_weight", global_weight)
        require(len(matches) == 2, "matches", "be two numbers", matches, "The paper has (20, 4)")
        for number in matches:
            check_at_least("matches", number, 1)
        self.global_weight, self.match_locations = global_weight, match_locations
        self.matching: dict[str, Any] = {"matches": tuple(matches), "all_feature_matches": all_feature_matches}
        self.weights: dict[str, Any] = {
            "invariance_weight": invariance_weight,
            "variance_weight": variance_weight,
            "covariance_weight": covariance_weight,
        }
        for name, weight in self.weights.items():
            check_not_negative(name, weight)
        self.maps = RegionMaps(self.backbone, region_layer, LAST_MAPS)
        channels = self.maps.channels(region_dim, self.feature_dim)
        self.projector = projector or build_head(
            "vicreg", self.feature_dim, hidden_dim=hidden_dim, out_dim=projection_dim, norm=head_norm
        )
        self.map_projector = map_projector or build_head(
            "vicregl_maps", channels, hidden_dim=map_hidden_dim, out_dim=map_projection_dim, norm=head_norm
        )
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted mean of the global and the local loss, and features (B, F)."""
        views = self.batch_crops(batch, global_views=2)  # V x (B, C, h, w)
        features, embeddings, maps, grids = [], [], [], []
        for view in views:  # one after the other, so that BatchNorm computes its statistics for each
            with self.maps.recording():
                features.append(self.backbone(view))  # (B, F)
            cells = self.maps.take()  # (B, C', h', w')
            embeddings.append(self.projector(features[-1]))  # (B, D)
            maps.append(project_cells(self.map_projector, cells.flatten(2)).mT)  # (B, S, D')
            grids.append(tuple(cells.shape[2:]))
        locations = self.locations(views, grids) if self.match_locations else None  # V x (B, h', w', 2)
        whole = vicregl_global_loss(embeddings, **self.weights)
        local = vicregl_local_loss(maps, locations, **self.weights, **self.matching)
        loss = self.global_weight * whole + (1 - self.global_weight) * local
        for name, value in {"loss": loss, "global_loss": whole.detach(), "local_loss": local.detach()}.items():
            self.log(f"train/{name}", value, batch_size=len(views[0]))
        return {"loss": loss, "features": features[0].detach()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # boxes are an attribute of a tensor
    def locations(self, views: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
        """Return where the cells of the views are in their images.

        Args:
            views: V views (B, C, h, w).
            grids: Rows and columns of the map of each view.

        Returns:
            One tensor (B, h', w', 2) per view.
        """
        found = [boxes for view in views if (boxes := getattr(view, "boxes", None)) is not None]
        hint = "Give `VICRegL.views(...)` or a policy with `locations=True`, or set `match_locations=False`"
        require(len(found) == len(views), "views", "know their places in the image", f"{len(found)} that do", hint)
        return [cell_locations(boxes, *grid) for boxes, grid in zip(found, grids, strict=True)]

    def lr_factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Return the factor: linear warm-up from 0, then a cosine to 0.001."""
        return optim.warmup_cosine(step, warmup_steps, total_steps, end=0.001)

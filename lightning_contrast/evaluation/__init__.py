"""Offline protocols on a frozen backbone, and pictures of what it has learned."""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach

if TYPE_CHECKING:
    from lightning_contrast.evaluation.attention import attention_grid as attention_grid
    from lightning_contrast.evaluation.attention import attention_maps as attention_maps
    from lightning_contrast.evaluation.attention import compose_scenes as compose_scenes
    from lightning_contrast.evaluation.export import export_backbone as export_backbone
    from lightning_contrast.evaluation.figures import image_map as image_map
    from lightning_contrast.evaluation.figures import neighbour_strips as neighbour_strips
    from lightning_contrast.evaluation.figures import view_grid as view_grid
    from lightning_contrast.evaluation.frozen import encode as encode
    from lightning_contrast.evaluation.frozen import knn_top1 as knn_top1
    from lightning_contrast.evaluation.frozen import linear_top1 as linear_top1
    from lightning_contrast.evaluation.frozen import pixel_features as pixel_features
    from lightning_contrast.evaluation.frozen import recall_at_1 as recall_at_1

__getattr__, __dir__, __all__ = attach(__name__, __file__)

"""Feature metrics as torchmetrics classes, and their functional forms."""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach

if TYPE_CHECKING:
    from lightning_contrast.metrics.kernel_alignment import CKA as CKA
    from lightning_contrast.metrics.kernel_alignment import cka as cka
    from lightning_contrast.metrics.knn import KNNAccuracy as KNNAccuracy
    from lightning_contrast.metrics.lda_rank import LiDAR as LiDAR
    from lightning_contrast.metrics.lda_rank import lidar as lidar
    from lightning_contrast.metrics.neighbours import knn_predict as knn_predict
    from lightning_contrast.metrics.neighbours import knn_scores as knn_scores
    from lightning_contrast.metrics.neighbours import nearest_neighbours as nearest_neighbours
    from lightning_contrast.metrics.retrieval import RetrievalRecall as RetrievalRecall
    from lightning_contrast.metrics.spectrum import AlphaReQ as AlphaReQ
    from lightning_contrast.metrics.spectrum import EffectiveRank as EffectiveRank
    from lightning_contrast.metrics.spectrum import RankMe as RankMe
    from lightning_contrast.metrics.spectrum import alpha_req as alpha_req
    from lightning_contrast.metrics.spectrum import effective_rank as effective_rank
    from lightning_contrast.metrics.spectrum import participation_ratio as participation_ratio
    from lightning_contrast.metrics.spectrum import rankme as rankme
    from lightning_contrast.metrics.sphere import Alignment as Alignment
    from lightning_contrast.metrics.sphere import Uniformity as Uniformity

__getattr__, __dir__, __all__ = attach(__name__, __file__)

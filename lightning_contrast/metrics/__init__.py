"""Measures of features as torchmetrics classes, and the functions behind them."""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach

if TYPE_CHECKING:
    from lightning_contrast.metrics.knn import KNNAccuracy as KNNAccuracy
    from lightning_contrast.metrics.neighbours import knn_predict as knn_predict
    from lightning_contrast.metrics.neighbours import knn_scores as knn_scores
    from lightning_contrast.metrics.neighbours import nearest_neighbours as nearest_neighbours
    from lightning_contrast.metrics.retrieval import RetrievalRecall as RetrievalRecall

__getattr__, __dir__, __all__ = attach(__name__, __file__)

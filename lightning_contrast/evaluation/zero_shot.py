"""Zero-shot classifiers of image-text methods."""

from lightning_contrast.metrics.zero_shot import zero_shot_weights

__all__ = ["zero_shot_weights"]

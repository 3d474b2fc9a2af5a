"""Callbacks for any Trainer, one per module."""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach

if TYPE_CHECKING:
    from lightning_contrast.callbacks.collapse.diagnosis import Thresholds as Thresholds
    from lightning_contrast.callbacks.collapse.instance_discrimination_monitor import (
        InstanceDiscriminationMonitor as InstanceDiscriminationMonitor,
    )
    from lightning_contrast.callbacks.collapse.monitor import CollapseMonitor as CollapseMonitor
    from lightning_contrast.callbacks.gradient_cache import GradientCache as GradientCache
    from lightning_contrast.callbacks.invariance.monitor import InvarianceMonitor as InvarianceMonitor
    from lightning_contrast.callbacks.momentum_update import MomentumUpdate as MomentumUpdate
    from lightning_contrast.callbacks.nonfinite_guard import NonFiniteGuard as NonFiniteGuard
    from lightning_contrast.callbacks.probes.knn import OnlineKNN as OnlineKNN
    from lightning_contrast.callbacks.probes.linear_probe import OnlineLinearProbe as OnlineLinearProbe
    from lightning_contrast.callbacks.queue_update import QueueUpdate as QueueUpdate
    from lightning_contrast.callbacks.step_seed import StepSeed as StepSeed
    from lightning_contrast.callbacks.throughput.monitor import TrainingCostMonitor as TrainingCostMonitor
    from lightning_contrast.callbacks.view_augmentation import ViewAugmentation as ViewAugmentation
    from lightning_contrast.callbacks.visualization.embedding_logger import EmbeddingLogger as EmbeddingLogger
    from lightning_contrast.callbacks.visualization.view_logger import ViewLogger as ViewLogger

__getattr__, __dir__, __all__ = attach(__name__, __file__)

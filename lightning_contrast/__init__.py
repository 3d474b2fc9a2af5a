"""Contrastive and self-supervised pretraining as plug-ins for PyTorch Lightning."""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach
from lightning_contrast._version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_contrast import augment as augment
    from lightning_contrast import callbacks as callbacks
    from lightning_contrast import checkpoints as checkpoints
    from lightning_contrast import contracts as contracts
    from lightning_contrast import data as data
    from lightning_contrast import distributed as distributed
    from lightning_contrast import evaluation as evaluation
    from lightning_contrast import losses as losses
    from lightning_contrast import methods as methods
    from lightning_contrast import metrics as metrics
    from lightning_contrast import nn as nn
    from lightning_contrast import optim as optim
    from lightning_contrast import resuming as resuming
    from lightning_contrast import testing as testing
    from lightning_contrast.callbacks import CollapseMonitor as CollapseMonitor
    from lightning_contrast.callbacks import EmbeddingLogger as EmbeddingLogger
    from lightning_contrast.callbacks import GradientCache as GradientCache
    from lightning_contrast.callbacks import InstanceDiscriminationMonitor as InstanceDiscriminationMonitor
    from lightning_contrast.callbacks import InvarianceMonitor as InvarianceMonitor
    from lightning_contrast.callbacks import MomentumUpdate as MomentumUpdate
    from lightning_contrast.callbacks import NonFiniteGuard as NonFiniteGuard
    from lightning_contrast.callbacks import OnlineKNN as OnlineKNN
    from lightning_contrast.callbacks import OnlineLinearProbe as OnlineLinearProbe
    from lightning_contrast.callbacks import QueueUpdate as QueueUpdate
    from lightning_contrast.callbacks import StepSeed as StepSeed
    from lightning_contrast.callbacks import TrainingCostMonitor as TrainingCostMonitor
    from lightning_contrast.callbacks import ViewAugmentation as ViewAugmentation
    from lightning_contrast.callbacks import ViewLogger as ViewLogger
    from lightning_contrast.methods import *  # noqa: F403

__getattr__, __dir__, __all__ = attach(__name__, __file__)

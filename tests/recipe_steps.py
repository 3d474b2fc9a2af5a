"""The first steps of a recipe on generated data, in a run that is planned as the recipe has it."""

import lightning as L
import torch
from torch.utils.data import DataLoader

import lightning_contrast as lc

CAPTIONS = ("cat face", "sun", "red heart", "old key")


class FirstSteps(L.Callback):
    """Stops after the first steps; keeps the last loss, and the largest gradient of the parameters."""

    def __init__(self, steps=1):
        self.steps = steps

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient = max(float(gradient.abs().max()) for gradient in gradients)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.loss = float(outputs["loss"])
        trainer.should_stop = trainer.global_step >= self.steps


def generated(datamodule, size, batch):
    """Return a loader of two batches in the layout of a data module, from images or clips of ``size`` pixels."""
    generator = torch.Generator().manual_seed(0)

    def pixels(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    rows = 2 * batch
    if isinstance(datamodule, lc.data.ImageTextDataModule):
        items = [{"image": pixels(3, size, size), "text": CAPTIONS[row % 4], "index": row} for row in range(rows)]
    else:
        frames = (datamodule.frames,) if isinstance(datamodule, lc.data.VideoFolderDataModule) else ()
        items = [(pixels(*frames, 3, size, size), row % 4) for row in range(rows)]
        if datamodule.indices:
            items = [(*item, row) for row, item in enumerate(items)]
    return DataLoader(items, batch_size=batch)


def batch_of(model, *, least=4):
    """Return the number of images that a step needs: whole BatchNorm splits, and parts that can be whitened."""
    splits = getattr(model, "batchnorm_splits", 1)
    whitening = getattr(model, "whitening_size", 1) or 1
    return max(least, 2 * splits if splits > 1 else 1, whitening)

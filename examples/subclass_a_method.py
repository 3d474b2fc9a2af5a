"""Change one thing of a method: SimCLR whose temperature falls while it trains."""

import argparse
import math

import lightning as L
import torch

import lightning_contrast as lc
from lightning_contrast.losses import nt_xent


class CoolingSimCLR(lc.SimCLR):
    """SimCLR with a temperature that falls from ``hot`` to ``temperature`` as a cosine.

    Args:
        backbone: As in SimCLR.
        hot: The temperature at the first step.
        **kwargs: All other arguments of SimCLR.
    """

    def __init__(self, backbone, *, hot=0.5, **kwargs):
        super().__init__(backbone, **kwargs)
        self.hot = hot
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        """Compute the NT-Xent loss at the temperature of this step."""
        view_a, view_b = self.batch_views(batch, count=2)
        features = self(torch.cat([view_a, view_b]))
        projection_a, projection_b = self.projector(features).chunk(2)
        share = self.global_step / self.trainer.estimated_stepping_batches
        cooling = 0.5 * (1 + math.cos(math.pi * share))
        temperature = self.temperature + (self.hot - self.temperature) * cooling
        loss = nt_xent(projection_a, projection_b, temperature=temperature)
        self.log_dict({"train/loss": loss, "train/temperature": temperature}, batch_size=len(view_a))
        return {"loss": loss, "features": features[: len(view_a)].detach()}


def main():
    """Train it with the callbacks that every method supports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    L.seed_everything(0)
    data = lc.data.EmojiDataModule()
    model = CoolingSimCLR("small_convnet", optimizer="adamw", lr=2e-3, warmup_epochs=0)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[
            lc.ViewAugmentation(lc.augment.simclr_cifar_views(32)),
            lc.OnlineKNN(num_classes=data.num_classes),
        ],
    )
    trainer.fit(model, datamodule=data)
    print(f"temperature {trainer.callback_metrics['train/temperature']:.3f}")
    print(f"k-NN top-1 {trainer.callback_metrics['knn/top1']:.3f}")


if __name__ == "__main__":
    main()

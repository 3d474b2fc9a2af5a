"""Change the loss or the head of a method: by an argument, or in a subclass that returns another loss."""

import argparse

import lightning as L
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast import losses


class AlignedSimCLR(lc.SimCLR):
    """SimCLR's views, backbone and head with a loss of our own: alignment plus uniformity of the projections."""

    def training_step(self, batch, batch_idx):
        """Return the loss, and the features of the first view for the probes."""
        views = self.batch_views(batch, count=2)  # 2 x (B, C, h, w)
        features = self(torch.cat(views))  # (2 B, F)
        a, b = self.projector(features).chunk(2)  # (B, D) each
        loss = losses.alignment(a, b) + (losses.uniformity(a) + losses.uniformity(b)) / 2
        self.log("train/loss", loss, batch_size=len(a))
        return {"loss": loss, "features": features[: len(a)].detach()}


WIDTH = 192  # of the features of the backbone
SETTINGS = {"backbone": "small_convnet", "optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "warmup_epochs": 0}
VARIANTS = {
    "SimCLR": lambda: lc.SimCLR(**SETTINGS),
    # The loss: another weighting of the negatives, a learned temperature, or your own.
    "hard negatives": lambda: lc.SimCLR(weighting=losses.Negatives("hard", tau_plus=0.02, beta=0.5), **SETTINGS),
    "decoupled": lambda: lc.SimCLR(weighting="decoupled", **SETTINGS),
    "learned temperature": lambda: lc.SimCLR(temperature=lc.nn.LearnedTemperature(0.2), **SETTINGS),
    "own loss": lambda: AlignedSimCLR(**SETTINGS),
    # The head: any module (B, F) -> (B, D), or one of the published heads in another size.
    "no head": lambda: lc.SimCLR(projector=nn.Identity(), **SETTINGS),
    "linear head": lambda: lc.SimCLR(projector=nn.Linear(WIDTH, 64), **SETTINGS),
    "own head": lambda: lc.SimCLR(
        projector=nn.Sequential(nn.Linear(WIDTH, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 64)), **SETTINGS
    ),
    "VICReg's head": lambda: lc.SimCLR(
        projector=lc.nn.build_head("vicreg", WIDTH, hidden_dim=512, out_dim=512), **SETTINGS
    ),
}


def main():
    """Train each variant with the same data, views and seed, and print the k-NN accuracy of the features."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batches", type=int, default=19, help="per epoch")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    for name in options.variants:
        L.seed_everything(0, verbose=False)
        data = lc.data.EmojiDataModule(batch_size=128)
        trainer = L.Trainer(
            max_epochs=options.epochs,
            limit_train_batches=options.batches,
            check_val_every_n_epoch=options.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[lc.ViewAugmentation(lc.augment.simclr_cifar_views(32)), lc.OnlineKNN(data.num_classes)],
        )
        trainer.fit(VARIANTS[name](), datamodule=data)
        print(f"{name}: k-NN top-1 {trainer.callback_metrics['knn/top1']:.3f}")


if __name__ == "__main__":
    main()

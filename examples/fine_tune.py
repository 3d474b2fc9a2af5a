"""Fine-tune after pretraining: a backbone of a checkpoint and a new classifier, with a tenth of the labels."""

import argparse
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc

POLICY = lc.augment.simclr_cifar_views(32, mean=(0.84, 0.8, 0.75), std=(0.28, 0.26, 0.33))
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(L.LightningModule):
    """A classifier on a backbone, whose learning rate is a tenth of the head's."""

    def __init__(self, backbone, width, num_classes, lr=3e-3):
        super().__init__()
        self.backbone, self.head, self.lr = backbone, nn.Linear(width, num_classes), lr

    def training_step(self, batch, batch_idx):
        """Return the cross entropy of flipped images."""
        images, labels = batch
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
        return nn.functional.cross_entropy(self.head(self.backbone(POLICY.eval_transform(images))), labels)

    def configure_optimizers(self):
        """Use AdamW with two rates and a cosine."""
        groups = [{"params": self.backbone.parameters(), "lr": self.lr / 10}, {"params": self.head.parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.05)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main():
    """Pretrain, save, load, fine-tune; the same from random weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40, help="of the pretraining")
    parser.add_argument("--tuning_epochs", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.1, help="of the labels")
    parser.add_argument("--fold", type=int, help="validate on this fold (1-4) of the training set")
    options = parser.parse_args()
    L.seed_everything(0)
    data = lc.data.EmojiDataModule(batch_size=128, validation_fold=options.fold)
    model = lc.SimCLR("small_convnet", temperature=0.2, optimizer="adamw", lr=2e-3, warmup_epochs=0)
    pretraining = L.Trainer(**QUIET, max_epochs=options.epochs, limit_val_batches=0)
    pretraining.callbacks.append(lc.ViewAugmentation(POLICY))
    pretraining.fit(model, datamodule=data)
    pretraining.save_checkpoint(path := Path("pretrained.ckpt"))

    images, labels = data.images("train"), data.labels("train")
    rows, _ = lc.evaluation.fine_tune_rows(labels, share=options.share)
    few = DataLoader(TensorDataset(images[rows], labels[rows]), 32, shuffle=True, drop_last=True)
    for name in ("pretrained", "random"):
        L.seed_everything(0, verbose=False)
        start = lc.SimCLR.load_from_checkpoint(path) if name == "pretrained" else lc.SimCLR("small_convnet")
        tuned = Classifier(start.backbone, start.feature_dim, data.num_classes)
        L.Trainer(**QUIET, max_epochs=options.tuning_epochs, enable_checkpointing=False).fit(tuned, few)
        logits = lc.evaluation.encode(
            nn.Sequential(tuned.backbone, tuned.head), data.images("val"), POLICY.eval_transform
        )
        right = (logits.argmax(1) == data.labels("val")).float().mean()
        print(f"{name}: fine-tuned with {len(rows)} labels, top-1 {float(right):.3f}")


if __name__ == "__main__":
    main()

"""Judge the demo's SimCLR beside its random weights, raw pixels, HOG and a supervised twin, on one page."""

import argparse
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from skimage.feature import hog
from sklearn.datasets import load_digits
from torch import nn

import lightning_contrast as lc
from lightning_contrast import evaluation
from lightning_contrast.augment.images import as_float

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=340, help="of the demo and of the supervised twin")
parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart/simclr.ckpt"), help="trained if missing")
parser.add_argument("--parts", nargs="+", help="parts of the report, or all; those that are default if left out")
parser.add_argument("--output", type=Path, default=Path("runs/report"))
options = parser.parse_args()


class HOG(nn.Module):
    """Histograms of oriented gradients: 8 orientations in cells of 8 x 8 pixels."""

    def forward(self, images):  # noqa: D102
        grid = {"orientations": 8, "pixels_per_cell": (8, 8), "cells_per_block": (2, 2), "channel_axis": 0}
        return torch.stack([torch.from_numpy(hog(image.numpy(), **grid)) for image in images.detach().cpu()])


class Supervised(lc.SelfSupervisedModule):
    """The demo's network, views and optimizer, with a linear classifier and cross-entropy."""

    def __init__(self, classes, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.classifier = nn.Linear(self.feature_dim, classes)

    def training_step(self, batch, batch_idx):  # noqa: D102
        logits = self.classifier(self(torch.cat(self.batch_views(batch, count=2))))
        return nn.functional.cross_entropy(logits, batch[1].repeat(2))


class Digits(lc.data.InMemoryDataModule):
    """The 1,797 digits of scikit-learn, enlarged from 8 x 8 to 32 x 32 pixels; every fifth one is a test image."""

    def read(self, split):  # noqa: D102
        own = (torch.arange(1797) % 5 == 0) == (split != "train")
        images, labels = (torch.from_numpy(array)[own] for array in load_digits(return_X_y=True))
        return torch.kron(images.reshape(-1, 1, 8, 8) * 255 / 16, torch.ones(1, 3, 4, 4)).to(torch.uint8), labels


if not options.checkpoint.exists():
    demo, options.checkpoint = Path(__file__).with_name("quickstart.py"), options.output / "demo" / "simclr.ckpt"
    words = f"--epochs={options.epochs}", f"--output={options.checkpoint.parent}"
    subprocess.run([sys.executable, demo, *words], check=True)
L.seed_everything(0)  # as in the demo, so that the random weights are those from which it started
data = lc.data.EmojiDataModule()
(mean, std), center = lc.data.estimate_mean_std(data), data.images("train").float().mean(0) / 255
views = lc.augment.simclr_cifar_views(32, mean=mean, std=std)
setting = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-4, "warmup_epochs": options.epochs // 60}
start, twin = lc.SimCLR("small_convnet", **setting), Supervised(data.num_classes, "small_convnet", **setting)
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
weights = options.output / f"supervised-{options.epochs}.pt"
if not weights.exists():
    L.Trainer(max_epochs=options.epochs, callbacks=[lc.ViewAugmentation(views)], **quiet).fit(twin, datamodule=data)
    lc.checkpoints.AtomicCheckpointIO().save_checkpoint(twin.state_dict(), weights)
twin.load_state_dict(lc.checkpoints.load_checkpoint(weights))
models = {
    "SimCLR": options.checkpoint,
    "random": evaluation.Subject(start.backbone, views.eval_transform, views.input_spec, "its weights at the start"),
    "pixels": evaluation.Subject(nn.Flatten(), lambda images: as_float(images) - center, None, "pixels, centered"),
    "HOG": HOG(),
    "supervised": evaluation.Subject(twin, views.eval_transform, views.input_spec, f"labels, {options.epochs} epochs"),
}
found = evaluation.report(models, data, output=options.output, parts=options.parts, transfer={"digits": Digits()})
print(*(f"{row['model']}: {row['value']:.3f}" for row in found.table() if row["metric"] == "top1 (k = 20)"), sep="\n")
print(options.output / "report.html")

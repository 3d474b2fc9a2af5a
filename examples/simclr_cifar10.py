"""SimCLR with a ResNet-50 on CIFAR-10, logistic regression after each epoch; saves encoder, heads and accuracies."""

import argparse
import json
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from loader_views import LoaderViews, albumentations_views
from own_backbone import hugging_face_resnet50
from torch import nn
from torch.utils.data import DataLoader

import lightning_contrast as lc

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--root", default="data", help="folder of the archive, which is downloaded if it is not there")
parser.add_argument("--backbone", default="resnet50", help="a timm name, or huggingface")
parser.add_argument("--views", choices=["kornia", "albumentations"], default="kornia")
parser.add_argument("--epochs", type=int, default=80)
parser.add_argument("--batch_size", type=int, default=256)
parser.add_argument("--workers", type=int, default=4, help="of the Albumentations loader")
parser.add_argument("--output", type=Path, default=Path("runs/simclr_cifar10"))
options = parser.parse_args()

L.seed_everything(0, workers=True)
data = lc.data.ImageDataModule("CIFAR10", options.root, download=True, batch_size=options.batch_size)
data.prepare_data()
policy = lc.augment.simclr_cifar_views(32, mean=MEAN, std=STD, fused=False)  # stock Kornia operations


def loader(split, *, random):
    """Return a loader of views by Albumentations, or of normalized images."""
    rows = LoaderViews(data.images(split), data.labels(split), albumentations_views(32, MEAN, STD, random=random))
    return DataLoader(rows, options.batch_size, shuffle=random, drop_last=random, num_workers=options.workers)


# The regression is fitted to the training images as they are, not to views of them.
if options.views == "kornia":
    probe = lc.OnlineLinearProbe(num_classes=10)
    callbacks, fit = [lc.StepSeed(0), lc.ViewAugmentation(policy), probe], {"datamodule": data}
else:
    train, val = loader("train", random=True), loader("test", random=False)
    probe = lc.OnlineLinearProbe(10, dataloader=loader("train", random=False), every_n_steps=len(train))
    callbacks, fit = [lc.StepSeed(0), probe], {"train_dataloaders": train, "val_dataloaders": val}

is_timm = options.backbone != "huggingface"
backbone = options.backbone if is_timm else hugging_face_resnet50()
network, width = lc.nn.build_backbone(backbone, small_images=is_timm)
model = lc.SimCLR(
    network,
    projector=nn.Sequential(nn.Dropout(0.1), lc.nn.build_head("simclr", width, out_dim=128)),
    temperature=0.07,
    optimizer="adamw",
    lr=3e-4,  # falls as a cosine
    weight_decay=1e-4,
    warmup_epochs=0,
)
log = CSVLogger(options.output, name="", version="")  # metrics.csv: linear_probe/top1 after each epoch
trainer = L.Trainer(max_epochs=options.epochs, num_sanity_val_steps=0, logger=log, callbacks=callbacks)
trainer.fit(model, **fit)

features = lc.evaluation.encode(model, data.images("test"), policy.eval_transform)
guesses, labels = probe.predict(features.to(trainer.strategy.root_device)).argmax(1).cpu(), data.labels("test")
by_class = {f"class {c}": float((guesses[labels == c] == c).float().mean()) for c in range(10)}
report = {"top1": float((guesses == labels).float().mean()), **by_class}
(options.output / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
torch.save(model.backbone.state_dict(), options.output / "encoder.pt")
heads = {"projector": model.projector.state_dict(), "logistic_regression": probe.state_dict()["fitted"]}
torch.save(heads, options.output / "heads.pt")
print(f"top-1 of the logistic regression: {report['top1']:.3f}; encoder, heads and accuracies in {options.output}")

"""Adapt a pretrained ViT to labels of one artist: linear probe, fine-tuning, LP-FT and LoRA; judged on both artists."""

import argparse
import copy
import json

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc

SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2}
VIEWS = lc.augment.make_policy([lc.augment.ViewSpec(32, (0.5, 1.0), (0.4, 0.4, 0.4, 0.1))] * 2)
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
RATES = {"linear probe": 1e-2, "fine-tuning": 1e-3, "LP-FT": 3e-4, "LoRA": 3e-3}


def fit(model, batches, epochs, seed):
    """Train on views made from batches of images."""
    callbacks = [lc.ViewAugmentation(VIEWS, seed=seed)]
    L.Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", **QUIET).fit(model, batches)
    return model.eval()


class Classifier(L.LightningModule):
    """A backbone and a linear head; what requires a gradient is trained."""

    def __init__(self, backbone, lr):
        super().__init__()
        self.backbone, self.lr = backbone, lr
        self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(64, affine=False), torch.nn.Linear(64, 9))

    def training_step(self, batch, batch_idx):
        """Return the cross entropy of both views."""
        views, labels = batch
        return torch.nn.functional.cross_entropy(self.head(self.backbone(torch.cat(views))), labels.repeat(2))

    def configure_optimizers(self):
        """Return the optimizer."""
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def adapt(backbone, row, batches, lr, epochs, seed):
    """Return a classifier that is trained in one of the ways."""
    L.seed_everything(seed)
    backbone = copy.deepcopy(backbone)
    if row in ("LoRA", "fine-tuning"):
        network = lc.nn.add_lora(backbone, rank=4, alpha=8) if row == "LoRA" else backbone
        return fit(Classifier(network, lr), batches, epochs, seed)
    probe = fit(Classifier(backbone.requires_grad_(False), RATES["linear probe"]), batches, epochs, seed)
    if row == "LP-FT":  # the head is right before the features move
        probe.requires_grad_(True).lr = lr
        fit(probe.train(), batches, epochs, seed)
    return probe


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rows", nargs="+", choices=[*RATES], default=[*RATES])
for name, default in (("seed", 0), ("fold", None), ("epochs", 8), ("pretraining", 12), ("lr", None)):
    parser.add_argument(f"--{name}", type=float if name == "lr" else int, default=default)
options = parser.parse_args()
L.seed_everything(options.seed)
data = lc.data.EmojiDataModule(128, seed=options.seed, validation_fold=options.fold)
model = lc.SimCLR("small_vit", backbone_kwargs=SMALL, optimizer="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=0)
if options.pretraining:  # epochs on both artists, without labels
    fit(model, data.train_dataloader(), options.pretraining, options.seed)
noto = TensorDataset(data.artists("train")[0], data.labels("train").chunk(2)[0])
batches = DataLoader(noto, batch_size=128, shuffle=True, drop_last=True)
for row in options.rows:
    lr = options.lr or RATES[row]
    found = adapt(model.backbone, row, batches, lr, options.epochs, options.seed)
    line = {"row": row, "lr": lr, "seed": options.seed, "fold": options.fold}
    line["trained"] = sum(p.numel() for p in found.parameters() if p.requires_grad)
    for artist, images in zip(("noto", "fluent"), data.artists("val"), strict=True):
        logits = found.head(lc.evaluation.encode(found.backbone, images, VIEWS.eval_transform))
        line[artist] = round(float((logits.argmax(1) == data.labels("val").chunk(2)[0]).float().mean()), 4)
    print(json.dumps(line), flush=True)

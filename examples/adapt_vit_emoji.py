"""Adapt a pretrained ViT to labels of one artist: linear probe, fine-tuning, LP-FT and LoRA; judged on both artists."""

import argparse
import copy
import json
from pathlib import Path

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
    settings = QUIET | {"accelerator": "cpu", "limit_val_batches": 0, "num_sanity_val_steps": 0}
    L.Trainer(max_epochs=epochs, callbacks=[lc.ViewAugmentation(VIEWS, seed=seed)], **settings).fit(model, batches)
    return model.eval()


class Classifier(L.LightningModule):
    """A backbone and a linear head; what requires a gradient is trained."""

    def __init__(self, backbone, lr):
        super().__init__()
        self.backbone, self.head, self.lr = backbone, torch.nn.Linear(SMALL["embed_dim"], 9), lr

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
    if row == "LoRA":
        return fit(Classifier(lc.nn.add_lora(backbone, rank=4, alpha=8), lr), batches, epochs, seed)
    if row == "fine-tuning":
        return fit(Classifier(backbone, lr), batches, epochs, seed)
    probe = fit(Classifier(backbone.requires_grad_(False), RATES["linear probe"]), batches, epochs, seed)
    if row == "linear probe":
        return probe
    backbone.requires_grad_(True)  # LP-FT: the head is right before the features move
    probe.lr = lr
    return fit(probe.train(), batches, epochs, seed)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rows", nargs="+", choices=[*RATES], default=[*RATES])
for name, kind, default in (("lr", float, None), ("seed", int, 0), ("fold", int, None), ("epochs", int, 15)):
    parser.add_argument(f"--{name}", type=kind, default=default)  # a fold, 1-4: judge on training things
parser.add_argument("--pretraining", type=int, default=30, help="epochs of SimCLR on both artists, without labels")
parser.add_argument("--output", type=Path, default=Path("runs/adapt_vit"))
options = parser.parse_args()
L.seed_everything(options.seed)
data = lc.data.EmojiDataModule(128, seed=options.seed, validation_fold=options.fold)
model = lc.SimCLR("small_vit", backbone_kwargs=SMALL, optimizer="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=0)
path = options.output / f"{options.pretraining}_{options.seed}_{options.fold}.pt"
if path.exists():
    model.backbone.load_state_dict(torch.load(path, weights_only=True))
elif options.pretraining:
    fit(model, data.train_dataloader(), options.pretraining, options.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.backbone.state_dict(), path)
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

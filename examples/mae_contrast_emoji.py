"""How much contrast helps MAE: a weighted sum of the error of hidden pixels and of InfoNCE between two masked views.

All rows see the same views, with color operations; only the weight w of contrast changes: 0 is MAE, 1 contrast alone.
Judged on emoji that training never saw. "hidden pixels" is the squared error, of pixels normalized per patch.
"""

import argparse
import json
from pathlib import Path

import lightning as L
import torch

import lightning_contrast as lc

MEAN, STD = (0.84, 0.8, 0.75), (0.28, 0.26, 0.33)
SMALL = {"backbone_kwargs": {"embed_dim": 64, "depth": 3, "num_heads": 2}, "lr": 2e-3, "warmup_epochs": 2}
SMALL |= {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 4}


class ContrastiveMAE(lc.MAE):
    """MAE on two views, whose mean visible patches are contrasted: (1 - w) MAE + w NT-Xent."""

    def __init__(self, backbone, *, contrast_weight=0.1, temperature=0.2, **kwargs):
        super().__init__(backbone, **kwargs)
        self.contrast_weight, self.temperature = contrast_weight, temperature
        self.projector = lc.nn.build_head("simclr", self.feature_dim)
        self.save_hyperparameters()

    def pixel_loss(self, images):
        """Return the error of hidden pixels, and features (B, F) of the visible patches."""
        features, prediction, split = self.predict_pixels(images)
        sizes = {"patch_size": self.patch_size, "normalize_pixels": self.normalize_pixels}
        return lc.losses.masked_pixel_loss(images, prediction, split.mask, **sizes), features

    def training_step(self, batch, batch_idx):
        """Return the weighted sum of both losses."""
        (pixels_a, a), (pixels_b, b) = map(self.pixel_loss, self.batch_views(batch, count=2))
        contrast = lc.losses.nt_xent(self.projector(a), self.projector(b), temperature=self.temperature)
        loss = (1 - self.contrast_weight) * (pixels_a + pixels_b) / 2 + self.contrast_weight * contrast
        self.log("train/loss", loss, batch_size=len(a))
        return {"loss": loss, "features": a.detach()}


@torch.no_grad()
def judge(model, data, policy):
    """Return figures of a frozen model."""
    parts = (data.images("train"), *data.artists("val"))
    train, noto, fluent = (lc.evaluation.encode(model, part, policy.eval_transform) for part in parts)
    known, new, both = data.labels("train"), data.labels("val"), torch.cat([noto, fluent])
    found = {"k-NN": lc.evaluation.knn_top1(train, known, both, new, num_classes=data.num_classes)}
    found["linear"] = lc.evaluation.linear_top1(train, known, both, new)
    found["recall@1"] = lc.evaluation.recall_at_1(noto, fluent)
    torch.manual_seed(0)  # the masks
    found["hidden pixels"] = float(model.eval().pixel_loss(policy.eval_transform(data.images("val")))[0])
    return {key: round(value, 4) for key, value in found.items()}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--weights", type=float, nargs="+", default=[0, 0.1, 0.3, 0.5, 1])
parser.add_argument("--epochs", type=int, default=30, help="0: random weights")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fold", type=int, help="1 to 4: judge on a fold of the training things")
parser.add_argument("--output", type=Path, default=Path("mae_contrast_emoji.jsonl"), help="gets a line per run")
options = parser.parse_args()
for weight in options.weights:
    L.seed_everything(options.seed)
    data = lc.data.EmojiDataModule(128, seed=options.seed, validation_fold=options.fold)
    model = ContrastiveMAE("small_vit", contrast_weight=weight, **SMALL)
    views = [lc.augment.ViewSpec(32, (0.4, 1.0), (0.4, 0.4, 0.4, 0.1))] * 2
    policy = lc.augment.make_policy(views, mean=MEAN, std=STD)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    quiet["callbacks"] = [lc.ViewAugmentation(policy), lc.StepSeed(options.seed)]
    if options.epochs:
        L.Trainer(max_epochs=options.epochs, accelerator="cpu", **quiet).fit(model, data)
    run = {"weight": weight, "epochs": options.epochs, "seed": options.seed, "fold": options.fold}
    line = json.dumps(run | judge(model, data, policy))
    print(line, flush=True)
    with options.output.open("a") as file:
        file.write(line + "\n")

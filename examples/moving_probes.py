"""Probes of frozen features of moving emoji, which `temporal_emoji.py` and `vjepa_emoji.py` share.

Probes of thing and motion are trained on the training clips and judged on things never seen. The moment: is the nearest
of a video's 4 local clips, under another augmentation, that of the same moment (chance 0.25)?
"""

import argparse
import json
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F

import lightning_contrast as lc


def clip_policy(local_clips, **statistics):
    # Without flips, which would swap left and right; both augmentations have the same settings.
    spec = lc.augment.ViewSpec(32, (0.5, 1.0), (0.4, 0.4, 0.4, 0.1), gray_p=0.2, flip=0.0)
    return lc.augment.clip_views(32, frames=4, stride=4, local_clips=local_clips, specs=[spec, spec], **statistics)


@torch.no_grad()
def moments(model, clips, policy):
    """Return the share of local clips whose nearest clip of the other augmentation is that of their moment."""
    torch.manual_seed(0)
    hits = []
    for part in clips.split(104):
        views = torch.stack([F.normalize(model(view), dim=1) for view in policy(part)[2:]])  # (8, B, F)
        similarity = torch.einsum("jbd,kbd->bjk", *views.chunk(2))
        hits.append(similarity.argmax(2) == torch.arange(4))
    return float(torch.cat(hits).float().mean())


def judge(model, data, **statistics):
    """Return accuracies of frozen features of clips of 4 frames."""
    model.eval()
    policy = clip_policy(4, **statistics)
    train, test = (lc.evaluation.encode(model, data.images(s), policy.eval_transform) for s in ("train", "val"))
    found = {"moment": moments(model, data.images("val"), policy)}
    for name, classes in (("things", data.num_classes), ("motions", data.num_motions)):
        labels = [getattr(data.dataset(split), name) for split in ("train", "val")]
        found[f"{name} linear"] = lc.evaluation.linear_top1(train, labels[0], test, labels[1])
        found[f"{name} k-NN"] = lc.evaluation.knn_top1(train, labels[0], test, labels[1], num_classes=classes)
    return {key: round(value, 4) for key, value in found.items()}


def run(description, rows, make, output, **statistics):
    """Train each row with each seed, and write what `judge` finds; ``make`` returns a model, views and epochs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", nargs="+", default=[*rows], choices=[*rows])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, help="batches per epoch, for a quick try")
    parser.add_argument("--fold", type=int, help="1 to 4: judge on a fold of the training things")
    parser.add_argument("--output", type=Path, default=Path(output), help="gets a line per run")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    for seed, row in ((seed, row) for seed in options.seeds for row in options.rows):
        L.seed_everything(seed)
        data = lc.data.MovingEmojiDataModule(64, seed=seed, validation_fold=options.fold)
        model, policy, epochs = make(rows[row], options.epochs)
        views = lc.ViewAugmentation(policy, seed=seed)
        if epochs:
            limit = {"max_epochs": epochs, "limit_train_batches": options.batches}
            L.Trainer(**limit, accelerator="cpu", callbacks=[views], **quiet).fit(model, data)
        line = json.dumps({"row": row, "seed": seed, "fold": options.fold, **judge(model, data, **statistics)})
        print(line, flush=True)
        with options.output.open("a") as file:
            file.write(line + "\n")

"""What instance contrast loses of a clip and temporal contrast keeps: things, motions and moments of moving emoji.

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

TEMPORAL_OFF = {"local_weight": 0.0, "global_local_weight": 0.0}
ROWS = {  # arguments of the method, local clips, and how many times the epochs
    "random": ({}, 0, 0),
    "instance": (TEMPORAL_OFF, 0, 1),
    "instance, as many frames": (TEMPORAL_OFF, 0, 5),
    "instance + temporal": ({}, 4, 1),
}


def clip_policy(local_clips):
    # Without flips, which would swap left and right; both augmentations have the same settings.
    spec = lc.augment.ViewSpec(32, (0.5, 1.0), (0.4, 0.4, 0.4, 0.1), gray_p=0.2, flip=0.0)
    return lc.augment.clip_views(32, frames=4, stride=4, local_clips=local_clips, specs=[spec, spec])


@torch.no_grad()
def moments(model, clips):
    """Return the share of local clips whose nearest clip of the other augmentation is that of their moment."""
    torch.manual_seed(0)
    hits = []
    for part in clips.split(104):
        views = torch.stack([F.normalize(model(view), dim=1) for view in clip_policy(4)(part)[2:]])  # (8, B, F)
        similarity = torch.einsum("jbd,kbd->bjk", *views.chunk(2))
        hits.append(similarity.argmax(2) == torch.arange(4))
    return float(torch.cat(hits).float().mean())


def judge(model, data):
    """Return accuracies of frozen features."""
    model.eval()
    encode = lambda split: lc.evaluation.encode(model, data.images(split), clip_policy(0).eval_transform)  # noqa: E731
    train, test = encode("train"), encode("val")
    found = {"moment": moments(model, data.images("val"))}
    for name, classes in (("things", data.num_classes), ("motions", data.num_motions)):
        labels = [getattr(data.dataset(split), name) for split in ("train", "val")]
        found[f"{name} linear"] = lc.evaluation.linear_top1(train, labels[0], test, labels[1])
        found[f"{name} k-NN"] = lc.evaluation.knn_top1(train, labels[0], test, labels[1], num_classes=classes)
    return {key: round(value, 4) for key, value in found.items()}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS])
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--fold", type=int, help="1 to 4: judge on a fold of the training things")
parser.add_argument("--output", type=Path, default=Path("temporal_emoji.jsonl"), help="gets a line per run")
arguments = parser.parse_args()
warnings.filterwarnings("ignore")
for seed in arguments.seeds:
    for row in arguments.rows:
        settings, local_clips, factor = ROWS[row]
        L.seed_everything(seed)
        data = lc.data.MovingEmojiDataModule(64, seed=seed, validation_fold=arguments.fold)
        model = lc.TemporalContrast("small_video_convnet", lr=2e-3, weight_decay=0.01, warmup_epochs=1, **settings)
        views = lc.ViewAugmentation(clip_policy(local_clips), seed=seed)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
        if factor:
            epochs = factor * arguments.epochs
            L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[views], **quiet).fit(model, data)
        line = json.dumps({"row": row, "seed": seed, "fold": arguments.fold, **judge(model, data)})
        print(line, flush=True)
        with arguments.output.open("a") as file:
            file.write(line + "\n")

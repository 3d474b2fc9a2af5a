"""Predictive coding over the frames of moving emoji: does the model pick the frame that follows, and what does it know?

Judged on clips of things that training never saw, before and after training: the accuracy of picking the frame k steps
ahead, and k-NN accuracy of thing and motion on frame features (their mean over time) and on the context.
"""

import argparse
import json
import warnings
from pathlib import Path

import lightning as L
import torch

import lightning_contrast as lc


@torch.no_grad()
def future(model, clips):
    """Return how often the frame k steps ahead beats 128 drawn ones, and all other frames of its clip; means over k."""
    torch.manual_seed(0)
    drawn, own = [], []
    for part in clips.split(104):
        frames = lc.nn.clip_steps(model.backbone, part)  # (B, T, F)
        context, matrices = model.predictor(frames)
        batch, time = lc.losses.draw_time_negatives(frames, steps=model.steps, negatives=128)
        window = time.shape[2]
        negatives = frames[batch, (time + torch.arange(window)) % frames.shape[1]]  # (B, 128, T - K, F)
        for k, matrix in enumerate(matrices, 1):
            made = context[:, :window] @ matrix.T  # (B, T - K, F)
            right = (made * frames[:, k : k + window]).sum(2)
            drawn.append(right > torch.einsum("btf,bntf->bnt", made, negatives).amax(1))
            scores = made @ frames.mT  # (B, T - K, T)
            own.append(scores.argmax(2) == torch.arange(k, k + window))
    return {name: float(torch.cat(hits).float().mean()) for name, hits in (("of 129", drawn), ("of its clip", own))}


@torch.no_grad()
def judge(model, data, policy):
    """Return accuracies of a frozen model."""
    model.eval()
    clips = {split: policy.eval_transform(data.images(split)) for split in ("train", "val")}
    found = future(model, clips["val"])
    for space, encode in (("features", model), ("context", model.context)):
        train, test = (torch.cat([encode(part) for part in clips[split].split(104)]) for split in ("train", "val"))
        for name, classes in (("things", data.num_classes), ("motions", data.num_motions)):
            labels = [getattr(data.dataset(split), name) for split in ("train", "val")]
            top1 = lc.evaluation.knn_top1(train, labels[0], test, labels[1], num_classes=classes)
            found[f"{name}, {space}"] = top1
    return {key: round(value, 4) for key, value in found.items()}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batches", type=int, help="batches per epoch, for a quick try")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fold", type=int, help="1 to 4: judge on a fold of the training things")
parser.add_argument("--output", type=Path, default=Path("cpc_over_time.json"))
options = parser.parse_args()
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
L.seed_everything(options.seed)
data = lc.data.MovingEmojiDataModule(64, seed=options.seed, validation_fold=options.fold)
policy = lc.augment.cpc_clip_views(32, frames=16, flip=0.0)  # a flip would swap left and right
model = lc.TemporalCPC("small_convnet", steps=8, lr=2e-3, warmup_epochs=1)
results = {"random weights": judge(model, data, policy)}
print(json.dumps(results), flush=True)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
views = lc.ViewAugmentation(policy, seed=options.seed)
limit = {"max_epochs": options.epochs, "limit_train_batches": options.batches}
trainer = L.Trainer(**limit, accelerator="cpu", callbacks=[views], **quiet)
trainer.fit(model, data)
results["trained"] = judge(model, data, policy)
results |= {"loss": round(float(trainer.callback_metrics["train/loss"]), 3), "seed": options.seed, "fold": options.fold}
options.output.write_text(json.dumps(results, indent=1) + "\n")
print(json.dumps(results))

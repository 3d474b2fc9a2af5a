"""Train GLoRIA on scenes of two emoji with captions, and measure how much of a word's attention lies on its thing.

A scene's thing has one or two words, whose attention is averaged. Uniform attention would lie on a thing with a share
that is the thing's area. All scenes that are judged are new, of things seen in training or of unseen things.
"""

import argparse
import json
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast import evaluation


@torch.no_grad()
def judge(model, policy, scenes, split, count=512):
    """Return means over the named things of the last scenes, and the attention of both things (N, 2, h, w)."""
    model.eval()
    images, texts, pairs = scenes.images(split)[-count:], scenes.captions(split)[-count:], scenes.pairs(split)[-count:]
    masks, found, maps = scenes.masks(split)[-count:].float(), [], []
    attention, _ = model.attention(policy.eval_transform(images), texts)  # (N, T, h, w)
    for i, (text, pair) in enumerate(zip(texts, pairs.tolist(), strict=True)):
        first, second = (len(scenes.emoji.names[row].split("-")) for row in pair)  # words of the names
        words = len(text.split())
        of_things = attention[i, :first].mean(0), attention[i, words - second : words].mean(0)
        covered = F.adaptive_avg_pool2d(masks[i], attention.shape[2:])  # share of each region that a thing covers
        for place, word in enumerate(of_things):
            found.append([(word * covered[place]).sum(), masks[i, place].mean(), (word * covered[1 - place]).sum()])
        maps.append(torch.stack(of_things))
    names = ("attention on the thing", "area of the thing", "attention on the other thing")
    means = {name: round(float(value), 4) for name, value in zip(names, torch.tensor(found).mean(0), strict=True)}
    return means, torch.stack(maps)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=16)
parser.add_argument("--scenes", type=int, default=4096)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--layer", default="stages.1", help="layer of the convnet that gives the regions")
parser.add_argument("--pieces", choices=("sum", "mean"), default="mean")
parser.add_argument("--fold", type=int, help="judge on a fold of the training things instead of the test things")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("gloria"))
options = parser.parse_args()
torch.set_num_threads(1)
L.seed_everything(options.seed)
data = lc.data.EmojiScenesDataModule(32, scenes=options.scenes, seed=options.seed, validation_fold=options.fold)
longer = lc.data.EmojiScenesDataModule(scenes=options.scenes + 512, validation_fold=options.fold)  # the last are new
policy = lc.augment.image_text_views(80, scale=(0.9, 1.0), mean=(0.84, 0.8, 0.75), std=(0.28, 0.26, 0.33))
settings = {"region_layer": options.layer, "context_length": 80, "pieces": options.pieces, "lr": options.lr}
settings |= {"weight_decay": 0.05, "warmup_epochs": 1, "text_kwargs": {"layers": 1}}
model = lc.GLoRIA("small_convnet", **settings)
results = {"random weights": judge(model, policy, longer, "train")[0]}
start = time.process_time()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
callbacks = [lc.ViewAugmentation(policy), lc.StepSeed(options.seed)]
trainer = L.Trainer(max_epochs=options.epochs, accelerator="cpu", gradient_clip_val=1.0, callbacks=callbacks, **quiet)
trainer.fit(model, datamodule=data)
seconds = time.process_time() - start
results["new scenes of things seen in training"], maps = judge(model, policy, longer, "train")
results["scenes of unseen things"], unseen = judge(model, policy, data, "val")
options.output.mkdir(parents=True, exist_ok=True)
images = torch.cat([longer.images("train")[-512:-508], data.images("val")[-512:-508]])
print(*longer.captions("train")[-512:-508], *data.captions("val")[-512:-508], sep="; ")
figure = evaluation.attention_grid(images, torch.cat([maps[:4], unseen[:4]]), names=["first thing", "second thing"])
figure.savefig(options.output / "attention.png")
results |= {"seconds": round(seconds), "loss": float(trainer.callback_metrics["train/loss"]), "seed": options.seed}
(options.output / "results.json").write_text(json.dumps(results, indent=1))
print(json.dumps(results))

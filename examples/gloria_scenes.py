"""Train GLoRIA on scenes of two emoji with captions, and measure how much of a word's attention lies on its thing."""

import argparse
import json
import time
from pathlib import Path

import lightning as L
import torch

import lightning_contrast as lc
from lightning_contrast import evaluation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=40)
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
data = lc.data.EmojiScenesDataModule(64, scenes=options.scenes, seed=options.seed, validation_fold=options.fold)
policy = lc.augment.image_text_views(80, scale=(0.9, 1.0), mean=(0.84, 0.8, 0.75), std=(0.28, 0.26, 0.33))
model = lc.GLoRIA(
    "small_convnet",
    region_layer=options.layer,
    context_length=80,
    pieces=options.pieces,
    lr=options.lr,
    weight_decay=0.05,
    warmup_epochs=2,
)


seen = lc.data.EmojiScenesDataModule(scenes=options.scenes + 512, validation_fold=options.fold)  # 512 more scenes


@torch.no_grad()
def judge(scenes, split):
    """Return shares per named thing: of attention on it, of the image it covers, of attention on the other thing."""
    model.eval()
    texts, masks, found = scenes.captions(split)[-512:], scenes.masks(split)[-512:].float(), []
    attention, _ = model.attention(policy.eval_transform(scenes.images(split)[-512:]), texts)
    for i, (text, pair) in enumerate(zip(texts, scenes.pairs(split)[-512:].tolist(), strict=True)):
        first, second = (len(scenes.emoji.names[row].split("-")) for row in pair)  # words of the names
        words = len(text.split())
        area = torch.nn.functional.adaptive_avg_pool2d(masks[i], attention.shape[2:])  # covered share of each region
        for place, span in enumerate((slice(0, first), slice(words - second, words))):
            word = attention[i, span].mean(0)
            found.append([(word * area[place]).sum(), masks[i, place].mean(), (word * area[1 - place]).sum()])
    names = ("attention on the thing", "area of the thing", "attention on the other thing")
    return dict(zip(names, torch.tensor(found).mean(0).tolist(), strict=True)), attention


results = {"random weights": judge(seen, "train")[0]}
start = time.process_time()
trainer = L.Trainer(
    max_epochs=options.epochs,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    limit_val_batches=0,
    gradient_clip_val=1.0,
    callbacks=[lc.ViewAugmentation(policy), lc.StepSeed(options.seed)],
)
trainer.fit(model, datamodule=data)
seconds = time.process_time() - start
results["things seen in training"], attention = judge(seen, "train")
results["unseen things"], _ = judge(data, "val")

options.output.mkdir(parents=True, exist_ok=True)
print(*seen.captions("train")[-512:-508], sep="; ")
figure = evaluation.attention_grid(seen.images("train")[-512:-508], attention[:4, :4])
figure.savefig(options.output / "attention.png")
results |= {"seconds": round(seconds), "loss": float(trainer.callback_metrics["train/loss"]), "seed": options.seed}
(options.output / "results.json").write_text(json.dumps(results, indent=1))
print(json.dumps(results))

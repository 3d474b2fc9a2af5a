"""Pretrain SimCLR on the bundled emoji with two online probes and plot the results: `make demo`."""

import argparse
import json
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch import callbacks, loggers

import lightning_contrast as lc
from lightning_contrast import evaluation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=340)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fold", type=int, help="validate on this fold (1-4) of the training set")
parser.add_argument("--stock", action="store_true", help="use stock Kornia operations for the views")
parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
options, start = parser.parse_args(), time.perf_counter()

# Positives are two views of one drawing; the two artists are never paired in training.
L.seed_everything(options.seed)
data = lc.data.EmojiDataModule(batch_size=256, seed=options.seed, validation_fold=options.fold)
mean, std = lc.data.estimate_mean_std(data)
policy = lc.augment.simclr_cifar_views(32, mean=mean, std=std, fused=not options.stock)
model = lc.SimCLR(
    "small_convnet", temperature=0.1, optimizer="adamw", lr=2e-3, weight_decay=1e-4, warmup_epochs=options.epochs // 60
)
trainer = L.Trainer(
    max_epochs=options.epochs,
    check_val_every_n_epoch=max(options.epochs // 10, 1),
    accelerator="cpu",  # for reproducible results; omit it to use an accelerator
    logger=loggers.TensorBoardLogger(options.output, name="logs", version=""),
    log_every_n_steps=5,
    callbacks=[
        lc.ViewAugmentation(policy, seed=options.seed),
        lc.OnlineLinearProbe(num_classes=data.num_classes),
        lc.OnlineKNN(num_classes=data.num_classes),
        callbacks.ModelCheckpoint(options.output, filename="simclr", enable_version_counter=False),
    ],
)


def features(network: torch.nn.Module) -> list[torch.Tensor]:
    """Return the features of the training images and of the validation images by each artist."""
    return [evaluation.encode(network, x, policy.eval_transform) for x in (data.images("train"), *data.artists("val"))]


def score(train: torch.Tensor, noto: torch.Tensor, fluent: torch.Tensor) -> dict[str, float]:
    """Return k-NN and linear accuracy over 9 groups, and recall@1 of the same emoji by the other artist."""
    split = (train, data.labels("train"), torch.cat([noto, fluent]), data.labels("val"))
    return {
        "knn": evaluation.knn_top1(*split, num_classes=data.num_classes),
        "linear": evaluation.linear_top1(*split),
        "recall@1": evaluation.recall_at_1(noto, fluent),
    }


train_pixels, test_pixels = evaluation.pixel_features(data.images("train"), torch.cat(data.artists("val")))
random = features(model)
trainer.fit(model, datamodule=data)
trained = features(model)
spaces = {"pixels": (train_pixels, *test_pixels.chunk(2)), "random": random, "trained": trained}
results = {name: score(*of) for name, of in spaces.items()}
noto, fluent = data.artists("val")
queries = torch.arange(3, len(noto), len(noto) // 10)[:10]
pairs = [(title, of[1][queries], of[2]) for title, of in {"before": random, "after": trained}.items()]
evaluation.view_grid(noto[queries], policy(noto[queries]), mean=mean, std=std).savefig(options.output / "views.png")
evaluation.neighbour_strips(noto[queries], fluent, pairs).savefig(options.output / "neighbours.png")
evaluation.image_map(torch.cat([noto, fluent]), torch.cat(trained[1:])).savefig(options.output / "map.png")
torch.save(model.backbone.state_dict(), options.output / "backbone.pt")
results |= {"seconds": round(time.perf_counter() - start, 1), "seed": options.seed}
(options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
print(f"\nfeatures      k-NN            linear          recall@1     (figures and weights in {options.output})")
for name in spaces:  # the two drawings of an emoji count as one sample
    cells = [f"{p:7.3f} ± {1.96 * (p * (1 - p) / len(noto)) ** 0.5:.3f}" for p in results[name].values()]
    print(f"{name:10}", *cells)
print(f"{results['seconds']:.0f} s, seed {options.seed}; ± is the 95 % interval of a sample of {len(noto)} emoji")

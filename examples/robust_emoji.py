"""Clean and robust accuracy of a linear head on frozen features: SimCLR, RoCL, and SimCLR with AdvProp's BatchNorm."""

import argparse
import json
import statistics
import time
from pathlib import Path

import lightning as L
import torch
from sklearn.linear_model import LogisticRegression

import lightning_contrast as lc
from lightning_contrast import evaluation

ATTACK = {"epsilon": 8 / 255, "step_size": 0.015, "steps": 3}  # of the training
BUDGET = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "warmup_epochs": 2}
ROWS = {
    "SimCLR": lambda: (lc.SimCLR("small_convnet", temperature=0.2, **BUDGET), []),
    "RoCL": lambda: (lc.RoCL("small_convnet", hidden_dim=256, **ATTACK, **BUDGET), []),
    "AdvProp-SimCLR": lambda: (ROWS["SimCLR"]()[0], [lc.AdversarialView(**ATTACK, add=True, auxiliary_batchnorm=True)]),
}
RADII = (0, 2, 4, 8)  # of the attacks that are judged, in 1/255


def linear_head(features, labels):
    """Return logistic regression on standardized features as a layer; the same as `evaluation.linear_top1` fits."""
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-8)
    fitted = LogisticRegression(C=0.1, max_iter=2000).fit(((features - mean) / std).numpy(), labels.numpy())
    weight = torch.from_numpy(fitted.coef_).float() / std
    layer = torch.nn.Linear(len(mean), len(weight)).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.from_numpy(fitted.intercept_) - weight @ mean)
    return layer


def accuracy(network, images, labels, radius, seed):
    """Return the accuracy on images (N, 3, h, w) in 0..1 that PGD with 20 steps moved by at most radius / 255."""
    attack = {"epsilon": radius / 255, "step_size": radius / 255 / 4, "steps": 20 if radius else 0}
    attacked = lc.augment.pgd_attack(
        lambda pixels: torch.nn.functional.cross_entropy(network(pixels), labels),
        images,
        **attack,
        random_start=True,
        generator=torch.Generator().manual_seed(seed),
    )
    return float((network(attacked).argmax(1) == labels).float().mean())


def run(row, seed, epochs, fold):
    """Train one row, fit the head on clean training images, and judge it."""
    L.seed_everything(seed)
    start = time.process_time()
    data = lc.data.EmojiDataModule(256, seed=seed, validation_fold=fold)
    views, (model, more) = lc.ViewAugmentation(lc.RoCL.views(32), seed=seed), ROWS[row]()
    callbacks = [views, *more, lc.StepSeed(seed)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_epochs=epochs, accelerator="cpu", limit_val_batches=0, callbacks=callbacks, **quiet).fit(model, data)
    prepare, labels = views.policy.eval_transform, data.labels("val")
    train, images = evaluation.encode(model, data.images("train"), prepare), prepare(data.images("val"))
    network = torch.nn.Sequential(model.backbone, linear_head(train, data.labels("train"))).requires_grad_(False).eval()
    found = {f"{radius}/255": round(accuracy(network, images, labels, radius, seed), 4) for radius in RADII}
    return {"row": row, "seed": seed, "epochs": epochs, "seconds": round(time.process_time() - start), **found}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
for name, kind, default in (("epochs", int, 30), ("fold", int, None), ("output", Path, Path("robust_emoji"))):
    parser.add_argument(f"--{name}", type=kind, default=default)  # a fold, 1-4: judge on training things
options = parser.parse_args()
options.output.mkdir(exist_ok=True)
for row in options.rows:
    figures = []
    for seed in options.seeds:
        path = options.output / f"{row}-{seed}-{options.epochs}-{options.fold}.json"
        path.exists() or path.write_text(json.dumps(run(row, seed, options.epochs, options.fold)))
        figures.append(json.loads(path.read_text()))
    means = {f"{r}/255": round(statistics.mean(figure[f"{r}/255"] for figure in figures), 3) for r in RADII}
    print(row, means, "seconds", [figure["seconds"] for figure in figures])

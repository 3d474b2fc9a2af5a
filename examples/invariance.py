"""Pretrain SimCLR on the bundled emoji with and without color jitter, and plot the invariances of the encoders."""

import argparse
import json
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure

import lightning_contrast as lc
from lightning_contrast import evaluation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--samples", type=int, default=256)
parser.add_argument("--output", type=Path, default=Path("runs/invariance"))
options = parser.parse_args()
data = lc.data.EmojiDataModule(batch_size=256, seed=options.seed)
statistics = dict(zip(("mean", "std"), lc.data.estimate_mean_std(data), strict=True))


def mean_colors(images: torch.Tensor) -> torch.Tensor:
    """Return the mean color (N, 3) of each image minus its mean intensity."""
    means = images.double().mean(dim=(2, 3))
    return means - means.mean(dim=1, keepdim=True)


def color_scores(train: torch.Tensor, test: torch.Tensor) -> tuple[float, float]:
    """Return the explained variance of the mean color, by the nearest image and by least squares; at most 1."""
    known, wanted = mean_colors(data.images("train")), mean_colors(torch.cat(data.artists("val")))
    nearest = torch.corrcoef(test).fill_diagonal_(-1).argmax(dim=1)
    rows = [torch.cat([x, torch.ones(len(x), 1)], dim=1).double() for x in (train, test)]
    read = rows[1] @ torch.linalg.lstsq(rows[0], known).solution
    missed = [float((wanted - found).square().sum()) for found in (wanted.mean(dim=0), wanted[nearest], read)]
    return 1 - missed[1] / (2 * missed[0]), 1 - missed[2] / missed[0]  # two random images differ by twice the variance


def train(color: bool) -> tuple[dict[str, object], dict[str, object]]:
    """Train once and return the results at random weights and after training."""
    L.seed_everything(options.seed, verbose=False)
    jitter = {"jitter": (0.8, 0.8, 0.8, 0.2), "gray_p": 0.2} if color else {}  # full strength of SimCLR
    policy = lc.augment.make_policy(2 * [lc.augment.ViewSpec(32, (0.08, 1.0), bicubic=True, **jitter)], **statistics)
    settings = {"temperature": 0.1, "optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-4, "warmup_epochs": 1}
    model = lc.SimCLR("small_convnet", **settings)
    monitor = lc.InvarianceMonitor(samples=options.samples, every_n_epochs=options.epochs)
    monitors = [lc.ViewAugmentation(policy, seed=options.seed), monitor]
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "callbacks": monitors}
    trainer = L.Trainer(max_epochs=options.epochs, check_val_every_n_epoch=options.epochs, **quiet)
    found = []
    for run in (trainer.validate, trainer.fit):
        run(model, datamodule=data)
        groups = (data.images("train"), *data.artists("val"))
        bank, noto, fluent = (evaluation.encode(model, images, policy.eval_transform) for images in groups)
        test = torch.cat([noto, fluent])
        knn = evaluation.knn_top1(bank, data.labels("train"), test, data.labels("val"), num_classes=data.num_classes)
        neighbor, linear = color_scores(bank, test)
        found.append({"knn": knn, "neighbor_color": neighbor, "linear_color": linear, **monitor.curves})
    return found[0], found[1]


without, jittered = train(color=False), train(color=True)
results = {"random weights": without[0], "without color jitter": without[1], "with color jitter": jittered[1]}
options.output.mkdir(parents=True, exist_ok=True)
(options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
figure = Figure(figsize=(11, 4.8), dpi=90, layout="constrained")
names = [name for name, curve in without[1].items() if isinstance(curve, list)]
for axes, name in zip(figure.subplots(2, 5, sharey=True).flat, names, strict=True):
    for (label, result), style in zip(results.items(), ("0.6", "C0", "C1"), strict=True):
        points = [(0.0, 1.0), *result[name]]
        axes.plot(*zip(*points, strict=True), "o-", color=style, markersize=3, label=label)
    axes.axhline(0, color="0.8", linestyle=":")
    axes.set_title(name, fontsize=10)
figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
figure.supylabel("similarity (1: invariant, 0: as another image)", fontsize=9)
figure.savefig(options.output / "invariance.png")
for name, result in results.items():
    ends = "  ".join(f"{change} {result[change][-1][1]:.2f}" for change in names)  # at the largest strength
    print(name, *(f"{key} {value:.3f}" for key, value in result.items() if key not in names), ends, sep="; ")

"""The policies of `augment.domains` and ImageNet's SimCLR policy on generated images of each domain, at one budget.

``python -m benchmarks.domains`` trains SimCLR on every set of `benchmarks/_domain_sets.py` with each of the two
policies and three seeds, one thread per run, and stores each result when the run ends; it resumes after an
interruption and repeats what changed. Raw pixels and random weights are the baselines. docs/domains_compared.md has
the table.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import lightning_contrast as lc
from benchmarks._domain_sets import EDGE, SETS, DomainImages, draw_split
from benchmarks.common import RESULTS, machine, report
from benchmarks.learn import fingerprint
from lightning_contrast import evaluation
from lightning_contrast.augment import domains, simclr_views
from lightning_contrast.augment.images import rescale

FOLDER = RESULTS / "domains"
PAGE = Path(__file__).parents[1] / "docs" / "domains_compared.md"
POLICIES: dict[str, Callable[..., Any]] = {
    "histology": domains.histology_views,
    "satellite": domains.satellite_views,
    "chest": domains.chest_xray_views,
    "industrial": domains.industrial_views,
    "microscopy": domains.microscopy_views,
}
ROWS = ("raw pixels", "random weights", "ImageNet's policy", "domain's policy")
BUDGET: dict[str, Any] = {
    "backbone": "small_convnet",
    "width": 16,
    "temperature": 0.2,
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.01,
    "warmup_epochs": 3,
}
VIEW = 32
"""Edge of the views in pixels. Features are those of the whole image at 48 pixels, in which objects are as large as in
an average view (https://arxiv.org/abs/1906.06423)."""
SIZES = {"train": 2000, "test": 1000, "batch_size": 128}
NOTES = (
    "k-NN top-1 (20 neighbors, T = 0.07) of frozen features of generated images of 48 pixels, mean over seeds, each "
    "of which draws its own set, weights, order and views. SimCLR with the small convnet, the same for both policies."
)


def policy_of(name: str, row: str, images: Tensor, size: int = VIEW) -> Any:
    """Return the policy of a row, with the defaults of its function and the statistics of the training images.

    Args:
        name: Name of the set.
        row: One of `ROWS`; those without training have the domain's policy.
        images: Training images (N, C, 48, 48) as stored.
        size: Edge of the views, and of the result of `eval_transform`.
    """
    domain = SETS[name]
    pixels = rescale(images, (0.0, float(domain.white)))
    options: dict[str, Any] = {"mean": pixels.mean((0, 2, 3)).tolist(), "std": pixels.std((0, 2, 3)).tolist()}
    if row == "ImageNet's policy":
        return simclr_views(size, channels=domain.channels, color=domain.channels == 3, **options)
    return POLICIES[name](size, channels=domain.channels, scale=domain.scale, **options)


def run(name: str, row: str, seed: int, epochs: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Train one row on one set with one seed, and return the accuracies of its frozen features.

    Args:
        name: Name of the set.
        row: One of `ROWS`.
        seed: Seed of the set, the weights, the order and the views.
        epochs: Epochs of the training.
        sizes: Arguments of `DomainImages`.

    Returns:
        The figures of the run; ``seconds`` are those of the processor for training and evaluation.
    """
    L.seed_everything(seed, verbose=False)
    unit = row == "ImageNet's policy" and SETS[name].scale is not None  # it has no `scale=`
    data = DomainImages(name, seed, unit=unit, **sizes)
    stored = draw_split(name, seed, "train", sizes["train"])[0]
    policy, whole = policy_of(name, row, stored), policy_of(name, row, stored, EDGE)
    images = (data.images("train"), data.images("val"))
    start = time.process_time()
    if row == "raw pixels":
        bank, queries = evaluation.pixel_features(*images)
    else:
        budget = dict(BUDGET)
        kwargs = {"channels": policy.channels, "width": budget.pop("width")}
        model = lc.SimCLR(backbone_kwargs=kwargs, **budget)
        if row != "random weights":
            trainer = L.Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                devices=1,
                logger=False,
                limit_val_batches=0,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[lc.ViewAugmentation(policy), lc.StepSeed(seed)],
            )
            trainer.fit(model, datamodule=data)
        bank, queries = (evaluation.encode(model, group, whole.eval_transform) for group in images)
    labels = (data.labels("train"), data.labels("val"))
    found = {"knn": evaluation.knn_top1(bank, labels[0], queries, labels[1], num_classes=data.num_classes)}
    for part, answers in SETS[name].parts:
        of_train, of_test = (torch.tensor(answers)[group] for group in labels)
        known = (bank[of_train >= 0], of_train[of_train >= 0], queries[of_test >= 0], of_test[of_test >= 0])
        found[part] = evaluation.knn_top1(*known, num_classes=1 + max(answers))
    seconds = round(time.process_time() - start, 1)
    return {"set": name, "row": row, "seed": seed, "seconds": seconds} | found


def settings_of(name: str, row: str, seed: int, epochs: int) -> dict[str, Any]:
    """Return all that a run depends on: the budget, and what images of the set and their views look like."""
    samples = {split: draw_split(name, seed, split, 20)[0] for split in ("train", "val")}
    policy = policy_of(name, row, samples["train"])
    given = samples["train"] if policy.scale is not None else samples["train"].float() / SETS[name].white
    torch.manual_seed(seed)
    pixels = [*samples.values(), *policy(given)]
    weights = torch.arange(1.0, 21.0)[:, None, None, None]  # the order of the images counts
    means = [round(float((weights * images.float()).mean()), 4) for images in pixels]
    return {"row": row, "epochs": epochs, "means": means, "view": VIEW} | BUDGET | SIZES


def summary(folder: Path) -> list[dict[str, Any]]:
    """Return one row per set: means over the seeds, the range of both policies, and their difference for each seed.

    Args:
        folder: The results, one file per run.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = []
    for name in [name for name in SETS if any(run["set"] == name for run in runs)]:
        for figure in ("knn", *(part for part, _ in SETS[name].parts)):
            by_row = {row: {r["seed"]: r for r in runs if (r["set"], r["row"]) == (name, row)} for row in ROWS}
            line: dict[str, Any] = {"set": name if figure == "knn" else f"{name}, {figure}"}
            for row in ROWS:
                values = [one[figure] for one in by_row[row].values()]
                line[row] = f"{statistics.mean(values):.3f}" if values else ""
                if row in ROWS[2:] and values:
                    line[row] += f" ({min(values):.3f}-{max(values):.3f})"
            theirs, ours = by_row[ROWS[2]], by_row[ROWS[3]]
            both = sorted(theirs.keys() & ours.keys())
            line["difference, per seed"] = ", ".join(f"{ours[s][figure] - theirs[s][figure]:+.3f}" for s in both)
            seconds = [one["seconds"] for row in ROWS[2:] for one in by_row[row].values()]
            line["seconds"] = f"{min(seconds):.0f}-{max(seconds):.0f}" if seconds else ""
            line["seeds"] = str(len(both))
            rows.append(line)
    return rows


def write_page(rows: list[dict[str, Any]], command: str) -> None:
    """Put the table into docs/domains_compared.md between its two marks, with the command and the machine.

    Args:
        rows: From `summary`.
        command: Command of the runs.
    """
    begin, end = "<!-- table -->", "<!-- end of table -->"
    before, rest = PAGE.read_text().split(begin)
    _, after = rest.split(end)
    here = machine()
    origin = f"`{command}`, one thread, {here['date']}, {here['processor']}, torch {here['versions']['torch']}."
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    PAGE.write_text("\n".join([f"{before}{begin}\n", origin, "", *lines, f"\n{end}{after}"]))


def main() -> None:
    """Train what is missing, print the table and write it to the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--output", type=Path, help="folder of the results; default: benchmarks/results/domains")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder = options.output or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    here = machine()
    for seed in options.seeds:
        for name in options.domains:
            for row in options.rows:
                config = fingerprint(settings_of(name, row, seed, options.epochs))
                path = folder / f"{name}-{row.replace(' ', '_').replace(chr(39), '')}-{seed}.json"
                if path.exists() and json.loads(path.read_text())["config"] == config:
                    continue
                record = run(name, row, seed, options.epochs, SIZES) | {"config": config}
                record |= {"date": here["date"], "processor": here["processor"], "torch": here["versions"]["torch"]}
                path.write_text(json.dumps(record, indent=1) + "\n")
                print(json.dumps(record), flush=True)
    if options.output is None:
        rows = summary(folder)
        report("domains", rows, NOTES)
        write_page(rows, "python -m benchmarks.domains")


if __name__ == "__main__":
    main()

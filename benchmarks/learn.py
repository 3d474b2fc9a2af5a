"""What each method learns on the bundled emoji in a small stated budget, beside references at the same budget.

``python -m benchmarks.learn`` trains every emoji recipe with three seeds, one thread a run, and writes each result as
the run ends, so that it goes on after a stop; a recipe that changed is trained again. ``--fold 1`` judges on a fold of
the training things instead of the test things: settings are chosen there, with ``--set key=value``. Recipes of students
get the backbone of the SimCLR recipe with the same seed as their teacher, which is trained once and kept.
"""

import argparse
import copy
import hashlib
import json
import logging
import os
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks._references import RAW, Classifier, raw_features
from benchmarks._variants import VARIANTS
from benchmarks.common import RESULTS, machine
from lightning_contrast.data import StructuredBatches

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
DOCS = Path(__file__).parents[1] / "docs"
RUNS = Path("runs") / "learn"
TAUGHT = ("distill", "seed")
"""Recipes of students; their teacher is the backbone of the SimCLR recipe with the same seed."""
ALONE = "simclr, width 8"
"""The student without a teacher."""
METHODS = sorted(path.stem.removesuffix("_emoji") for path in CONFIGS.glob("*_emoji.yaml"))
TRAINED = ("rotation", "supervised")
RANDOM = {
    "random convnet": "simclr",
    "random ViT": "dino",
    "random ViT of DINOv3": "dinov3",
    "random ViT, mean of patches": "ijepa",
    "random ViT, registers": "dinov2",
    "random ViT of MAE": "mae",
    "random ViT of SimMIM": "simmim",
    "random ViT of data2vec": "data2vec",
    "random video convnet, on clips": "temporal_contrast",
    "random convnet, on clips": "temporal_cpc",
    "random video ViT, on clips": "vjepa",
}
PROBES = ("OnlineLinearProbe", "OnlineKNN")
FIGURES = ("knn", "linear", "recall@1", "seconds")
UNTRAINED = (*RAW, *RANDOM)


def settings_of(name: str, seed: int, fold: int | None, changes: list[str], precision: str) -> dict[str, Any]:
    """Return the whole configuration of a run: the recipe with its seed, without probes, quiet, on one CPU.

    Args:
        name: A method, a variant of one, or a reference.
        seed: Of weights, order and views.
        fold: Fold of the training things to judge on; None judges on the test things.
        changes: ``key=value`` each, the key with dots from the top of the recipe.
        precision: Of the Trainer.
    """
    recipe, variant = VARIANTS.get(name, (RANDOM.get(name, name), []))
    recipe = "simclr" if recipe in (*RAW, *TRAINED) else recipe
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{recipe}_emoji.yaml").read_text())
    config["seed_everything"] = seed
    *wrappers, images = data_arguments(config)
    for arguments in (*wrappers, images):
        arguments["seed"] = seed
    images["validation_fold"] = fold
    trainer = config["trainer"]
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"] not in PROBES]
    for callback in trainer["callbacks"]:
        if callback["class_path"] == "StepSeed":
            callback["init_args"]["seed"] = seed
    trainer |= {"accelerator": "cpu", "devices": 1, "precision": precision, "logger": False, "limit_val_batches": 0}
    trainer |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    for change in [*variant, *changes]:
        key, value = change.split("=", 1)
        *path, last = key.split(".")
        place = config
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[last] = yaml.safe_load(value)
    if recipe in TAUGHT:
        config.setdefault("run", {})["teacher"] = settings_of("simclr", seed, fold, [], precision)
    return config


def data_arguments(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of the data module and of each one that it wraps; those of the images are the last.

    Args:
        config: Configuration of a run.
    """
    found = [config["data"]["init_args"]]
    while "source" in found[-1]:
        found.append(found[-1]["source"]["init_args"])
    return found


@contextmanager
def built(config: dict[str, Any]) -> Iterator[Any]:
    """Give the command line of a configuration, with its model, data module and Trainer, all of them unused.

    Args:
        config: From `settings_of`, without "run".
    """
    from lightning_contrast.cli import main

    sys.argv = sys.argv[:1]  # the command line of this program is not one of LightningCLI's
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(config))
        yield main(["--config", str(path), f"--trainer.default_root_dir={folder}"], run=False)


def teacher_of(config: dict[str, Any], folder: Path) -> Path:
    """Return the checkpoint of a trained teacher, which is trained if it is not there.

    Args:
        config: Configuration of its training.
        folder: Where teachers are kept, by the fingerprints of their configurations.
    """
    path = folder / f"{fingerprint(config)}.ckpt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with built(config) as cli:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            written = path.with_suffix(f".{os.getpid()}.ckpt")
            cli.trainer.save_checkpoint(written)
        written.replace(path)
    return path


def run(name: str, seed: int, config: dict[str, Any], teachers: Path = RUNS / "teachers") -> dict[str, Any]:
    """Train one row with one seed and judge its frozen features.

    Args:
        name: Name of the row.
        seed: The seed that ``config`` carries.
        config: From `settings_of`.
        teachers: Folder of the teachers of students.

    Returns:
        The figures of the run; ``seconds`` are those of the processor, on one thread, without those of a teacher, whose
        k-NN is ``teacher``.
    """
    from lightning_contrast import evaluation

    os.environ["TIMM_FUSED_ATTN"] = "0"  # its backward takes half of a step in bfloat16 on a CPU
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    config = copy.deepcopy(config)
    own = config.pop("run", {})
    if "teacher" in own:
        config["model"]["init_args"]["teacher"] = str(teacher_of(own["teacher"], teachers))
    start = time.process_time()
    with built(config) as cli:
        pairs, model, trainer = cli.datamodule, cli.model, cli.trainer
        data = getattr(pairs, "source", pairs)
        policy = next(c.policy for c in trainer.callbacks if hasattr(c, "policy"))
        if "near_neighbors" in own:
            pixels = torch.nn.functional.avg_pool2d(data.images("train").float() / 255, 4).flatten(1)
            data.batches = StructuredBatches(pixels, size=own["near_neighbors"])
        if name in TRAINED:
            backbone = config["model"]["init_args"]["backbone"]
            model = Classifier(backbone, task=name, num_classes=data.num_classes)
        if name not in UNTRAINED:
            trainer.fit(model, datamodule=pairs)
        images = (data.images("train"), *data.artists("val"))
        labels = (data.labels("train"), data.labels("val"))

        def spaces_of(network: Any) -> list[torch.Tensor]:
            return [evaluation.encode(network, group, policy.eval_transform) for group in images]

        def knn(train: torch.Tensor, *judged: torch.Tensor) -> float:
            return evaluation.knn_top1(train, labels[0], torch.cat(judged), labels[1], num_classes=data.num_classes)

        spaces = raw_features(name, data) if name in RAW else spaces_of(model)
        train, noto, fluent = spaces
        found = {
            "row": name,
            "seed": seed,
            "epochs": 0 if name in UNTRAINED else trainer.max_epochs,
            "knn": knn(*spaces),
            "linear": evaluation.linear_top1(train, labels[0], torch.cat([noto, fluent]), labels[1]),
            "recall@1": evaluation.recall_at_1(noto, fluent),
            "seconds": round(time.process_time() - start, 1),
        }
        return found | ({"teacher": knn(*spaces_of(model.teacher))} if "teacher" in own else {})


def fingerprint(config: dict[str, Any]) -> str:
    """Return a short name of a configuration, by which a finished run is known again."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def table(results: Path) -> str:
    """Return the Markdown table of all results in a folder: means over the seeds, and the spread of k-NN.

    Args:
        results: The folder, one file a run.
    """
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    order = [*RAW, *RANDOM, *TRAINED, *METHODS, *VARIANTS]
    lines = ["| row | epochs | k-NN | of seeds | linear | recall@1 | seconds | seeds |", "|" + "---|" * 8]
    for name in sorted({run["row"] for run in runs}, key=order.index):
        own = [run for run in runs if run["row"] == name]
        knn, linear, recall, seconds = ([run[figure] for run in own] for figure in FIGURES)
        mean = statistics.mean
        lines.append(
            f"| {name} | {own[0]['epochs']} | {mean(knn):.3f} | {min(knn):.3f}-{max(knn):.3f} | {mean(linear):.3f} "
            f"| {mean(recall):.3f} | {mean(seconds):.0f} | {len(own)} |"
        )
    return "\n".join(lines)


def kept(results: Path) -> str:
    """Return the Markdown table of the students: their k-NN, and the share of their teacher's that they keep.

    Args:
        results: The folder, one file a run.
    """
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    teachers = {run["seed"]: run["teacher"] for run in runs if "teacher" in run}
    lines = ["| student | k-NN | of seeds | share of the teacher's k-NN | seconds | seeds |", "|" + "---|" * 6]
    rows: dict[str, list[tuple[float, float, float]]] = {}
    if teachers:
        rows["the teacher"] = [(k, 1.0, 0.0) for k in teachers.values()]
    for run in runs:
        if "teacher" in run or (run["row"] == ALONE and run["seed"] in teachers):
            figures = (run["knn"], run["knn"] / teachers[run["seed"]], run["seconds"])
            rows.setdefault(run["row"], []).append(figures)
    for name, figures in sorted(rows.items(), key=lambda row: -statistics.mean(knn for knn, *_ in row[1])):
        knn, share, seconds = zip(*figures, strict=True)
        lines.append(
            f"| {name} | {statistics.mean(knn):.3f} | {min(knn):.3f}-{max(knn):.3f} | {statistics.mean(share):.3f} "
            f"| {statistics.mean(seconds):.0f} | {len(knn)} |"
        )
    return "\n".join(lines)


def origin(results: Path) -> str:
    """Return sentences that name the machine and torch version of each row: most rows' first, the others by name.

    A row whose seeds ran on several machines is named with those of its seeds that ran on the machine.

    Args:
        results: The folder, one file a run.
    """
    seeds: dict[str, dict[str, set[int]]] = {}
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        machine_of = f"{record['processor']}, torch {record['torch']}"
        seeds.setdefault(machine_of, {}).setdefault(record["row"], set()).add(record["seed"])
    most, *others = sorted(seeds, key=lambda machine: -len(seeds[machine]))
    lines = [f"`python -m benchmarks.learn`, one thread a run, bf16-mixed. Processor: {most}."]
    for other in others:
        names = []
        for row, own in sorted(seeds[other].items()):
            elsewhere = any(row in seeds[machine] for machine in seeds if machine != other)
            names.append(f"{row} (seed {', '.join(map(str, sorted(own)))})" if elsewhere else row)
        lines.append(f"{other}: {'; '.join(names)}.")
    return "\n".join(textwrap.fill(line, 120) for line in lines)


def write_page(name: str, text: str) -> None:
    """Put a table into a page of docs/ between its two marks.

    Args:
        name: Of the page.
        text: The table.
    """
    begin, end = "<!-- table -->", "<!-- end of table -->"
    before, rest = (DOCS / name).read_text().split(begin)
    _, after = rest.split(end)
    (DOCS / name).write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = [*RAW, *RANDOM, *TRAINED, *METHODS, *VARIANTS]
    parser.add_argument("--rows", nargs="+", default=every, choices=every)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fold", type=int, choices=(1, 2, 3, 4))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="only with --fold")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--output", type=Path, help="folder of the results; default: benchmarks/results/learn")
    options = parser.parse_args()
    if options.set and options.fold is None:
        parser.error("settings are chosen with --fold, never on the test things")
    results = options.output or (RESULTS / "learn" if options.fold is None else RUNS)
    results.mkdir(parents=True, exist_ok=True)
    waiting, here = {}, machine()
    origin_of_run = {"date": here["date"], "processor": here["processor"], "torch": here["versions"]["torch"]}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for seed in options.seeds:
            for name in options.rows:
                if name in RAW and seed != options.seeds[0]:
                    continue  # nothing is drawn
                config = settings_of(name, seed, options.fold, options.set, options.precision)
                tag = f"{name.replace(' ', '_')}-{seed}" + (f"-{fingerprint(config)}" if options.fold else "")
                path = results / f"{tag}.json"
                if path.exists() and json.loads(path.read_text())["config"] == fingerprint(config):
                    continue
                waiting[pool.submit(run, name, seed, config)] = (path, config)
        for done in as_completed(waiting):
            path, config = waiting[done]
            record = done.result() | {"config": fingerprint(config), "changes": options.set, "fold": options.fold}
            record |= origin_of_run
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(json.dumps(record), flush=True)
    if options.fold is None:
        print(table(results), kept(results), sep="\n\n")
        if options.output is None:
            write_page("learn.md", f"{origin(results)}\n\n{table(results)}")
            write_page("distillation.md", kept(results))


if __name__ == "__main__":
    main()

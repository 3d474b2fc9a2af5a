"""Kill a run fifty times and write the results to docs/faults.md: ``python -m tests.run_faults``."""

import argparse
import time
from collections import Counter
from pathlib import Path

import torch

import lightning_contrast as lc
from benchmarks.common import machine
from lightning_contrast.data import InMemoryDataModule
from tests.kill_runs import assert_survives_kills
from tests.methods.cases import TinyBackbone

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
MARKS = "<!-- kills: written by `make faults` -->", "<!-- end of kills -->"


class Images(InMemoryDataModule):
    """48 colored images with noise; the color is the class."""

    def read(self, split):
        labels = torch.arange(48) % 3
        noise = torch.randint(0, 128, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        noise[torch.arange(48), labels] += 127
        return noise, labels


def make_module():
    """Return a MoCo with every kind of state: momentum networks, a queue that wraps, BatchNorm."""
    return lc.MoCo(TinyBackbone(norm=True), queue_size=40, projection_dim=8, warmup_epochs=1, batchnorm_splits=2)


def make_data():
    return Images(8)


def make_callbacks():
    views = lc.ViewAugmentation(lc.augment.simclr_cifar_views(16))
    return [lc.StepSeed(0), views, lc.OnlineLinearProbe(3), lc.CollapseMonitor()]


def kill(kills, seed=0, make_module=make_module, **kwargs):
    settings = {"every_n_train_steps": 2, "max_epochs": 3, "timeout": 600.0} | kwargs  # a loaded machine is slow
    return assert_survives_kills(make_module, make_data, make_callbacks, kills=kills, seed=seed, **settings)


def table(landed, seconds):
    """Return the results as Markdown."""
    about, count = machine(), len(landed)
    phases = (("step", "in a step"), ("write", "while a checkpoint was written"), ("between", "between steps"))
    lines = [
        f"{count} of {count} runs ended bit-identical to the uninterrupted run. {about['date']}, "
        f"{about['processor']}, torch {about['versions']['torch']}, lightning {about['versions']['lightning']}, "
        f"{seconds:.0f} s.",
        "",
        "| killed | runs | left an incomplete file | resumed from a checkpoint | restarted |",
        "|---|---|---|---|---|",
    ]
    for phase, words in phases:
        those = [one for one in landed if one.phase == phase]
        halves, resumed = sum(one.half_written for one in those), sum(one.resumed_from > 0 for one in those)
        lines.append(f"| {words} | {len(those)} | {halves} | {resumed} | {len(those) - resumed} |")
    parts = Counter(one.function.split(" calling ")[0].split(".")[0] for one in landed)
    lines += [
        "",
        "Package of the running function: "
        + ", ".join(f"{name} {number}" for name, number in parts.most_common())
        + ".",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    landed = kill(options.kills, options.seed)
    text = table(landed, time.perf_counter() - start)
    print(text)
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()

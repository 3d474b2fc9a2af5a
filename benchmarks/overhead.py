"""What the plug-ins cost: a fit with all of them on beside a plain PyTorch loop that does the same model work."""

import argparse
import logging
import time
import warnings

import lightning as L
import torch

import lightning_contrast as lc
from benchmarks.common import report
from benchmarks.end_to_end import BATCH, fit
from lightning_contrast.losses import nt_xent


def model():
    """Return the method that both train."""
    torch.manual_seed(0)
    return lc.SimCLR("small_convnet", optimizer="sgd", lr=0.01, warmup_epochs=0)


def plain_loop(epochs):
    """The hand-written loop: index, make the views, forward, loss, backward, step."""
    module, policy = model(), lc.augment.simclr_cifar_views(32)
    images = lc.data.EmojiDataModule().images("train")
    groups = lc.optim.parameter_groups(module, 1e-6)
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    start = time.perf_counter()
    steps = 0
    for epoch in range(epochs):
        if epoch == 1:
            start = time.perf_counter()
        for rows in torch.randperm(len(images)).split(BATCH):
            if len(rows) < BATCH:
                continue
            view_a, view_b = policy(images[rows])
            projections = module.projector(module.backbone(torch.cat([view_a, view_b])))
            loss = nt_xent(*projections.chunk(2), temperature=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += epoch > 0
    return steps * BATCH / (time.perf_counter() - start)


def plugged(epochs, *plugins):
    """Our method in a Trainer with the given plug-ins."""
    views = lc.ViewAugmentation(lc.augment.simclr_cifar_views(32))
    return fit(model(), epochs, [views, *plugins], datamodule=lc.data.EmojiDataModule(BATCH))


def main():
    """Run the candidates in turn and report medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    candidates = {
        "plain PyTorch loop": lambda: plain_loop(options.epochs),
        "Trainer, views": lambda: plugged(options.epochs),
        "Trainer, views, linear probe, k-NN": lambda: plugged(
            options.epochs, lc.OnlineLinearProbe(num_classes=9), lc.OnlineKNN(num_classes=9)
        ),
    }
    rates = {name: [] for name in candidates}
    for _ in range(options.repeats):
        for name, call in candidates.items():
            rates[name].append(call())
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    plain = medians["plain PyTorch loop"]
    rows = [{"candidate": name, "images/s": rate, "time x plain": plain / rate} for name, rate in medians.items()]
    report("overhead", rows, f"SimCLR, small convnet, emoji at 32 px, batch {BATCH}, training after the first epoch.")


if __name__ == "__main__":
    main()

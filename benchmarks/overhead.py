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

PLAIN = "plain PyTorch loop"


def simclr():
    """Return the method without momentum that both train."""
    torch.manual_seed(0)
    return lc.SimCLR("small_convnet", optimizer="sgd", lr=0.01, warmup_epochs=0)


def byol():
    """Return the method with a momentum network that both train."""
    torch.manual_seed(0)
    heads = {"hidden_dim": 512, "projection_dim": 128}
    return lc.BYOL("small_convnet", optimizer="sgd", lr=0.01, warmup_epochs=0, **heads)


def plain_loop(make, epochs):
    """The hand-written loop: index, make the views, forward, loss, backward, step, move the momentum network."""
    module, policy = make(), lc.augment.simclr_cifar_views(32)
    module.log = lambda *_, **__: None
    images = lc.data.EmojiDataModule().images("train")
    pairs = module.momentum_pairs() if hasattr(module, "momentum_pairs") else []
    online = [p for source, _ in pairs for p in source.parameters()]
    target = [p for _, copy in pairs for p in copy.parameters()]
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
            loss = module.training_step([policy(images[rows]), None], steps)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if pairs:
                with torch.no_grad():
                    torch._foreach_lerp_(target, online, 0.004)
            steps += epoch > 0
    return steps * BATCH / (time.perf_counter() - start)


def plugged(make, epochs, *plugins):
    """Our method in a Trainer with the given plug-ins; BYOL brings its `MomentumUpdate`."""
    views = lc.ViewAugmentation(lc.augment.simclr_cifar_views(32))
    return fit(make(), epochs, [views, *plugins], datamodule=lc.data.EmojiDataModule(BATCH))


def every_plugin():
    """Return new instances of the plug-ins that watch."""
    return lc.OnlineLinearProbe(num_classes=9), lc.OnlineKNN(num_classes=9), lc.CollapseMonitor()


def main():
    """Run the candidates in turn and report medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    epochs = options.epochs
    candidates = {
        ("SimCLR", PLAIN): lambda: plain_loop(simclr, epochs),
        ("SimCLR", "Trainer, views"): lambda: plugged(simclr, epochs),
        ("SimCLR", "Trainer, views, linear probe, k-NN, collapse monitor"): lambda: plugged(
            simclr, epochs, *every_plugin()
        ),
        ("BYOL", PLAIN): lambda: plain_loop(byol, epochs),
        ("BYOL", "Trainer, views, momentum, linear probe, k-NN, collapse monitor"): lambda: plugged(
            byol, epochs, *every_plugin()
        ),
    }
    rates = {name: [] for name in candidates}
    for _ in range(options.repeats):
        for name, call in candidates.items():
            rates[name].append(call())
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    rows = [
        {"method": name[0], "candidate": name[1], "images/s": rate, "time x plain": medians[name[0], PLAIN] / rate}
        for name, rate in medians.items()
    ]
    notes = f"Small convnet, emoji at 32 px, batch {BATCH}, training after the first epoch; images per second."
    report("overhead", rows, notes)


if __name__ == "__main__":
    main()

"""Online figures of a run, offline evaluations of the same weights, and the cost of the probes: docs/numbers.md."""

import argparse
import logging
import time

import lightning as L
import torch

import lightning_contrast as lc
from benchmarks.monitors import Stopwatch
from lightning_contrast import evaluation

METHODS = {
    "SimCLR": lambda: lc.SimCLR("small_convnet", warmup_epochs=0),
    "BYOL": lambda: lc.BYOL("small_convnet", warmup_epochs=0, hidden_dim=256),
}

HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
)
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Offline(L.Callback):
    """Print the online figures of each validation and those of an offline evaluation."""

    def __init__(self, data, policy):
        self.data, self.policy = data, policy

    def on_train_epoch_end(self, trainer, pl_module):
        if (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch:
            return
        pl_module.eval()
        images = [self.data.images(split) for split in ("train", "val")]
        train, test = (evaluation.encode(pl_module, group, self.policy.eval_transform) for group in images)
        pl_module.train()
        split = (train, self.data.labels("train"), test, self.data.labels("val"))
        offline = evaluation.linear_top1(*split), evaluation.knn_top1(*split, num_classes=9)
        names = ("seen/top1", "linear_probe/top1", "knn/top1")
        online = [float(trainer.callback_metrics[name]) for name in names]
        values = (online[0], online[1], offline[0], online[2], offline[1])
        print(f"| {trainer.current_epoch + 1} | " + " | ".join(f"{value:.3f}" for value in values) + " |", flush=True)


def cost(epochs, every=34):
    """Print what the probes of the demo cost: images per kind of forward pass, and processor time of the thread."""
    torch.set_num_threads(1)
    data = lc.data.EmojiDataModule(batch_size=256, seed=0)
    knn, linear = lc.OnlineKNN(num_classes=9), lc.OnlineLinearProbe(num_classes=9)
    watches = {"OnlineKNN": Stopwatch(), "OnlineLinearProbe": Stopwatch()}
    watches["OnlineKNN"].wrap(knn, *HOOKS)  # first in the Trainer: it encodes the bank for both
    watches["OnlineLinearProbe"].wrap(linear, *HOOKS)
    images = dict.fromkeys(("training", "bank", "validation"), 0)
    encode, in_bank = knn._encode_bank, []

    def encode_bank(trainer, pl_module):
        in_bank.append(True)
        encode(trainer, pl_module)
        in_bank.clear()

    knn._encode_bank = encode_bank
    model = lc.SimCLR("small_convnet", temperature=0.1, optimizer="adamw", lr=2e-3, weight_decay=1e-4, warmup_epochs=4)

    def count(module, given, output):
        kind = "training" if torch.is_grad_enabled() else "bank" if in_bank else "validation"
        images[kind] += len(given[0])

    model.backbone.register_forward_hook(count)
    trainer = L.Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=every,
        accelerator="cpu",
        num_sanity_val_steps=0,
        callbacks=[lc.ViewAugmentation(lc.augment.simclr_cifar_views(32)), knn, linear],
        **QUIET,
    )
    start = time.thread_time()
    trainer.fit(model, datamodule=data)
    whole = time.thread_time() - start
    print(", ".join(f"{kind}: {number:,}" for kind, number in images.items()))
    for name, watch in watches.items():
        share = watch.seconds / whole
        print(f"{name}: {watch.seconds:.2f} of {whole:.2f} s of the thread in {epochs} epochs, {share:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="SimCLR")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="measure the cost of the probes in the demo instead")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(options.seed, verbose=False)
    if options.cost:
        cost(epochs=68)
        return
    data, policy = lc.data.EmojiDataModule(batch_size=128), lc.augment.simclr_views(32)
    probes = [
        lc.OnlineLinearProbe(num_classes=9),
        lc.OnlineLinearProbe(num_classes=9, bank="train", name="seen"),
        lc.OnlineKNN(num_classes=9),
    ]
    trainer = L.Trainer(
        max_epochs=options.epochs,
        check_val_every_n_epoch=options.every,
        accelerator="cpu",
        callbacks=[lc.ViewAugmentation(policy), *probes, Offline(data, policy)],
        **QUIET,
    )
    print('| epoch | `bank="train"` | `linear_probe/top1` | `linear_top1` | `knn/top1` | `knn_top1` |')
    print("|---|---|---|---|---|---|")
    trainer.fit(METHODS[options.method](), datamodule=data)


if __name__ == "__main__":
    main()

"""Online figures of a run and offline evaluations of the same weights: the table of docs/numbers.md."""

import argparse
import logging

import lightning as L

import lightning_contrast as lc
from lightning_contrast import evaluation

METHODS = {
    "SimCLR": lambda: lc.SimCLR("small_convnet", warmup_epochs=0),
    "BYOL": lambda: lc.BYOL("small_convnet", warmup_epochs=0, hidden_dim=256),
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="SimCLR")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(options.seed, verbose=False)
    data, policy = lc.data.EmojiDataModule(batch_size=128), lc.augment.simclr_views(32)
    probes = [
        lc.OnlineLinearProbe(num_classes=9),
        lc.OnlineLinearProbe(num_classes=9, bank="train", name="seen"),
        lc.OnlineKNN(num_classes=9),
    ]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        max_epochs=options.epochs,
        check_val_every_n_epoch=options.every,
        accelerator="cpu",
        callbacks=[lc.ViewAugmentation(policy), *probes, Offline(data, policy)],
        **quiet,
    )
    print('| epoch | `bank="train"` | `linear_probe/top1` | `linear_top1` | `knn/top1` | `knn_top1` |')
    print("|---|---|---|---|---|---|")
    trainer.fit(METHODS[options.method](), datamodule=data)


if __name__ == "__main__":
    main()

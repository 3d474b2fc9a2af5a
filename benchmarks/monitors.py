"""Overhead of the monitors: time inside their hooks, since differences between whole runs are dominated by noise."""

import argparse
import logging
import time
import warnings

import lightning as L
import torch

import lightning_contrast as lc
from benchmarks.common import report
from benchmarks.end_to_end import BATCH, fit
from benchmarks.overhead import simclr
from lightning_contrast.callbacks.capture.features import FeatureHook, ViewHook
from lightning_contrast.callbacks.throughput.trainer_events import ProfilerListener


class Stopwatch:
    """Processor time of this thread spent in functions."""

    def __init__(self):
        self.seconds, self.calls = 0.0, 0

    def wrap(self, owner, *names):
        """Time methods of an object or class, by default its hooks."""
        hooks = [n for n in dir(owner) if n.startswith("on_") and n in vars(type(owner))]
        for name in names or hooks:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function):
        def timed(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start
                self.calls += 1

        return timed


class WholeRun(L.Callback):
    """Processor time of the thread from the end of the first epoch to the end of training."""

    def __init__(self, watches):
        self.watches, self.seconds, self.steps = watches, 0.0, 0

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.start, self.steps = time.thread_time(), -trainer.global_step
            for watch in self.watches:
                watch.seconds, watch.calls = 0.0, 0

    def on_train_end(self, trainer, pl_module):
        self.seconds = time.thread_time() - self.start
        self.steps += trainer.global_step


def main():
    """Train SimCLR with both monitors on one thread, and report the share of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12, help="of 9 batches; 12 include one measurement in 99 batches")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    collapse, throughput = lc.CollapseMonitor(), lc.TrainingCostMonitor()
    watches = {"CollapseMonitor": Stopwatch(), "TrainingCostMonitor": Stopwatch()}
    watches["CollapseMonitor"].wrap(collapse)
    watches["CollapseMonitor"].wrap(FeatureHook, "_hook")
    watches["CollapseMonitor"].wrap(ViewHook, "_hook")
    watches["TrainingCostMonitor"].wrap(throughput)
    watches["TrainingCostMonitor"].wrap(ProfilerListener, "_on_start", "_on_stop", "enter", "leave")
    whole = WholeRun(list(watches.values()))
    views = lc.ViewAugmentation(lc.augment.simclr_cifar_views(32))
    fit(simclr(), options.epochs, [views, collapse, throughput, whole], datamodule=lc.data.EmojiDataModule(BATCH))
    rows = [
        {
            "monitor": name,
            "ms per step": 1000 * watch.seconds / whole.steps,
            "share of the step": watch.seconds / whole.seconds,
            "calls per step": watch.calls / whole.steps,
        }
        for name, watch in watches.items()
    ]
    step = 1000 * whole.seconds / whole.steps
    notes = (
        f"SimCLR, small convnet, emoji at 32 px, batch {BATCH}, {whole.steps} steps of {step:.0f} ms after the first "
        "epoch, including one measurement of `CollapseMonitor`; processor time of the thread inside the hooks of "
        "the monitor, including the overhead of timing."
    )
    report("monitors", rows, notes)


if __name__ == "__main__":
    main()

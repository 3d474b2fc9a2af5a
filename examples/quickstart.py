"""Pretrain SimCLR on the bundled emoji, watch it with two probes, and draw what it learned: `make demo`."""

import argparse
import json
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_contrast as lc
from lightning_contrast import evaluation


def scores(data, train, test, artist_a, artist_b):
    """Score features: 9 groups by k-NN and by a linear classifier, and the same thing drawn by the other artist."""
    votes = {"num_classes": data.num_classes}
    return {
        "knn": evaluation.knn_top1(train, data.train_labels, test, data.test_labels, **votes),
        "linear": evaluation.linear_top1(train, data.train_labels, test, data.test_labels),
        "recall@1": evaluation.recall_at_1(artist_a, artist_b),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--select", action="store_true", help="judge on a validation split of the training things")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    start = time.perf_counter()
    L.seed_everything(options.seed)
    data = lc.data.EmojiDataModule(batch_size=256, seed=options.seed)
    policy = lc.augment.simclr_views(32, strength=0.5, blur=0.0)
    model = lc.SimCLR("small_convnet", temperature=0.2, optimizer="adamw", lr=2e-3, weight_decay=1e-4)

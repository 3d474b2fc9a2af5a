"""A regularizer added to a method, and what it does to the rank of the features: one line per regularizer and seed."""

import argparse
import json
from pathlib import Path

import lightning as L
import torch

import lightning_contrast as lc

WEIGHTS = {"none": 0.0, "covariance": 0.1, "log_det": 0.03, "koleo": 1.0, "uniformity": 0.5}  # by k-NN on fold 1
METHODS = {
    "SimCLR": lambda **settings: lc.SimCLR("small_convnet", temperature=0.2, **settings),
    "BYOL": lambda **settings: lc.BYOL("small_convnet", momentum=0.99, **settings),
    "SimSiam": lambda **settings: lc.SimSiam("small_convnet", projection_dim=256, predictor_dim=64, **settings),
}


def run(options, kind, seed):
    """Train, and return rank and k-NN accuracy of the frozen features of the validation images."""
    L.seed_everything(seed, verbose=False)
    data = lc.data.EmojiDataModule(batch_size=options.batch_size, seed=seed, validation_fold=options.fold)
    policy = lc.augment.simclr_cifar_views(32, mean=(0.84, 0.8, 0.75), std=(0.28, 0.26, 0.33))
    callbacks = [lc.StepSeed(seed), lc.ViewAugmentation(policy)]
    if kind != "none":
        callbacks.append(lc.FeatureRegularizer(kind, weight=options.weight or WEIGHTS[kind], features=options.features))
    model = METHODS[options.method](optimizer="adamw", lr=1e-3, weight_decay=0.01, warmup_epochs=0)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        limit_train_batches=options.batches,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(model, datamodule=data)
    train, val = (lc.evaluation.encode(model, data.images(split), policy.eval_transform) for split in ("train", "val"))
    projected = lc.evaluation.encode(
        torch.nn.Sequential(model.backbone, model.projector), data.images("val"), policy.eval_transform
    )
    labels = data.labels("train"), data.labels("val")
    return {
        "rank of the features": round(float(lc.metrics.effective_rank(val, center=True)), 2),
        "rank of the projections": round(float(lc.metrics.effective_rank(projected, center=True)), 2),
        "k-NN": round(lc.evaluation.knn_top1(train, labels[0], val, labels[1], num_classes=data.num_classes), 4),
    }


def main():
    """Append one line per regularizer and seed to the output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=list(METHODS), default="SimCLR")
    parser.add_argument("--regularizers", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--weight", type=float, help="instead of that of the table at the top")
    parser.add_argument("--features", default="backbone", help="the regularized layer, such as projector")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, help="per epoch")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fold", type=int, help="validate on this fold (1-4) of the training set")
    parser.add_argument("--output", type=Path, default=Path("regularizers.jsonl"))
    options = parser.parse_args()
    for seed in options.seeds:
        for kind in options.regularizers:
            row = {"method": options.method, "regularizer": kind, "seed": seed} | run(options, kind, seed)
            print(json.dumps(row), flush=True)
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

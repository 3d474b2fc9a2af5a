"""What matched pairs are worth: plant wrong captions, train CLIP or SigLIP, find them, and check the calibration."""

import argparse
import json
from pathlib import Path

import torch
from clip_emoji import embed, report, train
from lightning.pytorch.callbacks import LambdaCallback
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

import lightning_contrast as lc


def exchange(texts, share, seed):
    """Return texts of which a share is exchanged among each other, and which these are, bool (T,)."""
    rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[: round(share * len(texts))]
    moved = dict(zip(rows.tolist(), rows.roll(1).tolist(), strict=True))
    return [texts[moved.get(row, row)] for row in range(len(texts))], torch.isin(torch.arange(len(texts)), rows)


class WrongCaptions(lc.data.EmojiDataModule):
    """Captions that are wrong for a share of the training things."""

    share = 0.0

    def captions(self, split="train"):
        """Return the captions of a split, some of them wrong in training."""
        return exchange(super().captions(split), self.share if split == "train" else 0, self.seed)[0]


@torch.no_grad()
def auroc(model, policy, images, right, share, seed):
    """Return the AUROC of low similarity as a sign of a wrong caption, for the pairs of `exchange`."""
    texts, wrong = exchange(right, share, seed)
    similarity = (embed(model, policy, images) * model.encode_text(texts)).sum(1)
    return round(float(binary_auroc(-similarity, wrong.long())), 3)


@torch.no_grad()
def calibration(model, image, text, size=128):
    """Return the expected calibration error of the match probability over the pairs of batches of training's size."""
    batches = torch.randperm(len(image), generator=torch.Generator().manual_seed(0)).split(size)[:-1]  # full ones
    similarity = torch.stack([image[rows] @ text[rows].T for rows in batches])
    p = torch.sigmoid(model.logit_scale() * similarity + model.logit_bias()).flatten()
    y = torch.eye(size, dtype=torch.long).repeat(len(similarity), 1).flatten()
    values = {"ECE of all pairs": binary_calibration_error(p, y, n_bins=15), "mean p where p > 0.5": p[p > 0.5].mean()}
    return {k: round(float(v), 4) for k, v in (values | {"matches where p > 0.5": y[p > 0.5].float().mean()}).items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("CLIP", "SigLIP"), default="SigLIP")
    for name, kind, default in (("share", float, 0.1), ("epochs", int, 120), ("seed", int, 0), ("fold", int, None)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--output", type=Path, default=Path("runs/wrong_captions"))
    args = parser.parse_args()
    options = {"captions": True, "artist": "fluent", "seed": args.seed, "validation_fold": args.fold}
    data, right, found, planted = WrongCaptions(128, **options), WrongCaptions(**options), [], (args.share, args.seed)
    data.share = args.share

    def search(trainer, model):
        if (trainer.current_epoch + 1) % max(1, args.epochs // 10) == 0:
            policy = next(c.policy for c in trainer.callbacks if isinstance(c, lc.ViewAugmentation))
            found.append(auroc(model.eval(), policy, right.images("train"), right.captions("train"), *planted))
            model.train()

    callbacks = [LambdaCallback(on_train_epoch_end=search)] if args.share else []
    model, policy = train(args.method, data, *callbacks, epochs=args.epochs, seed=args.seed)
    results = report(model, policy, right)  # judged with the right captions
    if args.share:
        results["AUROC, pairs of training, by tenths of the run"] = found
        unseen = right.artists("val")[1], right.captions("val")[: len(right.things("val"))]
        results["AUROC, pairs of unseen things"] = auroc(model, policy, *unseen, *planted)
    if args.method == "SigLIP":
        pairs = embed(model, policy, right.artists("train")[0]), model.encode_text(right.captions("train"))
        results["calibration, seen things, other artist"] = calibration(model, *pairs)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.method}_{args.share:g}_{args.seed}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))

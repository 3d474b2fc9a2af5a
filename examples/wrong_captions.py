"""What matched pairs are worth: plant wrong captions, train CLIP or SigLIP, find them, and check the calibration."""

import argparse
import json
from pathlib import Path

import torch
from clip_emoji import embed, report, train
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

import lightning_contrast as lc


class WrongCaptions(lc.data.EmojiDataModule):
    """The captions of a share of the training things are exchanged among these things; the others are right.

    Args:
        share: Share of the things with a wrong caption.
        options: Arguments of `EmojiDataModule`.
    """

    def __init__(self, share, **options):
        super().__init__(128, captions=True, artist="fluent", **options)
        self.share = share

    def captions(self, split="train"):
        """Return the captions of a split, some of them wrong in training."""
        texts = super().captions(split)
        wrong = self.wrong().nonzero().flatten().tolist() if split == "train" else []
        moved = {row: texts[other] for row, other in zip(wrong, wrong[1:] + wrong[:1], strict=True)}
        return [moved.get(row, text) for row, text in enumerate(texts)]

    def wrong(self):
        """Return which things have a wrong caption in training, bool (T,)."""
        count = len(self.things("train"))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return torch.zeros(count, dtype=torch.bool).index_fill(0, order[: round(self.share * count)], True)


@torch.no_grad()
def calibration(model, image, text, size=128):
    """Return the expected calibration error of the match probability over the pairs of batches of training's size."""
    probabilities, matches = [], []
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))
    for rows in order.split(size):
        if len(rows) == size:
            logits = model.logit_scale() * (image[rows] @ text[rows].T) + model.logit_bias()
            probabilities.append(torch.sigmoid(logits).flatten())
            matches.append(torch.eye(size).flatten().long())
    p, y = torch.cat(probabilities), torch.cat(matches)
    sure = p > 0.5
    return {
        "ECE of all pairs": float(binary_calibration_error(p, y, n_bins=15)),
        "mean p where p > 0.5": float(p[sure].mean()),
        "matches where p > 0.5": float(y[sure].float().mean()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("CLIP", "SigLIP"), default="SigLIP")
    parser.add_argument("--share", type=float, default=0.1)
    for name, number in (("epochs", 120), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--output", type=Path, default=Path("runs/wrong_captions"))
    args = parser.parse_args()
    data = WrongCaptions(args.share, seed=args.seed)
    model, policy = train(args.method, data, epochs=args.epochs, seed=args.seed)
    right = lc.data.EmojiDataModule(captions=True, artist="fluent")  # judged with the right captions
    results = report(model, policy, right)
    with torch.no_grad():
        image, text = embed(model, policy, data.images("train")), model.encode_text(data.captions("train"))
        other, true = embed(model, policy, data.artists("train")[0]), model.encode_text(right.captions("train"))
    if args.share:
        results["AUROC of the wrong pairs"] = float(binary_auroc(-(image * text).sum(1), data.wrong().long()))
    if args.method == "SigLIP":
        results["calibration, other artist"] = calibration(model, other, true)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.method}_{args.share:g}_{args.seed}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))

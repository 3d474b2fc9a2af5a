"""BindModalities in small: one artist's drawings bind another artist's and captions, which were never paired."""

import argparse

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

import lightning_contrast as lc

TOKENIZER = lc.nn.NGramTokenizer()


class Bound(Dataset):
    """Batches of one kind: a half of the things by both artists, the other half by Noto and with captions."""

    def __init__(self, data, policy, batch_size):
        (self.noto, self.fluent), self.policy = data.artists("train"), policy
        self.tokens, self.batch_size = TOKENIZER(data.captions("train")[: len(self.noto)]), batch_size

    def __len__(self):
        return len(self.noto) // self.batch_size

    def __getitem__(self, place):
        """Return a dict with "noto" (B, 3, 32, 32) and either "fluent", of the same shape, or "caption" (B, L)."""
        half = torch.arange(place % 2, len(self.noto), 2)
        rows = half[torch.randperm(len(half))[: self.batch_size]]
        second = {"caption": self.tokens[rows]} if place % 2 else {"fluent": self.policy(self.fluent[rows])[0]}
        return {"noto": self.policy(self.noto[rows])[0]} | second


def recalls(model, data, policy, split):
    """Print recall between Fluent's drawings and the captions of a split, in both directions."""
    _, fluent = data.artists(split)
    tokens = TOKENIZER(data.captions(split)[: len(fluent)])
    with torch.no_grad():
        images, texts = model.encode("fluent", policy.eval_transform(fluent)), model.encode("caption", tokens)
    for way, (queries, gallery) in {"image to text": (images, texts), "text to image": (texts, images)}.items():
        found = {k: lc.metrics.RetrievalRecall(k)(queries, gallery).item() for k in (1, 10)}
        found = ", ".join(f"@{k} {value:.3f} (chance {k / len(fluent):.4f})" for k, value in found.items())
        print(f"  {'things trained on apart' if split == 'train' else 'new things'}, {way}: recall {found}")


def main():
    """Print the recall of random and of trained weights, for things trained on apart and for new things."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scale", type=float, default=0.4, help="smallest share of an image that a view shows")
    parser.add_argument("--fold", type=int, help="report on a fold of the training things, to choose settings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    data = lc.data.EmojiDataModule(validation_fold=options.fold)
    policy = lc.augment.image_text_views(32, scale=(options.scale, 1.0))
    encoders = {"noto": "small_convnet", "fluent": "small_convnet", "caption": lc.nn.NGramTower(width=192)}
    model = lc.BindModalities(encoders, anchor="noto", lr=options.lr, weight_decay=0.05)
    loader = DataLoader(Bound(data, policy, 128), batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    for name in ("random weights", "trained"):
        if name == "trained":
            trainer = L.Trainer(max_epochs=options.epochs, accelerator="cpu", enable_progress_bar=False, **quiet)
            trainer.fit(model, loader)
        model.eval()
        print(f"{name}:")
        for split in ("train", "val"):
            recalls(model, data, policy, split)
        model.train()


if __name__ == "__main__":
    main()

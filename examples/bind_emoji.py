"""BindModalities in small: one artist's drawings bind another artist's and captions, which were never paired."""

import argparse

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_contrast as lc

SLOTS = 4096


def trigrams(captions):
    """Return counts of the letter triples of captions, (B, SLOTS), hashed without a vocabulary."""
    counts = torch.zeros(len(captions), SLOTS)
    for row, caption in enumerate(captions):
        text = f"  {caption} ".encode()
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            counts[row, (a * 65_537 + b * 257 + c) * 2_654_435_761 % 2**32 * SLOTS // 2**32] += 1
    return counts


class Bound(Dataset):
    """Batches of one kind: a half of the things by both artists, the other half by Noto and with captions."""

    def __init__(self, data, policy, batch_size):
        (self.noto, self.fluent), self.policy = data.artists("train"), policy
        self.captions, self.batch_size = trigrams(data.captions("train")[: len(self.noto)]), batch_size

    def __len__(self):
        return len(self.noto) // self.batch_size

    def __getitem__(self, place):
        """Return a dict with "noto" and either "fluent" or "caption"."""
        half = torch.arange(place % 2, len(self.noto), 2)
        rows = half[torch.randperm(len(half))[: self.batch_size]]
        second = {"caption": self.captions[rows]} if place % 2 else {"fluent": self.policy(self.fluent[rows])[0]}
        return {"noto": self.policy(self.noto[rows])[0]} | second


def text_encoder():
    """Return a network from counts (B, SLOTS) to features (B, 192)."""
    network = nn.Sequential(nn.Linear(SLOTS, 192), nn.LayerNorm(192), nn.GELU(), nn.Dropout(0.3), nn.Linear(192, 192))
    network.num_features = 192
    return network


def main():
    """Print recall between Fluent's drawings and captions, for things trained on apart and for new things."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--fold", type=int, help="report on a fold of the training things, to choose settings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    data = lc.data.EmojiDataModule(validation_fold=options.fold)
    policy = lc.augment.simclr_cifar_views(32)
    encoders = {"noto": "small_convnet", "fluent": "small_convnet", "caption": text_encoder()}
    model = lc.BindModalities(encoders, anchor="noto", lr=2e-3, weight_decay=0.05)
    loader = DataLoader(Bound(data, policy, 128), batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(max_epochs=options.epochs, accelerator="cpu", enable_progress_bar=False, **quiet).fit(model, loader)
    model.eval()
    for name, split in (("things trained on apart", "train"), ("new things", "val")):
        _, fluent = data.artists(split)
        counts = trigrams(data.captions(split)[: len(fluent)])
        with torch.no_grad():
            images = model.encode("fluent", policy.eval_transform(fluent))
            texts = model.encode("caption", counts)
        for way, (queries, gallery) in {"image to text": (images, texts), "text to image": (texts, images)}.items():
            recalls = {k: lc.metrics.RetrievalRecall(k)(queries, gallery).item() for k in (1, 10)}
            found = ", ".join(f"@{k} {value:.3f} (chance {k / len(fluent):.4f})" for k, value in recalls.items())
            print(f"{name}, {way}: recall {found}")


if __name__ == "__main__":
    main()

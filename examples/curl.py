"""CURL in small: two random crops of one observation (three frames of a moving emoji) find each other."""

import argparse

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate

FRAME, CROP = 48, 40


class Observations(Dataset):
    """Stacks of three frames (9, 48, 48), in 0..1: an emoji moves over a noisy ground."""

    def __init__(self, emoji, seed):
        self.emoji, self.seed = emoji.float() / 255, seed

    def __len__(self):
        return len(self.emoji)

    def __getitem__(self, index):
        """Return ``[a, b], index``: two new crops (9, 40, 40) of an observation, which depends on (seed, index)."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        frames = 0.2 * torch.rand(3, 3, FRAME, FRAME, generator=g)
        start, speed = torch.randint(4, 13, (2,), generator=g), torch.randint(-2, 3, (2,), generator=g)
        for time, frame in enumerate(frames):
            row, column = (start + speed * time).clamp(0, FRAME - 32).tolist()
            frame[:, row : row + 32, column : column + 32] += 0.8 * self.emoji[index]
        stack, places = frames.flatten(0, 1), torch.randint(FRAME - CROP + 1, (2, 2)).tolist()
        return [stack[:, row : row + CROP, column : column + CROP] for row, column in places], index


class PixelEncoder(nn.Module):
    """CURL's encoder: four convolutions, a linear layer to 50, LayerNorm, tanh; (B, 9, 40, 40) -> (B, 50)."""

    num_features = 50

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(9 if i == 0 else 32, 32, 3, 2 if i == 0 else 1), nn.ReLU()) for i in range(4))
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 13 * 13, 50), nn.LayerNorm(50), nn.Tanh())

    def forward(self, observations):
        """Return the features (B, 50)."""
        return self.head(self.convolutions(observations))


def main():
    """Print how often a crop finds the other crop of its observation, for emoji not trained on."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"epochs": 20, "lr": 1e-3, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--fold", type=int, help="report on a fold of the training things, to choose settings")
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    data = lc.data.EmojiDataModule(validation_fold=options.fold)
    curl = {"loss": "bilinear", "momentum": 0.95, "symmetric": False, "projection_dim": None}
    model = lc.PairContrast(PixelEncoder(), **curl, lr=options.lr, weight_decay=0.0)
    (a, b), _ = next(iter(DataLoader(Observations(data.images("val"), seed=1), 624)))
    for name in ("random weights", "trained"):
        if name == "trained":
            loader = DataLoader(Observations(data.images("train"), seed=0), 128, shuffle=True, drop_last=True)
            ema = MomentumUpdate(0.95, schedule="constant")  # as in CURL, instead of a rise to 1
            quiet = {"logger": False, "enable_checkpointing": False}
            L.Trainer(max_epochs=options.epochs, accelerator="cpu", callbacks=[ema], **quiet).fit(model, loader)
        with torch.no_grad():
            scores = model.backbone(a) @ model.bilinear() @ model.momentum_backbone(b).T  # (624, 624)
        found = scores.argmax(1) == torch.arange(len(a))
        print(f"{name}: recall@1 {found.float().mean():.3f} (chance {1 / len(a):.4f})")


if __name__ == "__main__":
    main()

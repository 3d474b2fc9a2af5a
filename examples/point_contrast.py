"""PointContrast in small: points of two partial views of one shape are pairs, so features find the same point again."""

import argparse

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_contrast as lc

MATCHED, EXTRA = 32, 64  # points that both views see, and points that only one of them sees
SPIN = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 0]])  # about the third axis


class Shapes(Dataset):
    """Two views of random surfaces, (96, 3) each: the first 32 rows are the same points, turned by another angle."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        """Return ``[a, b], index`` of one shape, a function of (seed, index)."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        directions = nn.functional.normalize(torch.randn(2000, 3, generator=g), dim=1)
        bumps = torch.sin(2 * directions @ torch.randn(3, 6, generator=g) + 6 * torch.rand(6, generator=g))
        points = directions * (1 + 0.15 * bumps.sum(1, keepdim=True))
        side = points[:, 0].argsort()  # view a sees the left 60 % of the points, view b the right 60 %
        both, views = side[800:1200][torch.randperm(400, generator=g)[:MATCHED]], []
        for own in (side[:800], side[1200:]):
            angle = 2 * torch.pi * torch.rand((), generator=g)
            seen = points[torch.cat([both, own[torch.randperm(800, generator=g)[:EXTRA]]])]
            views.append(seen @ torch.linalg.matrix_exp(angle * SPIN) + 0.01 * torch.randn(seen.shape, generator=g))
        return views, index


class PointNetwork(nn.Module):
    """Three layers that each take the largest message of the 12 nearest points; (B, N, 3) -> (B * MATCHED, 64)."""

    num_features = 64

    def __init__(self):
        super().__init__()
        mlps = (nn.Sequential(nn.Linear(w, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64)) for w in (7, 131, 131))
        self.layers = nn.ModuleList(mlps)

    def forward(self, points):
        """Return the features of the matched points, all clouds below each other."""
        near = torch.arange(len(points))[:, None, None], torch.cdist(points, points).topk(12, largest=False).indices
        offsets = points[near] - points[:, :, None]  # (B, N, 12, 3)
        x = torch.cat([points[..., 2:], points.norm(dim=2, keepdim=True)], 2)  # height and radius do not turn
        for layer in self.layers:
            x = layer(torch.cat([x[:, :, None].expand(-1, -1, 12, -1), x[near], offsets], 3)).amax(2)
        return x[:, :MATCHED].flatten(0, 1)


def main():
    """Print the share of points that are found again among the 32 of the other view, in shapes not trained on."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"steps": 300, "lr": 5e-3, "seed": 0, "fold": 0}.items():  # fold 1: to choose settings
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    model = lc.PairContrast(PointNetwork(), projection_dim=None, lr=options.lr, weight_decay=0.01)
    (a, b), _ = next(iter(DataLoader(Shapes(200, seed=1 + options.fold), 200)))
    for name in ("random weights", "trained"):
        if name == "trained":
            loader = DataLoader(Shapes(options.steps * 16, seed=10 + options.seed), 16)
            L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, loader)
        with torch.no_grad():
            scores = model.encode_a(a).view(200, MATCHED, -1) @ model.encode_b(b).view(200, MATCHED, -1).mT
        found = (scores.argmax(2) == torch.arange(MATCHED)).float().mean()
        print(f"{name}: {found:.3f} of the points found again (chance {1 / MATCHED:.3f})")


if __name__ == "__main__":
    main()

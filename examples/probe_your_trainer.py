"""Add a linear probe and a k-NN probe to an existing module and Trainer; the weights stay bit-identical."""

import argparse

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc


class Autoencoder(L.LightningModule):
    """An autoencoder that is independent of this package."""

    def __init__(self):
        super().__init__()
        convolutions = nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
        self.encoder = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2048, 64))
        self.decoder = nn.Sequential(nn.Linear(64, 3 * 32 * 32), nn.Sigmoid(), nn.Unflatten(1, (3, 32, 32)))

    def training_step(self, batch, batch_idx):
        """Reconstruct the images; labels are not used."""
        images, _ = batch
        loss = nn.functional.mse_loss(self.decoder(self.encoder(images)), images)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        """Encode the images, for the probes."""
        self.encoder(batch[0])

    def configure_optimizers(self):
        """Use Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train(callbacks, epochs):
    """Train with a fixed seed and the given callbacks; return the module and the Trainer."""
    data = lc.data.EmojiDataModule()
    sets = [TensorDataset(data.images(split).float() / 255, data.labels(split)) for split in ("train", "test")]
    L.seed_everything(0, verbose=False)
    module = Autoencoder()
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.callbacks.extend(callbacks)
    order = torch.Generator().manual_seed(0)
    loaders = DataLoader(sets[0], 128, shuffle=True, generator=order), DataLoader(sets[1], 128)
    trainer.fit(module, *loaders)
    return module, trainer


def main():
    """Train without and with probes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    alone, _ = train([], epochs)
    probes = [
        lc.OnlineLinearProbe(num_classes=9, features="encoder"),
        lc.OnlineKNN(num_classes=9, features="encoder"),
    ]
    probed, trainer = train(probes, epochs)
    for name in ("linear_probe/top1", "knn/top1"):
        print(f"{name}: {trainer.callback_metrics[name]:.3f}")
    same = all(torch.equal(a, b) for a, b in zip(alone.parameters(), probed.parameters(), strict=True))
    print(f"weights bit-identical with and without the probes: {same}")


if __name__ == "__main__":
    main()

"""Apply the checks of `lightning_contrast.testing` to lightly: NT-Xent without gathering, and with a memory bank."""

import lightning as L
import torch
from lightly.loss import NTXentLoss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast.testing import assert_resume_exact, check_world_size_equivalence


class MoCoWithBank(L.LightningModule):
    """A module as in the documentation of lightly: the loss holds the past keys."""

    def __init__(self, bank):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16))
        self.criterion = NTXentLoss(memory_bank_size=(64, 16) if bank else 0)

    def training_step(self, batch, batch_idx):
        """Contrast images with copies shifted by one pixel."""
        (images,) = batch
        return self.criterion(self.encoder(images), self.encoder(images.roll(1, dims=3)))

    def configure_optimizers(self):
        """Use SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images():
    """Return a loader with fixed images in a fixed order."""
    pixels = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(pixels), batch_size=8)


def report(what, check):
    """Run a check and print its result."""
    try:
        check()
    except AssertionError as error:
        print(f"\n{what}: FOUND\n{error}")
    else:
        print(f"\n{what}: nothing found")


def main():
    """Check two defects, each with a correct alternative."""
    report("NTXentLoss() on two ranks", lambda: check_world_size_equivalence(NTXentLoss))
    gathers = lambda: NTXentLoss(gather_distributed=True)  # noqa: E731
    report("NTXentLoss(gather_distributed=True) on two ranks", lambda: check_world_size_equivalence(gathers))
    for bank in (True, False):
        module = lambda bank=bank: MoCoWithBank(bank)  # noqa: E731
        what = f"NTXentLoss {'with' if bank else 'without'} a memory bank, stopped and resumed"
        report(what, lambda module=module: assert_resume_exact(module, images))


if __name__ == "__main__":
    main()

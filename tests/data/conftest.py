import lightning as L
import pytest
import torch

from lightning_contrast.data import InMemoryDataModule


class TinyDataModule(InMemoryDataModule):
    """Images whose first pixel is their row number, labels that are the row modulo 3."""

    def __init__(self, rows=23, batch_size=4, **kwargs):
        super().__init__(batch_size, indices=True, **kwargs)
        self.rows, self.reads = rows, []

    def read(self, split):
        self.reads.append(split)
        rows = self.rows if split == "train" else 7
        images = torch.zeros(rows, 1, 2, 2, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.arange(rows)
        return images, torch.arange(rows) % 3


class Recorder(L.LightningModule):
    """Trains one number and notes (epoch, batch_idx, indices) of each training batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        torch.nn.init.zeros_(self.layer.bias)
        self.seen, self.validated, self.bank = [], [], False

    def training_step(self, batch, batch_idx):
        images, labels, indices = batch
        assert images[:, 0, 0, 0].tolist() == indices.tolist()
        assert labels.tolist() == (indices % 3).tolist()
        self.seen.append((self.current_epoch, batch_idx, indices.tolist()))
        return self.layer(images[:, 0, 0, :1].float()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[2].tolist())
        if self.bank and batch_idx == 0 and not self.trainer.sanity_checking:  # what the bank of a k-NN probe does
            assert len(list(self.trainer.train_dataloader)) == len(self.trainer.train_dataloader)

    def predict_step(self, batch, batch_idx):
        return batch[2]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.fixture
def tiny():
    return TinyDataModule


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def make_trainer(tmp_path):
    def make(**kwargs):
        quiet = {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": "callbacks" in kwargs,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**(quiet | kwargs))

    return make

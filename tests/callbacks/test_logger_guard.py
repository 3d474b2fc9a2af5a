"""A logger that fails: the run goes on and counts, or ends with the cause named."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc


class Away(Logger):
    """Logs two times, then its server is away; comes back for the last call."""

    name, version = "away", 0

    def __init__(self):
        super().__init__()
        self.logged, self.calls = [], 0

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if 2 < self.calls < 6:
            raise ConnectionError("no route to host")
        self.logged.append(step)

    def finalize(self, status):
        if self.calls:
            raise TimeoutError("still away")


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, loggers, *callbacks):
    torch.manual_seed(0)
    module = Module()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=loggers, callbacks=list(callbacks), log_every_n_steps=1, **quiet
    )
    rows = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(TensorDataset(rows), batch_size=2))
    return trainer


pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


def test_without_the_guard_the_run_ends(tmp_path):
    with pytest.raises((ConnectionError, TimeoutError)):
        fit(tmp_path, [Away()])


def test_the_run_goes_on_and_counts(tmp_path):
    away, csv, guard = Away(), CSVLogger(tmp_path), lc.LoggerGuard()
    with pytest.warns(RuntimeWarning) as warned:
        trainer = fit(tmp_path, [away, csv], guard)
    told = [str(warning.message) for warning in warned if warning.category is RuntimeWarning]
    assert trainer.global_step == 6
    assert guard.failures == {"Away": 4}  # with the last call, after the count was told
    assert away.logged == [0, 1, 5]
    assert told[0].startswith("The logger Away failed in `log_metrics` at step 3: ConnectionError('no route to host').")
    assert told[-1] == "Calls of loggers that failed: Away 3."
    assert len(told) == 2
    assert len((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()) == 7
    assert "log_metrics" not in vars(away)
    with pytest.raises(TimeoutError):
        away.finalize("success")  # its own again


def test_the_run_ends_with_the_cause_named(tmp_path):
    message = r"The logger Away failed in `log_metrics` at step 3: ConnectionError.*`LoggerGuard\('continue'\)`"
    with pytest.warns(RuntimeWarning, match="TimeoutError"), pytest.raises(RuntimeError, match=message) as error:
        fit(tmp_path, [Away()], lc.LoggerGuard("raise"))  # that finalize fails after it does not hide it
    assert isinstance(error.value.__cause__, ConnectionError)


def test_the_action_is_checked():
    with pytest.raises(ValueError, match=r"`action` must be one of 'continue', 'raise', got 'warn'"):
        lc.LoggerGuard("warn")

"""Runs resume bit-identical after SIGKILL at any point and after SIGTERM; the harness finds runs that do not."""

import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

import lightning_contrast as lc
from lightning_contrast.testing._trace import UNSAVED, Trace, first_difference
from tests.kill_runs import assert_survives_kills
from tests.launch import run_processes
from tests.run_faults import kill, make_callbacks, make_data, make_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.mark.slow
def test_moco_survives_five_kills():
    """`make faults` repeats this with fifty kills."""
    landed = kill(5)
    assert [landed[number].phase for number in (0, 1, 3, 4)] == ["step", "write", "step", "write"]
    assert len(landed) == 5
    assert all(one.resumed_from % 2 == 0 and one.resumed_from <= one.batch for one in landed)
    assert any(one.resumed_from for one in landed), "no run resumed from a checkpoint"


class WritesInPlace(TorchCheckpointIO):
    """Overwrites the old file in place, as `torch.save(checkpoint, path)` does."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(checkpoint, path)


@pytest.mark.slow
def test_a_writer_that_is_not_atomic_is_found():
    with pytest.raises(AssertionError, match=r"Killed in a checkpoint write.*the run cannot be resumed"):
        kill(30, plugins=[WritesInPlace()], max_epochs=1, every_n_train_steps=1)  # raises at the first failure


def forgets_queue():
    module = make_module()
    module.queue._non_persistent_buffers_set.update(name for name, _ in module.queue.named_buffers())
    return module


@pytest.mark.slow
def test_a_queue_that_is_not_in_the_checkpoint_is_found():
    with pytest.raises(AssertionError, match=r"Killed in .*resumed after batch [1-9].*in the loss") as error:
        kill(6, make_module=forgets_queue)  # raises at the first failure
    assert "tensors differ, most of all" in str(error.value)


def test_arguments_are_checked():
    for arguments, words in (
        ({"kills": 0}, "`kills` must be >= 1"),
        ({"seed": -1}, "`seed` must be >= 0"),
        ({"every_n_train_steps": 0}, "`every_n_train_steps` must be >= 1"),
        ({"max_epochs": 0}, "`max_epochs` must be >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            assert_survives_kills(make_module, make_data, **arguments)


# ---------------------------------------------------------------------------------------------------- SIGTERM


class Terminate(L.Callback):
    """Sends SIGTERM to its own process in the middle of a step, as a cluster does that preempts a job."""

    def __init__(self, batch):
        self.batch = batch

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


def _train(rank, folder, batch, ckpt_path=None):
    """Return the trace, and whether the run was terminated."""
    torch.manual_seed(0 if ckpt_path is None else 1)
    trace = Trace()
    saves = ModelCheckpoint(folder, every_n_epochs=1, save_last=True, save_on_exception=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*make_callbacks(), Terminate(batch), saves, trace],
        plugins=[lc.checkpoints.AtomicCheckpointIO()],
    )
    try:
        trainer.fit(make_module(), make_data(), ckpt_path=ckpt_path, weights_only=True)
    except SystemExit:
        return trace.moments, True
    return trace.moments, False


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("batch", [8, 11], ids=["mid-epoch", "last batch of an epoch"])
def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(tmp_path, batch):
    def both(rank):
        whole, terminated = _train(rank, tmp_path / "whole", -1)
        assert not terminated
        first, terminated = _train(rank, tmp_path / "first", batch)
        assert terminated
        assert len(first) == 2 * (batch + 1)  # the step was finished
        second, terminated = _train(rank, tmp_path / "first", -1, "last")
        assert not terminated
        assert len(second) == len(whole) - len(first)
        difference = first_difference(whole[len(first) :], second, [f"{UNSAVED}*"])
        assert difference is None, difference

    run_processes(both, 1, init=False)

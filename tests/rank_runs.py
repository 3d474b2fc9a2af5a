"""Small fits on batches as they are, for one process and for one of several."""

import warnings

import lightning as L
import torch
from torch.utils.data import DataLoader

from tests.methods.cases import CASES
from tests.methods.test_contract import as_is, rows_of, state, step_batch

SETTINGS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 2,
    "use_distributed_sampler": False,
    "precision": "64-true",
}


def shares(sizes):
    """Return the rows of each rank."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def batch_of(name, rows=slice(None)):
    """Return some rows of the batch of a method, in float64."""
    return rows_of(step_batch(CASES[name], torch.float64), rows)


def fit(module, batches, val=None, callbacks=(), *, ckpt_path=None, **kwargs):
    """Fit, and return the Trainer."""
    trainer = L.Trainer(**(SETTINGS | kwargs), callbacks=list(callbacks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(batches, batch_size=None, collate_fn=as_is)
        trainer.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


def fitted_state(module, batches, **kwargs):
    """Fit, and return all that the module holds."""
    fit(module, batches, **kwargs)
    return state(module)


def logged(trainer):
    """Return what a Trainer has logged."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def on_ranks(count):
    """Return the settings of one of several processes on a node."""
    return {"devices": count, "strategy": "ddp"}

"""What every test starts from, whichever test ran before: random numbers, autograd, and torch's global settings."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.matrix import Matrix


def pytest_addoption(parser):
    parser.addoption("--matrix", type=Path, help="write the matrix of methods and conditions of this run to a file")


def pytest_configure(config):
    # Where the first backward of a process comes after an ONNX export, torch refuses autograd in its forks.
    torch.ones(1, requires_grad=True).sum().backward()
    worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Matrix(None if worker else config.getoption("--matrix")), "matrix")


def global_settings():
    """Return what a test may set for all others: such a test undoes it."""
    return {
        "default dtype": torch.get_default_dtype(),
        "autograd": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "process group": torch.distributed.is_initialized(),
    }


SETTINGS = pytest.StashKey[dict]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Give each test, and each fixture that it is the first to use, the same random numbers in any order of tests."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # of seed_everything; ranks that a test starts inherit them
        os.environ.pop(name, None)
    item.stash[SETTINGS] = global_settings()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    before = item.stash.get(SETTINGS, None)
    assert before is None or global_settings() == before, "the test leaves a global setting behind"

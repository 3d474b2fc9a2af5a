"""Registers the pytest plugin of the matrix, and starts autograd before the tests."""

from pathlib import Path

import torch

from tests.matrix import Matrix


def pytest_addoption(parser):
    parser.addoption("--matrix", type=Path, help="write the matrix of methods and conditions of this run to a file")


def pytest_configure(config):
    # Where the first backward of a process comes after an ONNX export, torch refuses autograd in its forks.
    torch.ones(1, requires_grad=True).sum().backward()
    worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Matrix(None if worker else config.getoption("--matrix")), "matrix")

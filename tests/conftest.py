"""Registers the plug-in of the matrix."""

from pathlib import Path

from tests.matrix import Matrix


def pytest_addoption(parser):
    parser.addoption("--matrix", type=Path, help="write the matrix of methods and conditions of this run to a file")


def pytest_configure(config):
    config.pluginmanager.register(Matrix(config.getoption("--matrix")), "matrix")

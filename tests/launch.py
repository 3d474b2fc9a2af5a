"""The package's own launcher of processes, under the name by which the tests know it."""

from lightning_contrast.testing import ChildError, free_port, run_processes

__all__ = ["ChildError", "free_port", "run_processes"]

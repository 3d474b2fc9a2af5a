"""Derived seeds, isolated random draws, and the way of draws to a device."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["derived_seed", "isolated", "seed_everything", "seeded", "send"]


def derived_seed(*parts: int) -> int:
    """Return a 63-bit seed that depends on all parts and their order; equal on every machine.

    Args:
        *parts: Integers, such as (seed, epoch, batch, rank).
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch and NumPy take signed seeds


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's generators in the block and restore their states afterwards.

    Args:
        seed: Seed of the block, >= 0; None uses the global generators.
        device: Device whose generator is seeded in addition to the CPU's.
    """
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


@contextmanager
def isolated(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python in the block and restore their states afterwards.

    Args:
        seed: Seed of the block, >= 0.
        device: Device whose generator is seeded in addition to the CPU's; None is the CUDA device, if any.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with seeded(seed, device):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch (all devices), NumPy and Python.

    Args:
        seed: >= 0; NumPy gets the lower 32 bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for it: from pinned memory, because a copy from other memory waits.

    Args:
        tensor: Tensor of any shape, on the CPU; one that is elsewhere is only moved.
        device: Target device.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

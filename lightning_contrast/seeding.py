"""Derived seeds and random draws that leave the global generators unchanged."""

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*parts: int) -> int:
    """Return a seed that is a function of all parts and of nothing else, equal on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: seeds are signed


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside, and leave the global generators as they were.

    Args:
        seed: None: draw from the global generators.
        device: Whose generator is seeded beside the CPU's.
    """
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


@contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the random numbers of torch, NumPy and Python from ``seed`` inside, and leave their generators as they were.

    Args:
        seed: >= 0.
        device: Whose generator is seeded beside the CPU's.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with seeded(seed, device):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def mixed_seed(*numbers: int) -> int:
    """Return 64 bits in which neighbouring numbers have nothing in common."""
    packed = struct.pack(f"<{len(numbers)}q", *(number & (2**63 - 1) for number in numbers))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def seed_everything(seed: int) -> None:
    """Seed the global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # the accelerators' generators too


def seed_of(*parts: int) -> int:
    """Return a 32-bit seed that depends on all of ``parts`` (whole numbers from 0), and not on their sum."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])

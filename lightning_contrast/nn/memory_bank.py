"""One slot per sample of the training set."""

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_probability, require


class MemoryBank(nn.Module):
    """A moving average of the embedding of every training sample.

    The memory bank of NPID (https://arxiv.org/abs/1805.01978, section 3.1; reference implementation:
    lib/LinearAverage.py): row ``v_i`` starts uniform in ``[-a, a]`` with ``a = sqrt(3 / D)``, about unit norm, and
    becomes ``normalize(momentum * v_i + (1 - momentum) * f_i)`` after its sample was used. It is part of the
    checkpoint, stays float32, and is updated by `QueueUpdate` with the step outputs ``"keys"`` and ``"indices"``.

    Differs from it: the initialization does not depend on the global generator, so it is the same on every rank; if a
    sample occurs twice in a batch, its last row is used, which is undefined in the reference.

    Args:
        num_samples: Number of training samples N, >= 1.
        dim: Width D of an embedding, >= 1.
        momentum: EMA momentum of a row, in [0, 1]; 0.5 in the reference implementation.
        seed: Seed of the initialization, >= 0.

    Raises:
        TypeError: If a size or the seed is not a whole number.
        ValueError: If a size is below 1, the seed below 0, or the momentum outside [0, 1].

    Example:
        >>> bank = MemoryBank(num_samples=10, dim=4)
        >>> bank.push(torch.ones(2, 4), indices=torch.tensor([3, 7]))
        >>> bank.features.shape
        torch.Size([10, 4])
    """

    bits: Tensor

    def __init__(self, num_samples: int, dim: int, momentum: float = 0.5, *, seed: int = 0) -> None:
        super().__init__()
        check_at_least("num_samples", num_samples, 1)
        check_at_least("dim", dim, 1)
        check_probability("momentum", momentum)
        check_at_least("seed", seed, 0)
        self.num_samples, self.dim, self.momentum = num_samples, dim, momentum
        bound = (3 / dim) ** 0.5
        generator = torch.Generator().manual_seed(seed)
        rows = (torch.rand(num_samples, dim, generator=generator, dtype=torch.float32) * 2 - 1) * bound
        # Strategies cast floating buffers but not integers, so the floats are kept as integers of equal bits.
        self.register_buffer("bits", rows.view(torch.int32))

    @property
    def features(self) -> Tensor:
        """Return the rows, (N, D) float32, without gradient, a view of the buffer, which a push changes."""
        return self.bits.view(torch.float32)

    @torch.no_grad()
    def push(self, keys: Tensor, indices: Tensor) -> None:
        """Update the rows of samples with their new embeddings; embeddings that are not finite are ignored.

        Args:
            keys: New embeddings, (B, D), of unit norm in NPID. On several ranks, those of all ranks in rank order.
            indices: Sample of each, (B,), integers in [0, N); the last of equal ones is used.

        Raises:
            ValueError: If the shapes do not fit, or, on the CPU, an index lies outside [0, N).
        """
        hint = f"Give one row of {self.dim} numbers and one index for each sample"
        require(keys.ndim == 2 and keys.shape[-1] == self.dim, "keys", f"be (B, {self.dim})", tuple(keys.shape), hint)
        require(indices.shape == keys.shape[:1], "indices", f"be ({len(keys)},)", tuple(indices.shape), hint)
        if indices.device.type == "cpu":  # elsewhere it would synchronize with the device
            self.check_indices(indices)
        features = self.features
        index = indices.to(features.device, torch.int64)
        old, new = features[index], keys.detach().to(features)
        rows = torch.where(new.isfinite().all(dim=1)[:, None], self.moved(old, new), old)
        # Every one of equal indices writes the row of the last, so the order of the writes does not matter.
        order = torch.arange(len(index), device=index.device)
        last = torch.zeros(self.num_samples, dtype=torch.int64, device=index.device)
        last.scatter_reduce_(0, index, order, reduce="amax")
        features.index_copy_(0, index, rows[last[index]])

    def moved(self, old: Tensor, new: Tensor) -> Tensor:
        """Return what old rows (B, D) become with the new embeddings (B, D) of their samples, (B, D)."""
        return nn.functional.normalize(self.momentum * old + (1 - self.momentum) * new, dim=1)

    def check_indices(self, indices: Tensor) -> None:
        """Raise a ValueError if an index (B,) lies outside [0, N); synchronizes with the device."""
        check_sample_indices(indices, self.num_samples)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"num_samples={self.num_samples}, dim={self.dim}, momentum={self.momentum}"


def check_sample_indices(indices: Tensor, num_samples: int) -> None:
    """Raise a ValueError if an index lies outside ``[0, num_samples)``; synchronizes with the device.

    Args:
        indices: Sample indices ``(B,)``, integers.
        num_samples: Number of samples.
    """
    if len(indices) == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    hint = "Set `num_samples` to the size of the training set"
    require(low >= 0 and high < num_samples, "indices", f"lie in [0, {num_samples})", (low, high), hint)

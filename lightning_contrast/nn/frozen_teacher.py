"""Frozen teachers of a distillation, which are no part of the student, and a cache of their features."""

import hashlib
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_contrast._checks import require
from lightning_contrast.nn.memory_bank import MemoryBank


class FrozenTeacher:
    """A network that only gives targets: in eval mode, without gradient, in its own precision.

    It is no `nn.Module`, so a module that holds it has none of its parameters: no optimizer, strategy, precision
    plugin, ``train()`` or checkpoint reaches them, and every rank holds the whole network. It follows its images to
    their device. Copies and pickles of the holder contain it.

    Args:
        module: Maps images ``(B, C, H, W)`` to features ``(B, D)``. It is used as it is: put into eval mode, with
            ``requires_grad=False``.
        feature_dim: D, the width of the features.

    Attributes:
        digest: A number of 63 bits that says which weights these are.
    """

    def __init__(self, module: nn.Module, feature_dim: int) -> None:
        self.module, self.feature_dim = module.eval().requires_grad_(False), feature_dim
        self.digest = weights_digest(module)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step calls it as it is
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images ``(B, C, H, W)``, ``(B, D)``, in float32 or a wider dtype.

        Raises:
            ValueError: If they are not ``(B, D)``.
        """
        weight = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        if weight is not None and weight.device != images.device:
            self.module.to(images.device)
        self.module.eval()  # someone who holds it may have called `train`
        device = images.device.type
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else nullcontext():
            features: Tensor = self.module(images if weight is None else images.to(weight.dtype))
        expected = (len(images), self.feature_dim)
        hint = "Give `teacher_dim`, or a teacher that returns one row of features per image"
        require(features.shape == expected, "teacher", f"return features {expected}", tuple(features.shape), hint)
        return features.to(torch.promote_types(features.dtype, torch.float32))


def weights_digest(module: nn.Module) -> int:
    """Return a number of 63 bits made of all parameters and buffers of a module, their names, shapes and dtypes.

    Args:
        module: Any module, on any device.
    """
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if value.is_meta:  # no values
                continue
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(found.digest()[:8], "big") >> 1


class FeatureCache(MemoryBank):
    """One row of unchanged features per training image, with a mask of those that are known.

    As a `MemoryBank` it is updated by `QueueUpdate` with the features of all ranks, is equal on all ranks, and is part
    of the checkpoint: N * D * 4 bytes, 10 GB for 1.28 million images and 2,048 features.

    Args:
        num_samples: Number of training images N, >= 1.
        dim: Width D of the features, >= 1.

    Attributes:
        mask: ``(N,)`` bool, the rows that are known.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If it is below 1.

    Example:
        >>> cache = FeatureCache(num_samples=3, dim=2)
        >>> cache.push(torch.ones(1, 2), indices=torch.tensor([2]))
        >>> cache.mask.tolist(), cache.features[2].tolist()
        ([False, False, True], [1.0, 1.0])
    """

    mask: Tensor

    def __init__(self, num_samples: int, dim: int) -> None:
        super().__init__(num_samples, dim, momentum=0.0)
        self.bits.zero_()
        self.register_buffer("mask", torch.zeros(num_samples, dtype=torch.bool))

    @torch.no_grad()
    def push(self, keys: Tensor, indices: Tensor) -> None:
        """Keep the features of samples; rows that are not finite are ignored.

        Args:
            keys: Features, ``(B, D)``. On several ranks, those of all ranks in rank order.
            indices: Sample of each, ``(B,)``, integers in [0, N).

        Raises:
            ValueError: If the shapes do not fit, or, on the CPU, an index lies outside [0, N).
        """
        super().push(keys, indices)
        finite = keys.isfinite().all(dim=1).to(self.mask.device, torch.float32)
        given = torch.zeros(self.num_samples, device=self.mask.device)
        self.mask |= given.index_add_(0, indices.to(self.mask.device, torch.int64), finite) > 0

    def moved(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the new rows (B, D), unchanged."""
        return new

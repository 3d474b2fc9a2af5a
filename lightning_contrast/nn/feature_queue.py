"""Queue of past embeddings, first in, first out."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, require

QueueDtype: TypeAlias = torch.dtype | Literal["float32", "float16", "int8"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
# Strategies cast floating buffers (FSDP's mixed precision, half-precision plugins) but not integers, so floats are kept
# as integers of equal bits.
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.int8: torch.int8}


class FeatureQueue(nn.Module):
    """The last ``size`` embeddings that were pushed, for negatives or nearest neighbors.

    The dictionary of MoCo (https://arxiv.org/abs/1911.05722, section 3.1; reference implementation: moco/builder.py).
    It starts empty, is part of the checkpoint, and is filled by `QueueUpdate`. Every operation has a fixed shape and no
    device synchronization. Embeddings are stored unchanged: normalize them before, or in the loss.

    Differs from it: unfilled rows are marked in ``mask`` instead of holding random vectors; a push that reaches the end
    continues at the start, so the size need not be a multiple of the batch; keys that are not finite are marked as
    unfilled; int8 rows have a scale each (65,536 x 128 takes 8.7 MB instead of 33.6 MB; for random unit rows a cosine
    similarity changes by 6e-4 on average and the InfoNCE loss by less than 2e-5 nats).

    Args:
        size: Number of rows K, >= 1.
        dim: Width D of an embedding, >= 1.
        dtype: Storage dtype of the rows: torch.float32, torch.float16 or torch.int8, or the name of one.
        labels: Keep an integer label for each row.

    Attributes:
        mask: (K,) bool, False for rows that are not filled yet, on the device of the rows.
        labels: (K,) int64, -1 for rows that are not filled yet; None without ``labels=True``.

    Raises:
        TypeError: If ``size`` or ``dim`` is not a whole number.
        ValueError: If one is below 1, or the dtype is none of the three.

    Example:
        >>> queue = FeatureQueue(size=4, dim=2)
        >>> queue.push(torch.ones(3, 2))
        >>> queue.features.shape, queue.mask.tolist()
        (torch.Size([4, 2]), [True, True, True, False])
    """

    bits: Tensor
    mask: Tensor
    position: Tensor
    scale_bits: Tensor | None
    labels: Tensor | None

    def __init__(self, size: int, dim: int, dtype: QueueDtype = torch.float32, labels: bool = False) -> None:
        super().__init__()
        check_at_least("size", size, 1)
        check_at_least("dim", dim, 1)
        name = str(dtype).removeprefix("torch.")
        check_choice("dtype", name, _DTYPES)
        self.size, self.dim, self.dtype = size, dim, _DTYPES[name]
        self._is_empty: bool | None = True  # None: unknown, as after a checkpoint was loaded
        self.register_buffer("bits", torch.zeros(size, dim, dtype=_BITS[self.dtype]))
        self.register_buffer("mask", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        is_scaled = self.dtype == torch.int8
        self.register_buffer("scale_bits", torch.zeros(size, dtype=torch.int32) if is_scaled else None)
        self.register_buffer("labels", torch.full((size,), -1) if labels else None)

    @property
    def features(self) -> Tensor:
        """Return the rows, (K, D) float32, without gradient; rows where ``mask`` is False are zero.

        A float32 queue returns a view of its buffer, which the next push changes.
        """
        if self.scale_bits is not None:
            return self.bits.float() * self.scale_bits.view(torch.float32)[:, None]
        return self.bits.view(self.dtype).float()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was pushed yet; known on the host, except once after a checkpoint was loaded."""
        if self._is_empty is None:
            self._is_empty = not bool(self.mask.any())
        return self._is_empty

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Overwrite the oldest rows with embeddings.

        Args:
            keys: Embeddings, (N, D) with N <= K, of any floating dtype. On several ranks, those of all ranks in rank
                order, so the queues stay equal.
            labels: Their labels, (N,); needed if and only if the queue keeps labels.

        Raises:
            ValueError: If the shapes do not fit, there are more keys than rows, or labels are missing or superfluous.
        """
        self._check(keys, labels)
        self._is_empty = False
        rows = keys.detach().to(self.bits.device, torch.float32)
        is_finite = rows.isfinite().all(dim=1)
        rows = torch.where(is_finite[:, None], rows, 0.0)
        # The oldest row is at `position`; indices are created on the device, without synchronization.
        index = (self.position + torch.arange(len(rows), device=rows.device)) % self.size
        if self.scale_bits is not None:
            scale = rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            self.scale_bits.index_copy_(0, index, scale.view(torch.int32))
            rows = (rows / scale[:, None]).round()
        self.bits.index_copy_(0, index, rows.to(self.dtype).view(self.bits.dtype))
        self.mask.index_copy_(0, index, is_finite)
        if self.labels is not None and labels is not None:
            self.labels.index_copy_(0, index, labels.to(self.labels))
        self.position.add_(len(rows)).remainder_(self.size)

    def _check(self, keys: Tensor, labels: Tensor | None) -> None:
        hint = f"Give one row of {self.dim} numbers for each key"
        require(keys.ndim == 2 and keys.shape[-1] == self.dim, "keys", f"be (N, {self.dim})", tuple(keys.shape), hint)
        if len(keys) > self.size:
            raise ValueError(f"Cannot push {len(keys)} keys into a queue of size {self.size}; raise `queue_size`.")
        if (labels is None) != (self.labels is None):
            given, hint = ("None", "Give one label for each key") if labels is None else ("labels", "Leave them out")
            rule = (
                f"be given where the queue was made with labels=True and only there (labels={self.labels is not None})"
            )
            require(False, "labels", rule, given, hint)
        if labels is not None:
            require(labels.shape == keys.shape[:1], "labels", f"be ({len(keys)},)", tuple(labels.shape), hint)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse rows of another dtype, whose bits represent other numbers."""
        self._is_empty = None
        saved = state_dict.get(prefix + "bits")
        if saved is not None and saved.dtype != self.bits.dtype:
            kept_in = next(name for name, dtype in _DTYPES.items() if _BITS[dtype] == saved.dtype)
            errors: list[str] = rest[-1]
            errors.append(f"{prefix}dtype: the checkpoint has a {kept_in} queue; make this one with that `dtype`.")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"size={self.size}, dim={self.dim}, dtype={self.dtype}, labels={self.labels is not None}"

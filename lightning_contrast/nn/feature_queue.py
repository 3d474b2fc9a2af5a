"""Queue of past embeddings, first in, first out."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_choice, require

QueueDtype: TypeAlias = torch.dtype | Literal["float32", "float16", "int8", "int4"]

_INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009  # missing in the stubs
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "int4": _INT4}
# Strategies cast floating buffers (FSDP's mixed precision, half-precision plugins) but not integers, so floats are kept
# as integers of equal bits.
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.int8: torch.int8, _INT4: torch.uint8}
_LARGEST = {torch.int8: 127, _INT4: 7}  # of the dtypes whose rows have a scale


class FeatureQueue(nn.Module):
    """The last ``size`` embeddings that were pushed, for negatives or nearest neighbors.

    The dictionary of MoCo (https://arxiv.org/abs/1911.05722, section 3.1; reference implementation: moco/builder.py).
    It starts empty, is part of the checkpoint, and is filled by `QueueUpdate`. Every operation has a fixed shape and no
    device synchronization. Embeddings are stored unchanged: normalize them before, or in the loss.

    Differs from it: unfilled rows are marked in ``mask`` instead of holding random vectors; a push that reaches the end
    continues at the start, so the size need not be a multiple of the batch; keys that are not finite are marked as
    unfilled; int8 and int4 rows have a scale each, and int4 stores two numbers per byte. ``docs/negatives.md`` has the
    memory and the error of each dtype.

    With ``sharded=True`` each of W ranks keeps every W-th row from `shard` on, which `QueueUpdate` calls: rank r those
    with the numbers r, r + W, ... Embeddings are pushed on all ranks as without it. ``features``, ``mask`` and
    ``labels`` are then the rows of this rank, for a loss that takes them as such
    (``info_nce(..., negatives_sharded=True)``). `state_dict` holds the rows of all ranks and is a collective
    operation: all ranks must call it, as Lightning does for a checkpoint. It loads for any number of ranks.

    Args:
        size: Number of rows K of all ranks, >= 1.
        dim: Width D of an embedding, >= 1.
        dtype: Storage dtype of the rows: torch.float32, torch.float16, torch.int8 or torch.int4, or the name of one.
        labels: Keep an integer label for each row.
        sharded: Let each rank keep a part of the rows.

    Attributes:
        mask: (K,) bool, False for rows that are not filled yet, on the device of the rows.
        labels: (K,) int64, -1 for rows that are not filled yet; None without ``labels=True``.

    Raises:
        TypeError: If ``size`` or ``dim`` is not a whole number.
        ValueError: If one is below 1, or the dtype is none of the four.

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

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: QueueDtype = torch.float32,
        labels: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        check_at_least("size", size, 1)
        check_at_least("dim", dim, 1)
        name = str(dtype).removeprefix("torch.")
        check_choice("dtype", name, _DTYPES)
        self.size, self.dim, self.dtype, self.sharded = size, dim, _DTYPES[name], sharded
        self._ranks, self._rank = 1, 0  # by `shard`
        self._is_empty: bool | None = True  # None: unknown, as after a checkpoint was loaded
        width = (dim + 1) // 2 if self.dtype == _INT4 else dim
        self.register_buffer("bits", torch.zeros(size, width, dtype=_BITS[self.dtype]))
        self.register_buffer("mask", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        is_scaled = self.dtype in _LARGEST
        self.register_buffer("scale_bits", torch.zeros(size, dtype=torch.int32) if is_scaled else None)
        self.register_buffer("labels", torch.full((size,), -1) if labels else None)

    @property
    def features(self) -> Tensor:
        """Return the rows, (K, D) float32, without gradient; rows where ``mask`` is False are zero.

        A float32 queue returns a view of its buffer, which the next push changes.
        """
        if self.scale_bits is None:
            return self.bits.view(self.dtype).float()
        numbers = _unpack(self.bits, self.dim) if self.dtype == _INT4 else self.bits
        return numbers.float() * self.scale_bits.view(torch.float32)[:, None]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was pushed yet, on any rank; known on the host, except once after a checkpoint was loaded."""
        if self._is_empty is None:
            filled = self.mask.any().int()
            self._is_empty = not bool(distributed.all_reduce_sum(filled) if self._ranks > 1 else filled)
        return self._is_empty

    def shard(self) -> None:
        """Keep only the rows of this rank; without ``sharded=True``, in one process, or if done before, do nothing.

        Raises:
            ValueError: If the size is no multiple of the number of ranks, or the queue was shared by other ranks.
        """
        ranks, rank = distributed.world_size(), distributed.rank()
        if not self.sharded or self._ranks == ranks:
            return
        hint = "Create the module anew, or start the run with as many processes"
        require(self._ranks == 1, "queue", f"be shared by {ranks} ranks", f"one of {self._ranks}", hint)
        hint = "Change the size of the queue"
        require(self.size % ranks == 0, "size", f"be a multiple of the {ranks} ranks", self.size, hint)
        self._ranks, self._rank = ranks, rank
        for name in self._row_buffers():
            setattr(self, name, getattr(self, name)[rank::ranks].clone())

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
        # The oldest row is at `position`; indices are created on the device, without synchronization.
        first = (self._rank - self.position) % self._ranks  # of the keys whose rows this rank keeps
        taken = first + torch.arange(0, len(keys), self._ranks, device=self.bits.device)
        index = (self.position + taken) % self.size // self._ranks
        is_own: Tensor | None = None  # the last one may lie after the keys
        rows = keys.detach().to(self.bits.device, torch.float32)
        if self._ranks > 1:
            is_own, taken = taken < len(keys), taken.clamp_max(len(keys) - 1)
            rows, labels = rows[taken], None if labels is None else labels.to(self.bits.device)[taken]
        is_finite = rows.isfinite().all(dim=1)
        rows = torch.where(is_finite[:, None], rows, 0.0)
        written = {"mask": is_finite}
        if self.scale_bits is not None:
            scale = rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST[self.dtype]
            written["scale_bits"] = scale.view(torch.int32)
            rows = (rows / scale[:, None]).round()
        packed = self.dtype == _INT4
        written["bits"] = _pack(rows) if packed else rows.to(self.dtype).view(self.bits.dtype)
        if self.labels is not None and labels is not None:
            written["labels"] = labels.to(self.labels)
        for name, new in written.items():
            buffer = getattr(self, name)
            if is_own is not None:
                new = torch.where(is_own.view(-1, *[1] * (new.ndim - 1)), new, buffer[index])  # noqa: PLW2901
            buffer.index_copy_(0, index, new)
        self.position.add_(len(keys)).remainder_(self.size)

    def _row_buffers(self) -> list[str]:
        """Return the names of the buffers with one entry per row."""
        return [name for name, buffer in self.named_buffers() if buffer.ndim > 0]

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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the rows of all ranks, in order."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._ranks > 1:
            for name in self._row_buffers():
                parts = distributed.gather(getattr(self, name), [self.size // self._ranks] * self._ranks)
                parts = parts.view(self._ranks, -1, *parts.shape[1:]).transpose(0, 1)
                destination[prefix + name] = parts.flatten(0, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse rows of another dtype, whose bits represent other numbers."""
        self._is_empty = None
        saved = state_dict.get(prefix + "bits")
        if saved is not None and saved.dtype != self.bits.dtype:
            kept_in = next(name for name, dtype in _DTYPES.items() if _BITS[dtype] == saved.dtype)
            errors: list[str] = rest[-1]
            errors.append(f"{prefix}dtype: the checkpoint has a {kept_in} queue; make this one with that `dtype`.")
            return
        if self._ranks > 1:  # a checkpoint has the rows of all ranks
            keys = [prefix + name for name in self._row_buffers()]
            whole = {key: torch.clone(state_dict[key]) for key in keys if key in state_dict}  # FSDP1 loads lazily
            parts = {key: rows[self._rank :: self._ranks] for key, rows in whole.items()}
            state_dict = {**state_dict, **parts}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        options = f"labels={self.labels is not None}, sharded={self.sharded}"
        return f"size={self.size}, dim={self.dim}, dtype={self.dtype}, {options}"


def _pack(numbers: Tensor) -> Tensor:
    """Return whole numbers (N, D) in -8..7, two per byte in two's complement, (N, (D + 1) // 2) uint8."""
    nibbles = numbers.to(torch.int8).bitwise_and(15).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def _unpack(packed: Tensor, dim: int) -> Tensor:
    """Return the numbers (N, ``dim``) of `_pack`, int8."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :dim]
    return (nibbles.to(torch.int8) ^ 8) - 8

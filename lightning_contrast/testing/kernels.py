"""Count the kernels that eager code launches."""

from collections import Counter
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that are no view and still launch nothing: they only allocate, or only change sizes and strides.
_FREE = {
    "_assert_async",
    "_reshape_alias",
    "_unsafe_view",
    "_version",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "is_pinned",
    "is_same_size",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "record_stream",
    "resize_",
    "resize_as_",
    "set_",
}


class count_kernels:  # noqa: N801  # reads as the function that it is used as
    """Context that counts the dispatched operations that launch work on a device; views and allocations are free.

    One dispatched operation counts once, whatever it launches inside: a ``_foreach`` operation, a convolution and a
    fused optimizer step each count as one. That is a lower bound of the launches of eager code, independent of the
    machine and of the sizes, which is what a regression test needs. The backward pass and the optimizer count as well.
    What compiled code launches is not seen.

    Where tensors of an accelerator, or of the meta device, take part, operations on the CPU alone (random draws, for
    example) are not counted; where all tensors lie on the CPU, every operation counts. Code that branches on the device
    takes the branch of an accelerator for ``meta`` tensors, so that a count needs neither an accelerator nor memory.

    Attributes:
        total: The number of operations.
        by_name: How often each operation ran, by its name.

    Example:
        >>> import torch
        >>> with count_kernels() as kernels:
        ...     total = torch.ones(4).view(2, 2).t().add(1).sum()
        >>> kernels.total, dict(kernels.by_name)
        (3, {'ones': 1, 'add': 1, 'sum': 1})
    """

    def __init__(self) -> None:
        self._on_device: Counter[str] = Counter()
        self._on_host: Counter[str] = Counter()
        self._mode = _KernelMode(self._add)

    @property
    def by_name(self) -> Counter[str]:
        """How often each operation ran, by its name."""
        return self._on_device or self._on_host

    @property
    def total(self) -> int:
        """The number of operations."""
        return self.by_name.total()

    def __enter__(self) -> Self:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def _add(self, operation: str, on_device: bool) -> None:
        (self._on_device if on_device else self._on_host)[operation] += 1


class _KernelMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's are untyped
    """Reports each operation that launches something, and whether a device tensor took part."""

    def __init__(self, found: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _FREE and not func.is_view and func.namespace != "prim":
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            if tensors:  # others only query something
                self._found(name, any(tensor.device.type != "cpu" for tensor in tensors))
        return result

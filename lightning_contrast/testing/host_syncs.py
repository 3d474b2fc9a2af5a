"""Count how often the host waits for the device."""

import os
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Each reads a value on the host, or returns a tensor whose shape depends on device data.
_OPERATIONS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_METHODS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}  # dispatch no operation for a CPU tensor
_TORCH = os.path.dirname(torch.__file__)


class HostSyncs:
    """Context that lists the places where the host waits for the device, or would wait if the tensors were on it.

    It sees ``item``, ``bool(tensor)``, ``tolist``, ``cpu``, ``numpy``, ``equal``, ``nonzero``, indexing with a mask,
    ``unique``, ``masked_select``, ``bincount``, ``repeat_interleave`` without its size, and copies to the host. They
    count on CPU tensors, too, so that a test needs no accelerator. Compiled code and libraries that read memory
    directly are not seen.

    If tensors on an accelerator or the meta device take part, reads of CPU tensors are free and do not count.

    Example:
        >>> with HostSyncs() as syncs:
        ...     total = torch.ones(3).sum()
        ...     shown = float(total)
        >>> len(syncs.places)
        1
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, bool]] = []
        self._saw_device = False
        self._modes: tuple[Any, ...] = (_Operations(self._add, self._see), _Functions(self._add))

    @property
    def places(self) -> list[str]:
        """One line for each wait, in order: ``file:line in function: operation``."""
        return [place for place, on_device in self._found if on_device or not self._saw_device]

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def _see(self) -> None:
        self._saw_device = True

    def _add(self, operation: str, on_device: bool) -> None:
        own = (_TORCH, __file__)
        frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(own)]
        at = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else "torch"
        self._found.append((f"{at}: {operation}", on_device))


def count_host_syncs(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Return how often the host waits for the device while ``fn(*args, **kwargs)`` runs.

    See `HostSyncs` for what counts. The ``repr`` of the returned number lists the places, so that a failed
    ``assert count_host_syncs(step) == 0`` names them.

    Args:
        fn: Anything that can be called; it is called once.
        *args: Passed on.
        **kwargs: Passed on.

    Returns:
        The number of waits, an ``int`` with an attribute ``places``.

    Example:
        >>> count_host_syncs(lambda: torch.ones(3).sum() * 2) == 0
        True
        >>> count_host_syncs(lambda: torch.ones(3).sum().item()) == 1
        True
    """
    with HostSyncs() as syncs:
        fn(*args, **kwargs)
    return _Count.of(syncs.places)


class _Count(int):
    """A number of host syncs whose ``repr`` lists them."""

    places: tuple[str, ...]

    @classmethod
    def of(cls, places: list[str]) -> Self:
        count = cls(len(places))
        count.places = tuple(places)
        return count

    def __repr__(self) -> str:
        return "\n  ".join([f"{int(self)} host syncs", *self.places])


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's are untyped
    """Reports operations that wait, and whether device tensors take part."""

    def __init__(self, found: Callable[[str, bool], None], saw_device: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found, self._saw_device = found, saw_device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        on_device = any(isinstance(arg, Tensor) and arg.device.type != "cpu" for arg in args)
        if on_device:
            self._saw_device()
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in _OPERATIONS or unsized or masked:
            self._found(f"{name} with a mask" if masked else name, on_device)
        result = func(*args, **(kwargs or {}))
        if on_device and isinstance(result, Tensor) and result.device.type == "cpu":
            self._found(f"{name} to the host", True)
        return result


class _Functions(TorchFunctionMode):
    """Reports methods that wait but dispatch no operation for a CPU tensor."""

    def __init__(self, found: Callable[[str, bool], None]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS and args[0].device.type == "cpu":  # from elsewhere it is an operation
            self._found(_METHODS[func], False)
        return func(*args, **(kwargs or {}))

"""A pretended device: its tensors lie in host memory, but report another device and must not be read.

`PretendedDevice` registers torch's Python backend for out-of-tree devices under the name ``pretend``. A tensor on it
wraps a CPU tensor, computes there and reports ``device(type="pretend", index=0)``. So all code takes the branch of an
accelerator, autograd runs the backward pass on the queue of that device, and optimizers, Lightning and the callbacks
run unchanged. While the context is active, each dispatched operation is judged before it runs:

- A read of values on the host is a fault: ``item``, ``bool``, ``tolist``, ``cpu``, ``numpy``, copies to the host,
  operations whose shape depends on the data (``nonzero``, ``unique``, indexing with a mask, ``repeat_interleave``
  without its size), and the error check after a decomposition of ``torch.linalg``.
- A host tensor that meets a device tensor is a fault, also as an index. As on CUDA, a host scalar (zero dimensions) is
  allowed in pointwise operations, and copies to the device are no fault.

It sees what goes through torch's dispatcher, in the forward pass, in the backward pass and in optimizers. It does not
see what a copy to the device costs where the memory is not pinned, kernels that exist only for the CPU (everything
computes there), random generators of the device (draws come from the CPU's), autocast (except that it is turned off),
reads inside a kernel, several streams, and branches on ``device.type == "cuda"``. `Module.to` makes new parameters.
"""

import contextlib
import functools
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = str(Path(__file__).parents[2])
_PACKAGE = f"{ROOT}/lightning_contrast/"
NAME = "pretend"
_HERE, _TORCH = __file__, str(Path(torch.__file__).parent)
_READS = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_MEETS, _MEETING = "meets ", " and one of the device"
_UPLOADS = {"_to_copy", "copy_", "_foreach_copy_"}
# Operations that take a host scalar together with device tensors, although they are not tagged as pointwise.
_SCALARS_WELCOME = ("_foreach_", "index_put", "index_fill", "masked_fill", "_fused_", "fill_")


class DeviceFault(AssertionError):
    """Something that would be wrong, or slow, on an accelerator."""


class OnDevice(Tensor):
    """A tensor that says that it lies on the pretended device; ``host`` holds its values."""

    @staticmethod
    def __new__(cls, host, requires_grad=False):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        wrapper = Tensor._make_wrapper_subclass(
            cls, host.size(), device=f"{NAME}:0", requires_grad=requires_grad, **layout
        )
        wrapper.host = host
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"OnDevice{tuple(self.shape)}"


def run(func, args, kwargs):
    """Run an operation on the values of the host, and put its results where they belong."""
    leaves = tree_leaves((args, kwargs))
    wrappers = {id(leaf.host): leaf for leaf in leaves if isinstance(leaf, OnDevice)}
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]

    def unwrap(leaf):
        if isinstance(leaf, OnDevice):
            return leaf.host
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def wrap(leaf):
        return wrappers.get(id(leaf)) if id(leaf) in wrappers else OnDevice(leaf)

    arguments = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    there = devices[0].type == NAME if devices else bool(wrappers)
    if func.overloadpacket.__name__ == "copy_" and args[0] is not wrappers.get(id(arguments[0][0])):
        there = False  # to the host
    result = func(*arguments[0], **arguments[1])
    if devices and there and not wrappers and func.overloadpacket.__name__ == "_to_copy":
        result = result.clone() if any(result is leaf for leaf in leaves) else result
    if not there:
        return result
    return tree_map(lambda leaf: wrap(leaf) if isinstance(leaf, Tensor) else leaf, result)


def judge(func, args, kwargs):
    """Return what is wrong with an operation, or None."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    if not there:
        return None
    if name in _READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return f"{name} reads the device"
    indices = args[1] if name in _INDEXED else ()
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return f"{name} with a mask reads the device"
    if name == "_to_copy":
        device = kwargs.get("device")
        return "a copy to the host" if device is not None and torch.device(device).type != NAME else None
    if name == "copy_":
        return None if isinstance(args[0], OnDevice) else "a copy to the host"
    scalars = torch.Tag.pointwise in func.tags or name.startswith(_SCALARS_WELCOME)
    strangers = [t for t in tensors if not isinstance(t, OnDevice) and not (scalars and t.ndim == 0)]
    if strangers and name not in _UPLOADS:
        return f"{name} of a tensor of the host, {tuple(strangers[0].shape)},{_MEETING}"
    return None


class PretendedDevice:
    """Context in which the pretended device exists; a `DeviceFault` at its end names all faults and their places.

    Only for a process that ran no backward before: see `in_own_process`.

    Args:
        documented: Where faults are allowed: ``file:function`` that must be on the stack, the file by the end of its
            path; and how many at most, with the reason. Reads are allowed, or, after ``meets``, meetings of devices.

    Attributes:
        used: How many faults each of the documented places had.
        faults: The faults, each with its place, in order.
    """

    device = property(lambda self: torch.device(NAME, 0))

    def __init__(self, documented=None):
        register()
        self.documented, self.used, self.faults = documented or {}, Counter(), []
        self._modes = _Functions(self), _Judge(self)

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) copies where the modes see it
        return self

    def __exit__(self, kind, error, trace):
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)
        if kind is None and self.faults:
            counts = Counter(self.faults)
            raise DeviceFault("\n".join(["", *(f"{fault} ({count} times)" for fault, count in counts.items())]))

    def found(self, wrong):
        """Note a fault, if it is not documented."""
        frames = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)  # the nearest first
        frames = [frame for frame in reversed(frames) if frame.filename not in (_HERE, contextlib.__file__)]
        stack = [f"{frame.filename}:{frame.name}" for frame in frames]
        for place, (limit, _) in self.documented.items():
            suffix = place.removeprefix(_MEETS)
            if (suffix != place) != wrong.endswith(_MEETING) or self.used[place] >= limit:
                continue
            if any(line.endswith(suffix) for line in stack):
                self.used[place] += 1
                return
        nearest = [frame for frame in frames if not frame.filename.startswith(_TORCH)] or frames
        at = f"{nearest[-1].filename.removeprefix(ROOT)}:{nearest[-1].lineno} in {nearest[-1].name}"
        package = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
        via = f" from {package[0].filename.removeprefix(_PACKAGE)}:{package[0].name}" if package else ""
        self.faults.append(f"{at}{via}: {wrong}")


class _Judge(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (wrong := judge(func, args, kwargs or {})) is not None:
            self._device.found(wrong)
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees what is no dispatched operation: reads of memory, and data of a tensor that are replaced."""

    def __init__(self, device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], OnDevice):
            self._device.found(f"{func.__name__} reads the device")
            return getattr(args[0].host, func.__name__)()
        result = func(*args, **(kwargs or {}))
        if func is Tensor.data.__set__ and isinstance(args[0], OnDevice):
            args[0].host = args[1].host
        return result


class _Backend:
    """What torch asks the module of a device."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def set_device(self, device):
        pass

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


@functools.cache
def register():
    """Make the device known to torch, for good: for this process only."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())


_POOL = None


def in_own_process(test):
    """Run a test in a process that has the pretended device; all tests of a session share it.

    Torch counts the devices at the first backward pass of a process and keeps a registered backend for good, so the
    process of the other tests cannot have it. Arguments of the test must be picklable.
    """

    @functools.wraps(test)
    def wrapper(**arguments):
        global _POOL
        if torch._C._get_privateuse1_backend_name() == NAME:
            return test(**arguments)
        if _POOL is None:
            _POOL = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start)
        report = _POOL.submit(_outcome, wrapper, arguments).result(timeout=300)
        if report is not None:
            pytest.fail(report, pytrace=False)

    return wrapper


def _outcome(test, arguments):
    """Return what a test raised, as text, or None."""
    try:
        test(**arguments)
    except BaseException:  # noqa: BLE001  # a failed pytest.raises is none of Exception
        return traceback.format_exc()
    return None


def _start():
    register()
    torch.set_num_threads(1)

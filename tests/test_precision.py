"""Every method in bfloat16, mixed and true, and in float16 with a scaler: losses and persistent state in float32."""

import warnings
from collections.abc import Callable
from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.nn import FeatureQueue, MemoryBank
from lightning_contrast.nn.center import StepAverage
from tests.callbacks.step_modules import QUIET
from tests.methods.cases import CASES, fill_queue, make
from tests.methods.test_contract import as_is, step_batch

HALF = (torch.bfloat16, torch.float16)
TOO_SHORT = "DINO"  # its embedding in this test is so short that the gradient overflows float16: all steps skip
SCALE = 2.0**-8  # small enough that no gradient of these networks overflows
MOVES = {  # operations that move or select numbers without arithmetic
    "_local_scalar_dense",
    "_to_copy",
    "_unsafe_view",
    "alias",
    "aminmax",
    "argmax",
    "cat",
    "clone",
    "copy_",
    "detach",
    "expand",
    "gather",
    "index",
    "index_select",
    "masked_fill",
    "new_zeros",
    "permute",
    "repeat",
    "roll",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "stack",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


def half_precision(kind):
    """Return the Trainer's settings; float16 as on a GPU except for the device."""
    if kind == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    return {"precision": kind}


class Outside(TorchDispatchMode):
    """Records half-precision arithmetic outside the networks, where the losses are."""

    def __init__(self):
        super().__init__()
        self.depth, self.found = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.depth == 0:
            name = func.overloadpacket.__name__
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if name not in MOVES and any(tensor.dtype in HALF for tensor in tensors):
                self.found.add(name)
        return func(*args, **(kwargs or {}))

    def watch(self, module):
        """Track the depth of the calls of the module's networks, and inspect the rest of its step."""
        for child in module.children():
            child.register_forward_pre_hook(self._enter)
            child.register_forward_hook(self._leave, always_call=True)
        for child, names in type(module).sharded_methods.items():
            network = getattr(module, child, None)
            for name in names if network is not None else ():
                setattr(network, name, self._counted(getattr(network, name)))
        if hasattr(module, "adversarial"):  # RoCL differentiates its networks within the step
            module.adversarial = self._counted(module.adversarial)
        step = module.training_step

        def training_step(batch, batch_idx):
            with self:
                return step(batch, batch_idx)

        module.training_step = training_step

    def _enter(self, *_):
        self.depth += 1

    def _leave(self, *_):
        self.depth -= 1

    def _counted(self, method: Callable) -> Callable:
        def call(*args, **kwargs):
            self.depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self.depth -= 1

        return call


class Steps(L.Callback):
    """Stores the losses, and makes some gradients overflow."""

    def __init__(self, overflows=()):
        self.losses, self.overflows, self.moments = [], overflows, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.moments.append(persistent(pl_module))

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx in self.overflows:
            next(p.grad for p in pl_module.parameters() if p.grad is not None).fill_(torch.inf)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"])


def pairs_of(module):
    return module.momentum_pairs() if hasattr(module, "momentum_pairs") else []


def persistent(module):
    """Return the tensors that change only with optimizer steps: momentum networks and step states."""
    states = module.step_states() if hasattr(module, "step_states") else []
    modules = [momentum for _, momentum in pairs_of(module)] + states
    return [
        tensor.detach().clone()
        for one in modules
        for tensor in [*one.parameters(), *(one.buffers() if one in states else ())]
    ]


def fit(name, settings, *, steps=2, overflows=(), device="cpu"):
    module, seen, outside = fill_queue(make(name)), Steps(overflows), Outside()
    if not overflows:
        outside.watch(module)
    kept = {"max_epochs": 1, "limit_val_batches": 0} | QUIET | {"accelerator": device}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(**(kept | settings), callbacks=[seen])
        batches = [step_batch(CASES[name])] * steps
        trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=as_is))
    return module, trainer, seen, outside.found


def check_float32(name, kind, module, trainer, losses):
    """Check the persistent state: queues, centers, momentum networks or their masters, weights."""
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    queues = module.queues().values() if hasattr(module, "queues") else []
    for queue in queues:
        assert isinstance(queue, FeatureQueue | MemoryBank)
        assert queue.features.dtype == torch.float32
        assert queue.bits.dtype == torch.int32  # no strategy casts it
        assert queue.features.isfinite().all()
    for state in module.step_states() if hasattr(module, "step_states") else []:
        assert isinstance(state, StepAverage)
        assert state.value.dtype == torch.float32
        assert state.value.abs().sum() > 0 or (name, kind) == (TOO_SHORT, "16-mixed")
    update = next((c for c in trainer.callbacks if isinstance(c, MomentumUpdate)), None)
    if not pairs_of(module) or update is None:
        return
    masters = update.state_dict()["masters"]
    parameters = [(i, n, p) for i, (_, m) in enumerate(pairs_of(module)) for n, p in m.named_parameters()]
    for index, parameter_name, parameter in parameters:
        if kind == "bf16-true":
            master = masters[f"{index}.{parameter_name}"]
            assert master.dtype == torch.float32
            assert torch.equal(master.to(parameter.dtype), parameter.cpu())
        else:
            assert parameter.dtype == torch.float32
    assert kind != "bf16-true" or len(masters) == len(parameters)


@pytest.mark.parametrize("kind", ["bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_losses_and_persistent_state_are_float32(name, kind):
    module, trainer, seen, found = fit(name, half_precision(kind))
    assert not found, f"arithmetic in half precision outside the networks: {found}"
    assert len(seen.losses) == 2
    check_float32(name, kind, module, trainer, seen.losses)
    dtype = torch.bfloat16 if kind == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {dtype}


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if " " not in n and case.stateful and n != TOO_SHORT])
def test_a_step_that_the_scaler_skips_moves_nothing(name):
    """Steps 1 and 2 of 4 overflow: momentum networks and centers do not change; queues stay finite."""
    module, trainer, seen, _ = fit(name, half_precision("16-mixed"), steps=4, overflows=(1, 2))
    assert trainer.precision_plugin.scaler.get_scale() == SCALE / 4
    moments = [*seen.moments, persistent(module)]
    moves = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(moments)]
    assert moves == ([True, False, False, True] if moments[0] else [False] * 4)
    check_float32(name, "16-mixed", module, trainer, seen.losses)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_persistent_state_are_float32_on_a_gpu(name, kind):
    module, trainer, seen, found = fit(name, {"precision": kind, "devices": 1}, device="gpu")
    assert not found
    check_float32(name, kind, module, trainer, seen.losses)

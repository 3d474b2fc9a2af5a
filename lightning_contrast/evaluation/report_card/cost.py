"""The part of a report about size, speed, memory and energy."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_contrast.callbacks.throughput.meters import EnergyMeter
from lightning_contrast.evaluation.feature_pass.subjects import Subject
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.result import Outcome
from lightning_contrast.metrics.zero_shot import eval_mode

_TIMED = 64
_ROUNDS = 3
_ENERGY_SECONDS = 5.0  # of passes: codecarbon samples power once per second or less often
_GRAMS_PER_KWH = 473.0
"""World average of 2024 (Ember, Global Electricity Review 2025), as in `TrainingCostMonitor`."""


def cost(context: Context, model: str) -> Outcome:
    """Parameters, operations, images per second, memory, and on request energy."""
    subject = context.subjects[model]
    inputs = context.inputs(model, context.images(_TIMED)[0])
    outcome = Outcome(
        values={
            "parameters": float(sum(p.numel() for p in subject.module.parameters())),
            "feature width": float(context.test[model].features.shape[1]),
        }
    )
    with eval_mode(subject.module), torch.no_grad():
        counter = FlopCounterMode(display=False)
        with counter:
            subject.module(inputs[:1])
        outcome.values["GFLOPs per image"] = counter.get_total_flops() / 1e9
        outcome.measured[f"peak memory of a pass of {len(inputs)} images in MiB"] = _peak_mib(subject, inputs)
        seconds = [_pass_seconds(subject, inputs) for _ in range(_ROUNDS)]
        outcome.measured["images per second"] = len(inputs) / min(seconds)
        if context.options["energy"]:
            outcome.measured |= _energy(subject, inputs)
            outcome.notes.append(
                "Energy is that of the whole machine by codecarbon, which estimates what it cannot measure; CO2 is it "
                f"times {_GRAMS_PER_KWH:.0f} g/kWh, the world average of 2024."
            )
    outcome.notes.append(
        "Operations count multiplications and additions, memory counts weights, images and results of layers; networks "
        "that torch cannot count have 0."
    )
    return outcome


def _pass_seconds(subject: Subject, inputs: Tensor) -> float:
    start = time.perf_counter()
    subject.module(inputs)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return time.perf_counter() - start


def _peak_mib(subject: Subject, inputs: Tensor) -> float:
    """Return the largest number of MiB that inputs ``(B, C, H, W)``, the model and what a pass makes take."""
    held = sum(tensor.nbytes for tensor in (inputs, *subject.module.parameters(), *subject.module.buffers()))
    if inputs.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(inputs.device)
        before = torch.cuda.memory_allocated(inputs.device)  # also of other models
        subject.module(inputs)
        return float(torch.cuda.max_memory_allocated(inputs.device) - before + held) / 2**20
    with LiveBytes() as counter:
        subject.module(inputs)
    return float(counter.peak + held) / 2**20


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the results of operations that are alive at one time; work space of kernels is not counted.

    Attributes:
        peak: The most bytes at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it returns unless it is a view of an argument."""
        found = func(*args, **(kwargs or {}))
        given = {of.untyped_storage()._cdata for of in tree_leaves((args, kwargs)) if isinstance(of, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._known = {key: of for key, of in self._known.items() if not of[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._known.values()))
        return found


def _energy(subject: Subject, inputs: Tensor) -> dict[str, float]:
    """Return the energy of 1,000 images and its CO2, from passes of inputs ``(B, C, H, W)`` for some seconds."""
    meter, images, start = EnergyMeter(), 0, time.perf_counter()
    try:
        while images == 0 or time.perf_counter() - start < _ENERGY_SECONDS:
            _pass_seconds(subject, inputs)
            images += len(inputs)
        kwh = meter.take()
    finally:
        meter.stop()
    if kwh is None:
        return {}
    scale = 1000 / images
    return {
        "Wh per 1,000 images (estimate)": 1000 * kwh * scale,
        "g of CO2 per 1,000 images (estimate)": _GRAMS_PER_KWH * kwh * scale,
    }

"""The part of a report about size and speed."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.result import Outcome
from lightning_contrast.metrics.zero_shot import eval_mode

_TIMED = 64
_ROUNDS = 3


def cost(context: Context, model: str) -> Outcome:
    """Parameters, operations, and images per second."""
    subject = context.subjects[model]
    parameter = next(subject.module.parameters(), None)
    images, _ = context.images(_TIMED)
    inputs = subject.preprocess(images if parameter is None else images.to(parameter.device))
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
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            subject.module(inputs)
            if inputs.device.type == "cuda":
                torch.cuda.synchronize(inputs.device)
            seconds.append(time.perf_counter() - start)
    outcome.measured["images per second"] = len(inputs) / min(seconds)
    if inputs.device.type == "cuda":
        outcome.measured["peak memory in MiB"] = torch.cuda.max_memory_allocated(inputs.device) / 2**20
    outcome.notes.append("Operations count multiplications and additions; networks that torch cannot count have 0.")
    return outcome

"""What is no number where a method wants one is an error that says so when the method is built, not Python's own."""

import inspect
import math

import pytest

from tests.methods.cases import CASES, make

FIRST = {case.make: name for name, case in reversed(CASES.items()) if inspect.isclass(case.make)}
"""The first case of each class: later ones have options that make some arguments meaningless."""


@pytest.mark.parametrize("name", FIRST.values())
def test_numbers_are_asked_for_by_name(name):
    numbers = {
        argument: parameter.annotation
        for argument, parameter in inspect.signature(CASES[name].make.__init__).parameters.items()
        if parameter.annotation in (int, float)
    }
    for argument in numbers:
        for value in ("much", (1, 2), math.inf, -math.inf, math.nan):
            with pytest.raises((TypeError, ValueError), match=r"^`[\w.]+` must "):
                make(name, **{argument: value})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("IBOT", {"mask_ratios": 0.3}),
        ("IBOT", {"mask_spreads": "0.1"}),
        ("IBOT", {"mask_ratios": (0.1, None)}),
        ("PairContrast", {"loss_options": 3.0}),
        ("PairContrast", {"loss": "vicreg", "temperature": None, "loss_options": {"covariance_weight": math.inf}}),
        ("PairContrast", {"loss": "vicreg", "temperature": None, "loss_options": {"covariance_weight": "much"}}),
        ("CLIP", {"max_logit_scale": math.inf}),
        ("CLIP", {"text_kwargs": 3}),
        ("GLoRIA", {"text_kwargs": [1, 2]}),
        ("VJEPA", {"masks": 3}),
        ("MoCo", {"symmetric": "both"}),
        ("MoCo", {"lr_schedule": ""}),
        ("Distill", {"teacher": "resnet10t", "teacher_kwargs": "much"}),
        *((name, {"backbone_kwargs": "much"}) for name in ("SimCLR", "MAE", "IJEPA", "VJEPA")),
    ],
    ids=str,
)
def test_sequences_and_dicts_of_numbers_are_asked_for_by_name(name, arguments):
    last = list(arguments)[-1]
    with pytest.raises((TypeError, ValueError), match=rf"^`{last}[\w.]*` must "):
        make(name, **arguments)

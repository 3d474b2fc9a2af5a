"""Tip-Adapter: official values, the formula in loops, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_contrast.evaluation import tip_adapter_logits
from tests.tolerances import NETWORK, f32, near64

(RECORD,) = json.loads((Path(__file__).parent / "official_tip_adapter.json").read_text(encoding="utf-8"))


def test_equals_the_reference_implementation():
    x = {key: torch.tensor(value) for key, value in RECORD["inputs"].items()}
    found = tip_adapter_logits(**(x | {"cache_labels": x["cache_labels"].long()}), **RECORD["params"])
    torch.testing.assert_close(found, torch.tensor(RECORD["value"]), **f32(NETWORK, size=10.0))


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 4, generator=generator, dtype=torch.float64), dim=1)


def test_in_loops():
    f, keys, texts, labels = rows(2, 0), rows(5, 1), rows(3, 2), torch.tensor([0, 2, 2, 1, 0])
    found = tip_adapter_logits(f, keys, labels, texts.T, weight=1.3, sharpness=2.5, logit_scale=7.0)
    for i in range(2):
        for c in range(3):
            votes = sum(math.exp(-2.5 * (1 - float(f[i] @ keys[n]))) for n in range(5) if labels[n] == c)
            assert float(found[i, c]) == near64(7 * float(f[i] @ texts[c]) + 1.3 * votes)


def test_without_a_weight_it_is_the_zero_shot_classifier():
    f, keys, texts, labels = rows(2, 0), rows(3, 1), rows(3, 2), torch.tensor([0, 1, 2])
    found = tip_adapter_logits(f, keys, labels, texts.T, weight=0.0, sharpness=1.0)
    torch.testing.assert_close(found, 100 * f @ texts.T)
    half = tip_adapter_logits(f.bfloat16(), keys.bfloat16(), labels, texts.T.bfloat16(), weight=1.0, sharpness=1.0)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": -1.0}, ValueError, "`weight`"),
        ({"sharpness": 0.0}, ValueError, "`sharpness`"),
        ({"logit_scale": 0.0}, ValueError, "`logit_scale`"),
        ({"cache_keys": torch.ones(3, 5)}, ValueError, "`cache_keys` must have rows of width 4"),
        ({"class_weights": torch.ones(3, 4)}, ValueError, "`class_weights` must have columns of width 4"),
        ({"cache_labels": torch.tensor([0, 1])}, ValueError, "`cache_labels` must have one class per key"),
        ({"cache_labels": torch.ones(3)}, TypeError, "`cache_labels`"),
    ],
)
def test_bad_input(change, error, words):
    given = {"features": rows(2, 0), "cache_keys": rows(3, 1), "cache_labels": torch.tensor([0, 1, 2])}
    given |= {"class_weights": torch.ones(4, 3), "weight": 1.0, "sharpness": 1.0} | change
    with pytest.raises(error, match=words):
        tip_adapter_logits(**given)

"""Tip-Adapter: official values, the formula in loops, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_contrast.evaluation import fit_tip_adapter_keys, tip_adapter_logits
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


def problem():
    """Classes whose texts and few keys say little, and images that say more."""
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(3, 8, generator=generator), dim=1)
    labels = torch.arange(60) % 3
    images = F.normalize(centers[labels] + 0.7 * torch.randn(60, 8, generator=generator), dim=1)
    given = {"cache_keys": images[:6], "cache_labels": labels[:6], "class_weights": torch.zeros(8, 3)}
    return images, labels, given | {"weight": 5.0, "sharpness": 2.0, "lr": 0.02}


def test_trained_keys_are_those_of_the_best_epoch_on_validation_images():
    images, labels, given = problem()
    train, val = (images[:30], labels[:30]), (images[30:], labels[30:])
    state = torch.get_rng_state()
    courses = [fit_tip_adapter_keys(*train, **given, epochs=3, batch_size=8, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(courses[0], courses[1])
    assert not torch.equal(courses[0], courses[2])
    options = {name: given[name] for name in ("cache_labels", "class_weights", "weight", "sharpness")}
    loss = lambda keys: float(F.cross_entropy(tip_adapter_logits(train[0], keys, **options), train[1]))  # noqa: E731
    assert loss(courses[0]) < loss(given["cache_keys"])
    top1 = lambda keys: int((tip_adapter_logits(val[0], keys, **options).argmax(1) == val[1]).sum())  # noqa: E731
    chosen = fit_tip_adapter_keys(*train, **given, epochs=20, batch_size=8, validation=val)
    last = fit_tip_adapter_keys(*train, **given, epochs=20, batch_size=8)
    assert top1(chosen) > top1(given["cache_keys"])
    assert top1(chosen) >= top1(last)


def test_keys_are_kept_if_no_epoch_is_better():
    images, labels, given = problem()
    perfect = (images[:1], tip_adapter_logits(images[:1], **{k: given[k] for k in given if k != "lr"}).argmax(1))
    found = fit_tip_adapter_keys(images[:30], labels[:30], **given, epochs=2, validation=perfect)
    assert torch.equal(found, given["cache_keys"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": 0.0}, ValueError, "`weight` must be > 0"),
        ({"epochs": 0}, ValueError, "`epochs` must be >= 1"),
        ({"lr": 0.0}, ValueError, "`lr` must be > 0"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, ValueError, "`labels` must have one class per image"),
        ({"labels": torch.zeros(60)}, TypeError, "`labels` must hold integer classes"),
        (
            {"validation": (torch.ones(2, 8), torch.zeros(1, dtype=torch.long))},
            ValueError,
            "`validation` must have one",
        ),
    ],
)
def test_bad_input_of_the_training(change, error, words):
    images, labels, given = problem()
    with pytest.raises(error, match=words):
        fit_tip_adapter_keys(**({"features": images, "labels": labels} | given | change))

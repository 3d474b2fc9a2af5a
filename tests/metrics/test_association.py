"""Association tests: official values, exact and random partitions, and what is refused."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_contrast.metrics import association, association_test
from tests.tolerances import FORMULA, f64, near64

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parent / "official_association.json").read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("index", [0, 1])
def test_equals_the_reference_implementation(index):
    record = RECORDS["ieat"]
    sets = {key: torch.tensor(record["inputs"]["tests"][index][key], dtype=torch.float64) for key in "xyab"}
    expected = record["value"][index]
    found = association_test(**sets)
    assert found.effect.dtype == torch.float64
    assert float(found.effect) == near64(expected["effect_size"])
    assert found.p_value == near64(expected["p_value"])


def test_association_equals_the_formula_of_the_record():
    x = {key: torch.tensor(value, dtype=torch.float64) for key, value in RECORDS["sc_weat"]["inputs"].items()}
    assert float(association(**x)) == near64(RECORDS["sc_weat"]["value"])
    both = association(torch.stack([x["w"], -3 * x["w"]]), x["a"], x["b"])
    torch.testing.assert_close(both[0], -both[1], **f64(FORMULA))


def rows(count, seed):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_exact_p_value_in_loops():
    x, y, a, b = rows(3, 0), rows(3, 1), rows(5, 2), rows(2, 3)
    s = [
        sum(F.cosine_similarity(w.double(), c.double(), dim=0).item() for c in a) / 5
        - sum(F.cosine_similarity(w.double(), c.double(), dim=0).item() for c in b) / 2
        for w in (*x, *y)
    ]
    halves = list(itertools.combinations(range(6), 3))
    extreme = sum(sum(s[i] for i in half) >= sum(s[:3]) - 1e-12 for half in halves)
    assert association_test(x, y, a, b).p_value == extreme / 20


def test_equal_images_give_p_1_and_ties_count():
    x = rows(1, 0).repeat(4, 1)
    y, a, b = torch.cat([x[:1], rows(3, 5)]), rows(3, 1), rows(3, 2)
    assert association_test(x, x + rows(4, 9) * 0, a, b).p_value == 1  # all sums are equal
    low, high = (association_test(*pair, a, b) for pair in ((x, y), (y, x)))
    assert low.p_value + high.p_value > 1  # partitions that are equal to the given one count in both


def test_random_partitions_are_near_the_exact_value_and_follow_the_seed():
    x, y, a, b = rows(7, 0) + 0.2, rows(7, 1), rows(5, 2) + 0.5, rows(5, 3)
    exact = association_test(x, y, a, b).p_value
    assert exact * 3432 == near64(round(exact * 3432))
    found = [association_test(x, y, a, b, permutations=3000, seed=seed).p_value for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len(set(found)) > 1
    assert found[0] == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 3000) ** 0.5)
    separate = association_test(a[:, :4] * 0 + 1, -torch.ones(5, 4), torch.ones(2, 4), -torch.ones(2, 4))
    assert separate.p_value == near64(1 / 252)  # the given partition always counts
    large = association_test(torch.ones(9, 4), -torch.ones(9, 4), torch.ones(2, 4), -torch.ones(2, 4))
    assert 1 <= round(large.p_value * 10_000) < 5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": rows(2, 0)}, ValueError, "`x` must have as many rows as `y`"),
        ({"a": torch.ones(3, 5)}, ValueError, r"`a` must have shape \(rows, 4\)"),
        ({"b": torch.ones(0, 4)}, ValueError, "`b` must have at least one row"),
        ({"b": torch.ones(3, 4, dtype=torch.long)}, ValueError, "`b` must be floating"),
        ({"permutations": 0}, ValueError, "`permutations`"),
        ({"seed": -1}, ValueError, "`seed`"),
    ],
)
def test_bad_input(change, error, words):
    given = {"x": rows(3, 0), "y": rows(3, 1), "a": rows(3, 2), "b": rows(3, 3)} | change
    with pytest.raises(error, match=words):
        association_test(**given)


def test_the_effect_is_that_of_the_formula_in_narrow_features_too():
    """The effect size is a ratio: features whose cosines are all near 1 have no small one."""
    x, y, a, b = (torch.cat([torch.ones(4, 1), 1e-3 * rows(4, seed)], dim=1) for seed in range(4))
    s = [F.cosine_similarity(torch.cat([x, y]).double()[:, None], c.double()[None], dim=2).mean(1) for c in (a, b)]
    differences = s[0] - s[1]
    expected = (differences[:4].mean() - differences[4:].mean()) / differences.std()
    found = association_test(x, y, a, b).effect
    assert abs(float(found)) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)

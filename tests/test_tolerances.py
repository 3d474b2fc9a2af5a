"""The rule that bounds of comparisons are stated in `tests/tolerances.py`, and what its helpers let through."""

import ast
from pathlib import Path

import pytest
import torch

from tests import tolerances
from tests.tolerances import FORMULA, NETWORK, assert_same_bits, bound, decimals, f32, f64, near, near64

TESTS = Path(__file__).parent
FILES = sorted(path for path in TESTS.rglob("*.py") if path.name != "tolerances.py")
SMALL = 1e-3
"""Below it a bound is one of rounding; statistics and 8-bit images have larger ones."""
BOUNDS = {"rtol", "atol", "rel", "abs"}


def small(node):
    """Return whether a node is a number that is a bound of rounding, such as ``1e-6`` or ``-1e-6``."""
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant) and isinstance(node.value, float) and 0 < node.value < SMALL


def zero(node):
    return isinstance(node, ast.Constant) and node.value in (0, 0.0) and node.value is not False


def from_a_tensor(node):
    return any(isinstance(n, ast.Attribute) and n.attr == "item" for n in ast.walk(node))


def is_bare_approx(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.approx" and not node.keywords


def violations(source):
    """Return the places of a file that state a bound of rounding: line number and why."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg in BOUNDS}
        elif isinstance(node, ast.Dict):
            given = {k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}
            given = {key: value for key, value in given.items() if key in BOUNDS}
        else:
            given = {}
        if any(map(small, given.values())):
            found.append((node.lineno, "a bound below 1e-3: take one of tests/tolerances.py"))
        if "rtol" in given and "atol" in given and zero(given["rtol"]) and zero(given["atol"]):
            found.append((node.lineno, "no tolerance: assert_same_bits, where one program ran twice"))
        if isinstance(node, ast.Assert):
            for test in ast.walk(node.test):
                if not isinstance(test, ast.Compare):
                    continue
                if any(map(small, [test.left, *test.comparators])):
                    found.append(
                        (test.lineno, "compared with a number below 1e-3: take bound() of tests/tolerances.py")
                    )
                if from_a_tensor(test) and any(is_bare_approx(n) for n in ast.walk(test)):
                    found.append((test.lineno, "approx of a tensor's number: take near() of tests/tolerances.py"))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_bounds_are_those_of_the_policy(path):
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("assert_close(a, b, rtol=1e-6, atol=0)", 1),
        ("assert_close(a, b, rtol=0, atol=0)", 1),
        ("close = {'rtol': 0, 'atol': 0.0}", 1),
        ("close = {'rtol': 1e-9}", 1),
        ("assert x == pytest.approx(1, abs=5e-9)", 1),
        ("assert distance(a, b) < 1e-6", 1),
        ("assert -1e-5 <= x.min()", 1),
        ("assert loss.item() == pytest.approx(2.0)", 1),
        ("assert loss.item() == near(2.0)", 0),
        ("assert rate == pytest.approx(0.1)", 0),
        ("assert share == pytest.approx(0.2, abs=0.01)", 0),
        ("assert_close(a, b, rtol=0, atol=decimals(8))", 0),
        ("assert_close(a, b, **f32(NETWORK))", 0),
        ("assert lr == 1e-6", 1),
        ("assert distance(a, b) > 0", 0),
    ],
)
def test_what_breaks_the_policy_is_seen(line, count):
    assert len(violations(line)) == count


def test_the_classes_are_in_order_and_far_below_a_fault():
    classes = [tolerances.ROUNDED, FORMULA, NETWORK, tolerances.TRAINING]
    assert classes == sorted(classes)
    assert bound(tolerances.TRAINING) < SMALL
    assert bound(tolerances.CANCELLING, torch.float64) < bound(1)


def test_close_is_relative_and_of_the_size_of_the_terms():
    one, gap = torch.ones(()), bound(FORMULA)
    torch.testing.assert_close(1e3 * one * (1 + gap), 1e3 * one, **f32(FORMULA))
    for found, size in ((one * (1 + 3 * gap), 1), (one * 0 + gap, 0.5)):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found, found.round(), **f32(FORMULA, size=size))
    torch.testing.assert_close(one * 0 + gap, one * 0, **f32(FORMULA, size=1.01))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(one.double() * (1 + gap), one.double(), **f64(FORMULA))


def test_near_is_relative_unless_a_size_is_given():
    gap = bound(FORMULA)
    assert [5 * (1 + gap / 2), 7.0] == near([5.0, 7.0])
    assert 1 + gap * 1.1 != near(1.0)
    assert gap / 2 != near(0.0)
    assert gap / 2 == near(0.0, size=1)
    assert 1 + gap != near64(1.0)
    assert pytest.approx(0.12345678, abs=decimals(8)) == 0.12345678499


def test_same_bits_are_the_same_bits():
    a = torch.tensor([1.0, float("nan")])
    assert_same_bits({"a": [a]}, {"a": [a.clone()]})
    with pytest.raises(AssertionError, match="weights: not the same bits"):
        assert_same_bits(a.nextafter(torch.full((2,), 2.0)), a, "weights")
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(a.double(), a)

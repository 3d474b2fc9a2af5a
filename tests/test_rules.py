"""Rules of the code that the linter does not check."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_contrast"
FILES = sorted(PACKAGE.rglob("*.py"))


def narrows(test):
    """Return whether a condition only narrows a type: ``x is not None``, ``isinstance(x, T)``."""
    if isinstance(test, ast.BoolOp):
        return all(map(narrows, test.values))
    if isinstance(test, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in test.ops)
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"


def offences(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and not narrows(node.test):
            yield f"line {node.lineno}: `assert` vanishes under `python -O`; raise an error"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: a bare `except` hides what it was not meant for"


def draws_without_dtype(source):
    """Yield the draws whose dtype is that of a step: with "bf16-true" half precision, where many are equal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and "dtype" not in {keyword.arg for keyword in node.keywords}:
            names = {ast.unparse(part) for part in (node.func, *node.args)}  # partial(torch.rand, ...) too
            if names & {"torch.rand", "torch.randn"}:
                yield f"line {node.lineno}: `{ast.unparse(node)}` needs a `dtype`"


@pytest.mark.slow
def test_no_assert_on_data_and_no_bare_except():
    found = [f"{path.relative_to(PACKAGE)}, {offence}" for path in FILES for offence in offences(path.read_text())]
    assert not found


WEIGHTS = {"nn/logit_scale.py"}  # random initial weights have the dtype of weights


@pytest.mark.slow
def test_what_a_step_draws_has_a_dtype():
    files = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in ("losses", "methods", "nn", "callbacks")]
    found = {
        f"{path.relative_to(PACKAGE)}, {offence}"
        for path in files
        if str(path.relative_to(PACKAGE)) not in WEIGHTS
        for offence in draws_without_dtype(path.read_text())
    }
    assert not found
    seen = "torch.rand(3)\npartial(torch.rand, 3)\ntorch.randn(3, dtype=x)\ntorch.rand_like(x)"
    assert len(list(draws_without_dtype(seen))) == 2


def test_copies_to_a_device_that_do_not_wait_are_made_in_one_place():
    """From memory that is not pinned such a copy waits: `seeding.send` pins it."""
    found = [path.name for path in FILES if "non_blocking=True" in path.read_text()]
    assert found == ["seeding.py"]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("assert x is not None", 0),
        ("assert isinstance(x, int) and y is None", 0),
        ("assert len(x) == 3", 1),
        ("assert x > 0, 'no'", 1),
        ("try:\n    f()\nexcept:\n    pass", 1),
        ("try:\n    f()\nexcept ValueError:\n    pass", 0),
    ],
)
def test_the_rules_are_seen(source, count):
    assert len(list(offences(source))) == count

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


def test_no_assert_on_data_and_no_bare_except():
    found = [f"{path.relative_to(PACKAGE)}, {offence}" for path in FILES for offence in offences(path.read_text())]
    assert not found


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

"""The matrix has a test for each cell, its page is made of a run, and the page that is kept shows no red."""

import re

import pytest

from tests import matrix
from tests.matrix import CONDITIONS, METHODS, NOT_APPLICABLE, Cell, render
from tests.methods import test_contract, test_matrix_cells, test_matrix_ranks
from tests.methods.cases import CASES
from tests.methods.matrix_runs import PRIMARY

CELLS = {(method, condition) for method in METHODS for condition in CONDITIONS}


def test_every_method_under_every_condition_has_a_test():
    found = set().union(*map(matrix.declared, (test_contract, test_matrix_cells, test_matrix_ranks)))
    assert found == CELLS
    assert sorted(PRIMARY) == sorted(METHODS) == sorted({matrix.method_of(case) for case in CASES})


def test_what_does_not_apply_is_a_cell_and_has_a_reason():
    assert NOT_APPLICABLE.keys() <= CELLS
    assert all(len(reason) > 20 for reason in NOT_APPLICABLE.values())


def green():
    return {cell: Cell(passed=2) for cell in CELLS}


def seconds():
    return dict.fromkeys(CONDITIONS, 1.0)


def test_a_cell_without_a_test_is_an_error():
    cells = green()
    del cells["MoCo", "DDP"]
    with pytest.raises(ValueError, match="No test ran for 1 cells of the matrix: MoCo x DDP"):
        render(cells, seconds())


def cell_text(page, method, condition):
    starts = "| method |", f"| `{method}` |"
    header, row = (next(line for line in page.splitlines() if line.startswith(start)) for start in starts)
    return dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))[condition]


def test_one_failure_makes_a_cell_red_and_a_skip_names_its_reason():
    cells = green()
    cells["MoCo", "DDP"] = Cell(passed=5, failed=1)
    cells["BYOL", "fit"] = Cell(skipped=["no such thing here"])
    cells["DINO", "fit"] = Cell()
    page = render(cells, seconds())
    assert cell_text(page, "MoCo", "DDP") == cell_text(page, "DINO", "fit") == "**red**"
    assert cell_text(page, "BYOL", "fit") == "n/a [1]"
    assert "\n1. no such thing here\n" in page
    assert cell_text(page, "MoCo", "FSDP1") == "green"
    assert f"{len(CELLS) - 3} cells green, 2 cells red, 1 cells not applicable" in page


def test_the_kept_page_has_all_cells_and_no_red():
    page = matrix.PAGE.read_text()
    assert "red**" not in page
    for method, condition in sorted(CELLS):
        assert re.fullmatch(r"green|n/a \[\d+\]", cell_text(page, method, condition)), (method, condition)
    skipped = re.findall(r"n/a \[", page)
    assert len(skipped) == len(NOT_APPLICABLE)

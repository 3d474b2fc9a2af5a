"""Every Python fence of the README and of docs runs, and the names they mention are public."""

import ast
import re
from pathlib import Path

import pytest
import torch

import lightning_contrast as lc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCES = [
    pytest.param(source, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, source in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S))
]


@pytest.mark.slow
@pytest.mark.parametrize("source", FENCES)
def test_fence_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Trainer writes its logs to the working directory
    monkeypatch.setattr("sys.argv", ["readme"])
    torch.manual_seed(0)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def test_commands_are_makefile_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


@pytest.mark.parametrize("table", ["Methods", "Callbacks"])
def test_tables_name_what_exists(table):
    section = README.split(f"## {table}")[1].split("\n## ")[0]
    names = re.findall(r"^\|[^\n]*?`([A-Z]\w+)", section, flags=re.M)
    assert names
    assert all(hasattr(lc, name) for name in names)
    package = getattr(lc, table.lower())
    no_rows = ("SelfSupervisedModule", "Thresholds")
    listed = {name for name in package.__all__ if name[0].isupper() and name not in no_rows}
    assert listed == set(names)


PUBLIC = [lc, *(getattr(lc, name) for name in lc.__all__ if name.islower())]


def classes():
    """Return the names of all public classes of the package, wherever they are defined."""
    paths = [path for path in (ROOT / "lightning_contrast").rglob("*.py") if not path.stem.startswith("_")]
    trees = [ast.parse(path.read_text()) for path in paths]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_in_the_text_are_public(page):
    """The classes and the qualified names that a page mentions can be imported from a public module."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    mentioned = re.findall(r"`(?:\w+\.)*(\w+)(?:\([^`]*\))?`", text)
    public = {name for module in PUBLIC for name in getattr(module, "__all__", [])}
    assert not set(mentioned) & classes() - public
    for module, name in re.findall(r"`lc\.(\w+)\.(\w+)", text):
        assert hasattr(getattr(lc, module), name), f"lc.{module}.{name}"

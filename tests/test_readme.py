"""Every Python fence of the README and of docs runs as it stands, and what the README names exists."""

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
    monkeypatch.chdir(tmp_path)  # the Trainer writes its logs where it runs
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

"""Every Python fence of the README runs as it stands, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch

import lightning_contrast as lc

README = (Path(__file__).parents[1] / "README.md").read_text()
FENCES = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("source", FENCES, ids=lambda source: source.splitlines()[-1][:40])
def test_fence_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Trainer writes its logs where it runs
    monkeypatch.setattr("sys.argv", ["readme"])
    torch.manual_seed(0)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def test_commands_are_makefile_targets():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M) or target in {"and"}, target


@pytest.mark.parametrize("table", ["Methods", "Callbacks"])
def test_tables_name_what_exists(table):
    section = README.split(f"## {table}")[1].split("\n## ")[0]
    names = re.findall(r"^\|[^\n]*?`([A-Z]\w+)", section, flags=re.M)
    assert names
    assert all(hasattr(lc, name) for name in names)
    package = getattr(lc, table.lower())
    listed = {name for name in package.__all__ if name[0].isupper() and name != "ContrastiveModule"}
    assert listed == set(names)

"""The wheel: what it contains, and that building it prints nothing."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.slow
@pytest.mark.dist
def test_wheel_is_built_quietly_and_is_complete(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "lightning_contrast", source / "lightning_contrast", symlinks=True)
    shutil.copytree(ROOT / "examples" / "configs", source / "examples" / "configs")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 4 * 2**20
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "lightning_contrast"
    kept = [path for path in package.rglob("*") if path.suffix in {".py", ".pyi", ".typed"}]
    kept += [*(package / "data" / "emoji").iterdir(), *(package / "recipes").glob("*.yaml")]
    kept += (package / "evaluation" / "report_card" / "templates").iterdir()
    kept += (package / "search" / "templates").iterdir()
    assert {str(path.relative_to(ROOT)) for path in kept if path.is_file()} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "examples", "benchmarks"))]
    licenses = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert licenses == {"LICENSE", "LICENSE-APACHE-2.0", "LICENSE-MIT"}
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)


def make_install(folder, names, *arguments):
    """Run `make install` where only these names are Pythons: recent ones that do nothing, or old ones."""
    folder.mkdir()
    for tool in ("bash", "sh", "sha256sum", "cut", "make", "pwd"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, code in names.items():
        (folder / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (folder / name).chmod(0o755)
    command = ["make", "install", f"VENV={folder / 'venv'}", *arguments]
    return subprocess.run(command, cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True, check=False)


def dry_run(folder, names, *arguments):
    """Return what `make -n install` prints."""
    run = make_install(folder, names, "-n", *arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"python3.12": 0, "python3": 1}, "python3.12"),
        ({"python3.11": 1, "python3": 0}, "python3"),
        ({"python": 0}, "python"),
        ({"python3": 1}, ""),
        ({}, ""),
    ],
)
def test_make_finds_a_recent_python(names, found, tmp_path):
    printed = dry_run(tmp_path / "bin", names)
    assert f'test -n "{found}"' in printed
    assert f"|| {found} -m venv" in printed
    assert "run `make PYTHON=/path/to/python`" in printed
    assert "|| /own/python -m venv" in dry_run(tmp_path / "given", names, "PYTHON=/own/python")


@pytest.mark.parametrize(
    ("names", "words"),
    [({"python3": 1}, "No Python >= 3.11 was found"), ({"python3": 0}, "set PIP_INDEX_URL to a mirror")],
    ids=["no python", "no packages"],
)
def test_make_says_what_is_missing(names, words, tmp_path):
    run = make_install(tmp_path / "bin", names)  # the environment that this Python makes has no pip
    assert run.returncode == 2
    assert words in run.stdout
    assert not list(tmp_path.rglob(".dependencies-*"))

"""Public names are declared in stubs, resolved lazily and cheap to import."""

import ast
import configparser
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_contrast as lc

PACKAGE = Path(lc.__file__).parent
STUBS = sorted(PACKAGE.rglob("*.pyi"))


def python(code):
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def declared_names(stub):
    """Return the names that a stub re-exports, which type checkers accept only in the form ``X as X``."""
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    aliases = [alias for node in imports for alias in node.names]
    assert all(alias.name == alias.asname for alias in aliases)
    return [alias.name for alias in aliases]


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: str(stub.relative_to(PACKAGE)))
def test_stub_all_and_dir_are_the_same(stub):
    package = importlib.import_module(".".join(stub.parent.relative_to(PACKAGE.parent).parts))
    declared = declared_names(stub)
    assert sorted(declared) == package.__all__ == sorted(dir(package))


def test_top_level_has_every_method_and_callback():
    assert {*lc.methods.__all__, *lc.callbacks.__all__} <= set(lc.__all__)
    assert {"SimCLR", "ViewAugmentation", "OnlineLinearProbe", "OnlineKNN", "augment", "losses"} <= set(lc.__all__)


def test_packages_ship_their_stubs():
    """`lazy_loader` reads the stubs at run time, so a wheel without them cannot be imported."""
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    assert "*.pyi" in setup["options.package_data"]["*"].split()
    lazy = {path.parent for path in PACKAGE.rglob("__init__.py") if "attach_stub" in path.read_text()}
    assert lazy == {stub.parent for stub in STUBS}
    assert PACKAGE in lazy


@pytest.mark.parametrize("package", ["", *(name for name in lc.__all__ if name.islower())])
def test_every_declared_name_resolves(package):
    module = getattr(lc, package) if package else lc
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="SimCLRR"):
        lc.SimCLRR  # noqa: B018


@pytest.mark.dist
def test_import_loads_no_heavy_library():
    heavy = "('kornia', 'timm', 'lightly', 'lightning', 'sklearn')"
    code = f"import sys, lightning_contrast; print(*[n for n in {heavy} if n in sys.modules])"
    assert python(code) == []


@pytest.mark.dist
def test_using_a_method_and_the_callbacks_loads_no_kornia_timm_or_lightly():
    code = (
        "import sys, lightning_contrast as lc; lc.SimCLR, lc.ViewAugmentation, lc.OnlineLinearProbe, lc.OnlineKNN;"
        "print(*[n for n in ('kornia', 'timm', 'lightly', 'sklearn') if n in sys.modules])"
    )
    assert python(code) == []


@pytest.mark.dist
def test_import_draws_no_random_number():
    code = (
        "import random, torch, lightning; a = torch.get_rng_state(); r = random.getstate();"
        "import lightning_contrast as lc; [getattr(lc, n) for n in lc.__all__];"
        "print(torch.equal(a, torch.get_rng_state()), r == random.getstate())"
    )
    assert python(code) == ["True", "True"]

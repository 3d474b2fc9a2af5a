"""The public names: declared once, found lazily, and cheap to import."""

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_contrast as lc
from lightning_contrast._lazy import declared_names


def python(code):
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_declared_names_all_and_dir_are_the_same():
    declared = set(declared_names(Path(lc.__file__)))
    assert declared == set(lc.__all__) == set(dir(lc)) - {"__version__"}
    assert {"SimCLR", "ViewAugmentation", "OnlineLinearProbe", "OnlineKNN", "augment", "losses"} <= declared


@pytest.mark.parametrize("package", ["", *(name for name in lc.__all__ if name.islower())])
def test_every_declared_name_resolves(package):
    module = getattr(lc, package) if package else lc
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None


def test_unknown_name_is_an_attribute_error_that_lists_what_there_is():
    with pytest.raises(AttributeError, match="SimCLR"):
        lc.SimCLRR  # noqa: B018


@pytest.mark.dist
def test_import_brings_no_heavy_library():
    heavy = "('kornia', 'timm', 'lightly', 'lightning', 'sklearn')"
    code = f"import sys, lightning_contrast; print(*[n for n in {heavy} if n in sys.modules])"
    assert python(code) == []


@pytest.mark.dist
def test_using_a_method_and_the_callbacks_brings_no_kornia_timm_or_lightly():
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

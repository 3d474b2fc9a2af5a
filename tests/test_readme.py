"""Every Python fence of the README and of docs runs, and the names they mention are public."""

import ast
import configparser
import functools
import re
from pathlib import Path

import pytest
import torch

import lightning_contrast as lc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("methods/*.md"))]
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


@functools.cache
def classes():
    """Return the names of all public classes of the package, wherever they are defined."""
    paths = [path for path in (ROOT / "lightning_contrast").rglob("*.py") if not path.stem.startswith("_")]
    trees = [ast.parse(path.read_text()) for path in paths]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.slow
def test_names_in_the_text_are_public(page):
    """The classes and the qualified names that a page mentions can be imported from a public module."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    mentioned = re.findall(r"`(?:\w+\.)*(\w+)(?:\([^`]*\))?`", text)
    public = {name for module in PUBLIC for name in getattr(module, "__all__", [])}
    assert not set(mentioned) & classes() - public
    for module, name in re.findall(r"`lc\.(\w+)\.(\w+)", text):
        assert hasattr(getattr(lc, module), name), f"lc.{module}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_tests_in_the_text_exist(page):
    """Links, paths and the tests that a page names as evidence exist."""
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:tests|examples|benchmarks|docs|lightning_contrast|callbacks)/[\w/.*]+)`", text):
        assert any(list(folder.glob(path)) for folder in (ROOT, ROOT / "tests")), path
    for path, name in re.findall(r"`([\w/]+\.py)`: `(test_\w+)`", text):
        assert f"def {name}(" in (ROOT / "tests" / path.removeprefix("tests/")).read_text(), f"{path}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_waits_for_a_text(page):
    assert re.findall(r"\b(?:[A-Z]{9,}|TODO|FIXME|TBD|XXX)\b", page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_text_exist(page):
    text = page.read_text()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = re.findall(r"pip install '[\w.]+\[(\w+)\]'", text)
    assert set(extras) <= set(setup["options.extras_require"])
    for recipe in re.findall(r"--config (\w+)(?!\S)", text):
        assert (ROOT / "lightning_contrast" / "recipes" / f"{recipe}.yaml").is_file(), recipe
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert module == "benchmarks.NAME" or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for script in re.findall(r"python (examples/\S+\.py)", text):
        assert (ROOT / script).is_file(), script


def test_install_names_every_extra():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"(\w+)(?: \([^)]*\))?(?:,|$)", re.search(r"# extras: (.*)", README)[1])
    assert set(named) == set(setup["options.extras_require"]) - {"dev", "bench"}


def test_the_layout_is_that_of_the_package():
    section = README.split("## Layout")[1].split("\n## ")[0]
    listed = set(re.findall(r"^ {6}([\w.]+)/? ", section, flags=re.M))
    package = ROOT / "lightning_contrast"
    present = {path.name for path in package.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert listed == {name for name in present if not name.startswith("_")}
    callbacks = re.search(r"callbacks/ +(.*?)\n +data/", section, flags=re.S)[1]
    modules = {path.stem for path in (package / "callbacks").iterdir() if path.stem[0] != "_"}
    assert modules - {"reporting"} <= set(re.findall(r"\w+", callbacks))


def test_console_script_and_package_data():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "lightning-contrast = lightning_contrast.cli:entry_point" in setup["options.entry_points"]["console_scripts"]
    data = setup["options.package_data"]
    for package, patterns in data.items():
        if package != "*":
            folder = ROOT / package.replace(".", "/")
            assert all(list(folder.glob(pattern)) for pattern in patterns.split()), package
    recipes = list((ROOT / "lightning_contrast" / "recipes").glob("*.yaml"))
    assert {path.name for path in recipes} == {path.name for path in (ROOT / "examples" / "configs").iterdir()}


def table(text, heading):
    """Return the cells of the first table after a heading."""
    rows = text.split(heading)[1].split("\n|", 1)[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_results_of_the_demo_are_those_of_its_page():
    page = (ROOT / "docs" / "demo.md").read_text()
    measured = table(page, "shows the same emoji.")
    figures = {row[0] if row[0] != "trained" else f"trained {row[1]}": row[2:5] for row in measured}
    shown = {row[0]: [cell.split()[0] for cell in row[1:]] for row in table(README, "## Results")[2:]}
    assert shown["raw pixels"] == figures["raw pixels"]
    assert shown["random weights"] == figures["random weights"]
    assert shown["trained"] == next(row[2:5] for row in measured if row[0].startswith("trained, mean"))
    results = README.split("## Results")[1].split("| features")[0]
    seconds = {row[5] for row in measured if row[0] == "trained"}
    assert set(re.findall(r"(\d+) s\b", results)) == seconds


def test_the_time_of_all_methods_is_that_of_their_page():
    page = (ROOT / "docs" / "learn.md").read_text()
    stems = {path.stem.removesuffix("_emoji") for path in (ROOT / "examples" / "configs").glob("*_emoji.yaml")}
    stems -= {"distill", "seed"}  # their time is without that of the teacher
    minutes = [float(row[6]) / 60 for row in table(page, "torch 2.14.1.\n") if row[0] in stems]
    low, high = re.search(r"Methods in (\d+) to (\d+) minutes", README).groups()
    assert len(minutes) > 15
    assert int(low) - 0.5 <= min(minutes)
    assert int(high) - 1 <= max(minutes) <= int(high)


def test_speeds_are_those_of_the_benchmarks():
    """Every rate, time and size of the table is a figure of docs/benchmarks.md, up to its rounding."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    known = [float(number) for number in re.findall(r"(?<=\| )[\d.]+(?:e[+-]?\d+)?(?= \|)", page)]
    rows = table(README, "## Speed")[2:]
    assert len(rows) >= 10
    for row in rows:
        for number in re.findall(r"(?<![\w-])\d[\d,]*(?:\.\d+)?(?! workers)", " ".join(row[1:])):
            value = float(number.replace(",", ""))
            assert any(abs(value - figure) <= 0.006 * value for figure in known), f"{row[0]}: {number}"


def test_effects_of_negatives_are_those_of_the_methods_page():
    pages = [(ROOT / "docs" / name).read_text() for name in ("negatives.md", "learn.md")]
    rows = {row[0]: row for row in table(pages[1], "torch 2.14.1.\n")}
    effects = table(pages[0], "## Measured effect")[2:]
    assert len(effects) >= 10
    for name, knn, spread, linear, recall, seeds in effects:
        row = rows["simclr, 40 epochs" if name.startswith("uniform") else f"simclr, {name}"]
        assert [knn, spread, linear, recall, seeds] == [*row[2:6], row[7]], name


BATCHES = {
    "images": lambda images, labels: images,
    "images, labels": lambda images, labels: (images, labels),
    "dict": lambda images, labels: {"image": images, "label": labels},
    "floats": lambda images, labels: (images.float() / 255, labels),
}


def fit_own_data(batch):
    import lightning as L

    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lc.ViewAugmentation(lc.augment.simclr_cifar_views(32))],
    )
    loader = torch.utils.data.DataLoader([0, 1], collate_fn=lambda _: batch)
    trainer.fit(lc.SimCLR("small_convnet", warmup_epochs=0, lr=0.1), loader)
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
@pytest.mark.parametrize("layout", BATCHES.values(), ids=BATCHES)
def test_own_batches_of_the_layouts_named_train(layout):
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    assert fit_own_data(layout(images, labels)).global_step == 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_normalized_images_are_refused():
    with pytest.raises(ValueError, match=r"`images` must lie in 0\.\.1.*Remove Normalize"):
        fit_own_data((torch.randn(4, 3, 32, 32), torch.arange(4)))

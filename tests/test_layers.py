"""Imports point one way, methods and callbacks do not import each other, and there is no import cycle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_contrast"
LAYERS = [
    {"_checks", "_lazy", "_version"},
    {"contracts", "distributed"},
    {"losses"},
    {"nn", "optim", "augment", "metrics"},
    {"callbacks", "checkpoints", "data"},
    {"methods"},
    {"evaluation", "testing", "resuming"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_LIGHTNING = {"_checks", "contracts", "distributed", "losses", "nn", "optim", "augment", "metrics"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_modules(node, *, types=True):
    """Yield the full name of whatever a tree imports; without ``types``, not what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not types and is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported_modules(child, types=types)


def ours(path):
    names = imported_modules(ast.parse(path.read_text()))
    return {name.split(".")[1] for name in names if name.startswith("lightning_contrast.")} & set(LEVEL)


def test_every_part_has_a_layer():
    assert {part(path) for path in FILES} <= set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    if part(path) == "__init__":
        return  # the top level names everything, lazily
    for other in ours(path) - {part(path)}:
        assert LEVEL[other] < LEVEL[part(path)], f"{path} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lower_layers_do_not_import_lightning(path):
    roots = {name.split(".")[0] for name in imported_modules(ast.parse(path.read_text()))}
    if part(path) in WITHOUT_LIGHTNING:
        assert not roots & {"lightning", "pytorch_lightning"}


@pytest.mark.parametrize("folder", ["methods", "callbacks"])
def test_methods_and_callbacks_do_not_import_their_siblings(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        if path.name == "__init__.py":
            continue
        names = set(imported_modules(ast.parse(path.read_text())))
        siblings = {other.stem for other in (PACKAGE / folder).glob("*.py")} - {path.stem, "base", "__init__"}
        public = {name for name in siblings if not name.startswith("_")}
        assert not {f"lightning_contrast.{folder}.{name}" for name in public} & names, path


def test_no_import_cycle():
    """Walk the imports between files (not between packages) depth first."""
    module_of = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    module_of = {path: name.removesuffix(".__init__") for path, name in module_of.items()}
    known = set(module_of.values())
    edges = {
        name: set(imported_modules(ast.parse(path.read_text()), types=False)) & known - {name}
        for path, name in module_of.items()
    }
    done, trail = set(), []

    def walk(name):
        assert name not in trail, " -> ".join([*trail, name])
        if name in done:
            return
        trail.append(name)
        for other in edges[name]:
            walk(other)
        trail.pop()
        done.add(name)

    for name in edges:
        walk(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(source)), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_bare_except(path):
    handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)


def test_method_files_fit_on_pages():
    for path in (PACKAGE / "methods").glob("[!_]*.py"):
        assert len(path.read_text().splitlines()) <= (160 if path.stem == "base" else 200), path

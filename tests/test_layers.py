"""Imports point one way, methods and callbacks do not import each other, and there is no import cycle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_contrast"
LAYERS = [
    {"_checks", "_version"},
    {"contracts", "distributed", "precision", "seeding", "sharding"},
    {"losses"},
    {"nn", "optim", "augment", "metrics"},
    {"runtime"},
    {"callbacks", "checkpoints", "data"},
    {"exported"},
    {"methods"},
    {"evaluation", "export", "testing", "resuming"},
    {"serving"},
    {"search"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_LIGHTNING = set().union(*LAYERS[:4])
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


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}
SHARED = {f"{PACKAGE.name}.{name}" for name in ("_checks", "_version")}
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def own_imports(path):
    """Yield (module, name) of the package's own imports, wherever they stand; the name is None for a module."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE.name:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield (module, None) if module in MODULES else (node.module, alias.name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_modules_and_names_stay_in_their_folder(path):
    for module, name in own_imports(path):
        private = module.split(".")[-1].startswith("_") or (name or "").startswith("_")
        if private and module not in SHARED and MODULES[module] != path:
            assert MODULES[module].parent == path.parent, f"{path} imports {module}, {name}"


def test_methods_do_not_import_each_other():
    shared = {"base", "distillation", "false_negatives", "image_text", "joint_embedding", "distill"}
    for path in set((PACKAGE / "methods").glob("*.py")) - {PACKAGE / "methods" / "__init__.py"}:
        other = {module.split(".")[-1] for module, _ in own_imports(path) if MODULES[module].parent == path.parent}
        assert other <= shared, path


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "callbacks").glob("*/*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_wing_of_callbacks_imports_no_other_wing(path):
    callbacks = PACKAGE / "callbacks"
    for module, _ in own_imports(path):
        other = MODULES[module]
        if callbacks in other.parents and other.parent != path.parent:
            assert other.parent.name == "capture" or other == callbacks / "reporting.py", f"{path} imports {module}"


def test_no_callback_imports_another():
    callbacks = PACKAGE / "callbacks"
    for path in set(callbacks.glob("*.py")) - {callbacks / "__init__.py"}:
        for module, _ in own_imports(path):
            other = MODULES[module]
            if callbacks in other.parents:
                assert other.parent.name == "capture" or other == callbacks / "reporting.py", f"{path} imports {module}"


def test_class_names_are_unique():
    found = {}
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module_name(path))
    assert not {name: places for name, places in found.items() if len(places) > 1}


@pytest.mark.slow
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
    assert len(source.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(source)), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_bare_except(path):
    handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)


def lines_to_open(path):
    """Count the lines of a method's page and of what it needs of the rest of the folder."""
    todo, seen = [path], set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [MODULES[module] for module, _ in own_imports(path) if MODULES[module].parent == path.parent]
    return sum(len(path.read_text().splitlines()) for path in seen - {PACKAGE / "methods" / "__init__.py"})


PAGES = [path for path in FILES if path.parent.name == "methods"]
PAGES = [
    path for path in PAGES if path.stem not in {"__init__", "base", "distillation", "false_negatives", "image_text"}
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_method_is_read_in_500_lines(path):
    assert lines_to_open(path) <= 500


def test_a_method_fits_on_a_page():
    lengths = sorted(len(path.read_text().splitlines()) for path in PAGES)
    assert lengths[len(lengths) // 2] <= 120

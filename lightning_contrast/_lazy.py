"""Public names that are imported when they are first used (PEP 562), declared once: under ``if TYPE_CHECKING``.

Type checkers read the imports in that block as they stand. `attach` reads the same block from the source file and
makes ``__getattr__``, ``__dir__`` and ``__all__`` of it, so the three cannot drift apart.
"""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path


def attach(package: str, path: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for a package.

    Args:
        package: The package's ``__name__``.
        path: The package's ``__file__``.
    """
    sources = declared_names(Path(path))
    names = sorted(sources)

    def __getattr__(name: str) -> object:  # noqa: N807  (the name is the hook)
        if name not in sources:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")
        module = importlib.import_module(sources[name])
        return module if sources[name] == f"{package}.{name}" else getattr(module, name)

    def __dir__() -> list[str]:  # noqa: N807  (the name is the hook)
        return [*names, "__version__"]

    return __getattr__, __dir__, names


def declared_names(path: Path) -> dict[str, str]:
    """Read which module each public name comes from, out of the ``if TYPE_CHECKING`` block of a source file.

    Args:
        path: The ``__init__.py`` of a package; its imports are absolute.

    Returns:
        The module by the name; a module stands under its own name. ``import *`` stands for the names that the other
        package declares in the same way.
    """
    sources: dict[str, str] = {}
    for block in ast.parse(path.read_text(encoding="utf-8")).body:
        if not (isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"):
            continue
        for statement in block.body:
            if not isinstance(statement, ast.ImportFrom) or statement.module is None:
                continue
            for alias in statement.names:
                if alias.name == "*":
                    sources |= declared_names(_init_file(path, statement.module))
                elif _init_file(path, statement.module) == path:  # from <this package> import <submodule>
                    sources[alias.name] = f"{statement.module}.{alias.name}"
                else:
                    sources[alias.name] = statement.module
    return sources


def _init_file(path: Path, module: str) -> Path:
    """Return the ``__init__.py`` of a package of ours, given the one of another."""
    root = next(folder for folder in path.parents if folder.name == "lightning_contrast")
    return root.joinpath(*module.split(".")[1:], "__init__.py")

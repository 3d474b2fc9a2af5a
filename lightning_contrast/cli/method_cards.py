"""What the sources say about each method: read from their text, without importing torch."""

import ast
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).parents[1]
_LINK = re.compile(r"https?://[^\s,;)]+[^\s,;).]")


class Argument(NamedTuple):
    """Argument of a method, from its signature and the section "Args" of its docstring."""

    name: str
    default: str
    """Source of the default value; empty if there is none."""
    text: str


class MethodCard:
    """Card of a method, from the docstrings of its file and class and from the recipes that name it.

    Args:
        name: Name of the class.
        path: Its file.

    Attributes:
        idea: What the method does, one sentence.
        papers: Links to the papers, in the order of the docstring.
        source: Papers, reference implementation and differences, as the file has them.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._tree = ast.parse(path.read_text(encoding="utf-8"))
        first, _, rest = (ast.get_docstring(self._tree) or "").partition("\n\n")
        self.idea = " ".join(first.partition(": ")[2].split())
        self.source = rest.strip()
        before = re.split(r"(?m)^(?:Reference|Differ)", self.source)[0]
        self.papers = _LINK.findall(before) or _LINK.findall(self.source)

    @cached_property
    def class_docstring(self) -> str:
        """Docstring of the class."""
        return ast.get_docstring(self._class) or ""

    @property
    def summary(self) -> str:
        """The class docstring without its sections: what a batch holds and what `forward` returns."""
        return re.split(r"(?m)^(?:Args|Raises|Attributes|Example|Examples):", self.class_docstring)[0].strip()

    @property
    def views(self) -> str:
        """Name of the function that makes the published views; empty if another class of the package defines it."""
        for node in self._class.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "views":
                return ast.unparse(node.value).removeprefix("staticmethod(").removesuffix(")")
        return ""

    @property
    def arguments(self) -> list[Argument]:
        """The arguments of the constructor, without those of ``**options``."""
        owner = self._owner_of_arguments
        section = re.search(r"(?ms)^Args:\n(.*?)(?:^\S|\Z)", ast.get_docstring(owner) or "")
        items = re.findall(r"(?ms)^    (\w+): (.*?)(?=^    [\w*]+: |\Z)", section[1] if section else "")
        texts = {name: " ".join(text.split()) for name, text in items}
        init = next((node for node in owner.body if getattr(node, "name", "") == "__init__"), None)
        if not isinstance(init, ast.FunctionDef):
            return [Argument(name, "", text) for name, text in texts.items()]
        given = init.args
        plain = given.args[1:]
        defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
        pairs = [*zip(plain, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        return [
            Argument(arg.arg, "" if value is None else ast.unparse(value), texts.get(arg.arg, ""))
            for arg, value in pairs
        ]

    @property
    def recipes(self) -> list[str]:
        """Names of the recipes of the package that train it."""
        pattern = re.compile(rf"^model:\n  class_path: {self.name}$", re.M)
        paths = sorted((_PACKAGE / "recipes").glob("*.yaml"))
        return [path.stem for path in paths if pattern.search(path.read_text(encoding="utf-8"))]

    @property
    def recipe_notes(self) -> dict[str, str]:
        """What each recipe says of itself, by its name: the comment that it begins with."""
        notes = {}
        for name in self.recipes:
            lines = (_PACKAGE / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
            comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
            notes[name] = " ".join(comment)
        return notes

    @property
    def _owner_of_arguments(self) -> ast.ClassDef:
        """The class itself, or the base in `lightning_contrast.methods` whose constructor it has."""
        if any(getattr(node, "name", "") == "__init__" for node in self._class.body):
            return self._class
        bases = [ast.unparse(base) for base in self._class.bases]
        for node in self._tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_contrast.methods."):
                for name in (alias.name for alias in node.names if alias.name in bases):
                    path = self.path.with_name(f"{(node.module or '').rsplit('.', 1)[1]}.py")
                    return MethodCard(name, path)._owner_of_arguments
        return self._class

    @property
    def _class(self) -> ast.ClassDef:
        found = [node for node in self._tree.body if isinstance(node, ast.ClassDef) and node.name == self.name]
        return found[0]


def method_cards() -> dict[str, MethodCard]:
    """Return the cards of all methods by the name of their class, in the order of their names."""
    folder = _PACKAGE / "methods"
    found = re.findall(r"^from \.(\w+) import (\w+) as ", (folder / "__init__.pyi").read_text(encoding="utf-8"), re.M)
    names = {name: folder / f"{module}.py" for module, name in found if module != "base"}
    return {name: MethodCard(name, names[name]) for name in sorted(names, key=str.lower)}

"""Short names of recipes and view policies, and names similar to a misspelled one."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning_contrast import augment, callbacks, data, methods

RECIPES = Path(__file__).parents[1] / "recipes"
_CONFIG_OPTIONS = ("-c", "--config")


def import_classes() -> None:
    """Import what has a short name: jsonargparse resolves short names among imported classes."""
    for package in (augment, callbacks, data, methods):
        for name in package.__all__:
            getattr(package, name)


def expand_arguments(args: Sequence[str]) -> list[str]:
    """Replace the short names of recipes (``--config``) and of policies (``--*.policy``, ``--*.policy.class_path``)."""
    expanded: list[str] = []
    for argument in args:
        option, is_assignment, value = argument.partition("=")
        if is_assignment:
            expanded.append(f"{option}={_expand(option, value)}")
        else:
            expanded.append(_expand(expanded[-1], argument) if expanded else argument)
    return expanded


def _expand(option: str, value: str) -> str:
    if option in _CONFIG_OPTIONS:
        recipe = RECIPES / f"{value.removesuffix('.yaml')}.yaml"
        return str(recipe) if not Path(value).exists() and recipe.is_file() else value
    if option.startswith("--") and option.endswith((".policy", ".policy.class_path")):
        return str(_import_path(value))
    return value


@contextmanager
def short_names_in_yaml() -> Iterator[None]:
    """Expand the short names of policies in the YAML files that jsonargparse loads in the block."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    set_loader("yaml", lambda text: _expand_values(load(text)), (yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", load, (yaml.YAMLError,))


def _expand_values(value: Any, key: object = None) -> Any:
    """Replace the short names of policies in a loaded configuration: under ``class_path`` and ``policy``."""
    if isinstance(value, dict):
        return {name: _expand_values(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand_values(item) for item in value]
    return _import_path(value) if key in ("class_path", "policy") else value


def _import_path(name: Any) -> Any:
    """Return the import path of a policy of the package given by its short name, and any other value unchanged."""
    is_policy = isinstance(name, str) and name in augment.__all__ and inspect.isfunction(getattr(augment, name))
    return f"{augment.__name__}.{name}" if is_policy else name


def class_names() -> list[str]:
    """Return the short names of methods, data modules, callbacks (Lightning's too) and view policies."""
    import lightning.pytorch.callbacks as lightning_callbacks

    packages = (methods, data, callbacks, augment)
    return [*(name for package in packages for name in package.__all__), *lightning_callbacks.__all__]


def recipe_names() -> list[str]:
    """Return the names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests names similar to ``name``, or an empty str if there are none."""
    by_lower = {option.lower(): option for option in known}
    near = get_close_matches(name.rsplit(".", 1)[-1].lower(), by_lower, n=3, cutoff=0.65)
    return f" Did you mean {' or '.join(by_lower[option] for option in near)}?" if near else ""

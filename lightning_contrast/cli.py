"""Command line: LightningCLI with short names for the package's methods, callbacks, data modules and policies.

``python -m lightning_contrast fit --config FILE`` runs a recipe. Classes and view policies of the package need no
import path (``class_path: MoCo``, ``class_path: moco_v2_views``, ``--trainer.callbacks.policy moco_v2_views``).
Checkpoints are written by `AtomicCheckpointIO` unless the recipe sets ``trainer.plugins``; ``--ckpt_path last`` resumes
from the newest complete one.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L

from lightning_contrast import augment, callbacks, data, methods

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

_HINT = 'Install the extra: pip install "lightning_contrast[cli]"'


def main(args: list[str] | None = None, *, run: bool = True) -> "LightningCLI":
    """Run the command line.

    Args:
        args: Arguments as on the command line, ``["fit", "--config", "recipe.yaml"]``; None uses ``sys.argv``.
        run: False builds Trainer, module and data without running them; ``args`` then has no subcommand.

    Returns:
        The LightningCLI, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        ModuleNotFoundError: If jsonargparse is not installed; the message names the extra.
    """
    for package in (augment, callbacks, data, methods):
        for name in package.__all__:  # jsonargparse resolves short names among imported classes
            getattr(package, name)
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class Parser(LightningArgumentParser):
        def parse_args(  # type: ignore[override]  # argparse has overloads
            self, args: Sequence[str] | None = None, *more: Any, **options: Any
        ) -> Any:
            return super().parse_args(_expand_arguments(sys.argv[1:] if args is None else args), *more, **options)

    try:
        with _short_names_in_yaml():
            return LightningCLI(
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                trainer_defaults={"plugins": {"class_path": "lightning_contrast.checkpoints.AtomicCheckpointIO"}},
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                args=args,
                run=run,
            )
    except ModuleNotFoundError as error:
        if error.name is None or "jsonargparse" in str(error):
            raise ModuleNotFoundError(f"The command line needs jsonargparse. {_HINT}.", name="jsonargparse") from error
        raise


def _import_path(name: Any) -> Any:
    """Return the import path of a policy of the package given by its short name, and any other value unchanged."""
    is_policy = isinstance(name, str) and name in augment.__all__ and inspect.isfunction(getattr(augment, name))
    return f"{augment.__name__}.{name}" if is_policy else name


def _expand_arguments(args: Sequence[str]) -> list[str]:
    """Replace the short names of policies, the values of ``--*.policy`` and ``--*.policy.class_path``."""
    expanded: list[str] = []
    for argument in args:
        option, is_assignment, value = argument.partition("=")
        if is_assignment and _names_policy(option):
            expanded.append(f"{option}={_import_path(value)}")
        else:
            is_value = bool(expanded) and _names_policy(expanded[-1])
            expanded.append(_import_path(argument) if is_value else argument)
    return expanded


def _names_policy(option: str) -> bool:
    return option.startswith("--") and option.endswith((".policy", ".policy.class_path"))


def _expand_values(value: Any, key: object = None) -> Any:
    """Replace the short names of policies in a loaded configuration: under ``class_path`` and ``policy``."""
    if isinstance(value, dict):
        return {name: _expand_values(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand_values(item) for item in value]
    return _import_path(value) if key in ("class_path", "policy") else value


@contextmanager
def _short_names_in_yaml() -> Iterator[None]:
    """Expand the short names in the YAML files that jsonargparse loads in the block."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    set_loader("yaml", lambda text: _expand_values(load(text)), (yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", load, (yaml.YAMLError,))

"""The command line: LightningCLI with every method, callback, data module and policy of the package at hand.

``python -m lightning_contrast fit --config FILE`` runs a recipe. Classes of the package need no path in a configuration
(``class_path: MoCo``); a policy is a function, written with its path
(``class_path: lightning_contrast.augment.moco_v2_views``). Checkpoints are written by `AtomicCheckpointIO` unless a
recipe sets ``trainer.plugins``; ``--ckpt_path last`` goes on from the newest whole one.
"""

from typing import Any

import lightning as L

from lightning_contrast import augment, callbacks, data, methods

_HINT = 'Install the extra: pip install "lightning_contrast[cli]"'


def main(args: list[str] | None = None, *, run: bool = True) -> Any:
    """Run the command line.

    Args:
        args: Arguments as on the command line, ``["fit", "--config", "recipe.yaml"]``; None takes those of the process.
        run: False builds Trainer, module and data without running them; ``args`` then has no subcommand.

    Returns:
        The LightningCLI, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        ModuleNotFoundError: If jsonargparse is not installed; the message names the extra.
    """
    for package in (augment, callbacks, data, methods):
        for name in package.__all__:  # short names resolve only to classes that are imported
            getattr(package, name)
    from lightning.pytorch.cli import LightningCLI

    try:
        return LightningCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            trainer_defaults={"plugins": {"class_path": "lightning_contrast.checkpoints.AtomicCheckpointIO"}},
            save_config_kwargs={"overwrite": True},
            args=args,
            run=run,
        )
    except ModuleNotFoundError as error:
        if error.name is None or "jsonargparse" in str(error):
            raise ModuleNotFoundError(f"The command line needs jsonargparse. {_HINT}.", name="jsonargparse") from error
        raise

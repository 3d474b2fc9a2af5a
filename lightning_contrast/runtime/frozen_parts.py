"""Submodules of a method that are not trained."""

import warnings
from typing import Any

import lightning as L


class FrozenParts(L.LightningModule):
    """A LightningModule with submodules that get no gradient and no weight decay, and stay in evaluation mode."""

    frozen_parts: tuple[str, ...] = ()
    """The names of these submodules."""
    _filters: tuple[Any, ...] = ()

    def freeze_parts(self, *names: str) -> None:
        """Freeze submodules from now on; the parts of an optimizer are chosen afterwards.

        Args:
            *names: The names of the submodules, such as "backbone".
        """
        self.frozen_parts = (*self.frozen_parts, *names)
        for name in names:
            self.get_submodule(name).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenParts":
        """Set the training mode; frozen submodules stay in evaluation mode.

        Args:
            mode: Whether the other submodules are trained.
        """
        super().train(mode)
        for name in self.frozen_parts:
            self.get_submodule(name).eval()
        return self

    def on_fit_start(self) -> None:
        """Prevent Lightning's warning of modules in evaluation mode, if no others are, until `on_train_start`."""
        super().on_fit_start()
        frozen = {module for name in self.frozen_parts for module in self.get_submodule(name).modules()}
        if frozen and all(module.training or module in frozen for module in self.modules()):
            before = list(warnings.filters)
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
            self._filters = tuple(item for item in warnings.filters if item not in before)

    def on_train_start(self) -> None:
        """Remove the filter of warnings."""
        super().on_train_start()
        for item in self._filters:
            if item in warnings.filters:
                warnings.filters.remove(item)  # type: ignore[attr-defined]
        self._filters = ()

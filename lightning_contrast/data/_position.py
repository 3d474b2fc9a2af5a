"""Saves the position of the training loader in the state of a data module."""

from typing import Any

from lightning_contrast.data.loading import ResumableLoader


class RemembersPosition:
    """Mixin that saves the position of the training loader with the data module.

    Lightning restores the state of a loader only if the loader is created after the checkpoint is read. A module whose
    ``configure_optimizers`` uses ``trainer.estimated_stepping_batches`` creates it earlier, and the resumed epoch would
    restart. The state of a data module is restored early enough in both cases.
    """

    _train_loader: ResumableLoader | None = None
    _saved_position: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training loader; empty before it is created."""
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the position of the next training loader; it applies only in the saved epoch.

        Args:
            state_dict: The value returned by `state_dict`.
        """
        self._saved_position = state_dict.get("train_loader")

    def _remember(self, loader: ResumableLoader) -> ResumableLoader:
        if self._saved_position is not None:
            loader.load_state_dict(self._saved_position)
        self._train_loader = loader
        return loader

"""Where a data module's training stood, kept in checkpoints beside what Lightning keeps of the loader."""

from typing import Any

from lightning_contrast.data.loading import ResumableLoader


class RemembersPosition:
    """Saves the position of the training loader with the data module too.

    Lightning hands a loader its saved state only if it sets the loader up after it has read the checkpoint. A module
    whose ``configure_optimizers`` asks for ``trainer.estimated_stepping_batches`` makes it do so before, and a resumed
    epoch would begin anew. The state of a data module is read early enough for both.
    """

    _train_loader: ResumableLoader | None = None
    _saved_position: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training loader, nothing before there is one."""
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for the next training loader; it counts only while a run is in the saved epoch.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._saved_position = state_dict.get("train_loader")

    def _remember(self, loader: ResumableLoader) -> ResumableLoader:
        if self._saved_position is not None:
            loader.load_state_dict(self._saved_position)
        self._train_loader = loader
        return loader

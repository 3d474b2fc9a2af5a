"""Views created on the device of the batch, for every loader whose batches follow the contract."""

from typing import Any, ClassVar, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.augment.images import check_scaled_values
from lightning_contrast.augment.policy import ViewPolicy  # in the signature for configuration files
from lightning_contrast.augment.whole_images import WholeImages, center_squares
from lightning_contrast.callbacks.capture.labels import check_place
from lightning_contrast.contracts import Images, ImageSource, check_images, check_views
from lightning_contrast.runtime.batch_transfer import BatchTransforms, map_batches, transform_images
from lightning_contrast.runtime.rank_draws import rank_seed
from lightning_contrast.seeding import derived_seed, seeded

CHECKPOINT_KEY = "input_spec"
"""Checkpoint key of the preprocessing of the policy."""

_STEPS = {
    "fit": ("training_step", "validation_step"),
    "validate": ("validation_step",),
    "test": ("test_step",),
    "predict": ("predict_step",),
}


@runtime_checkable
class Policy(Protocol):
    """Protocol of a view policy: views for training, one transformed image for evaluation."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return V views ``(B, C, h, w)``, float, of images ``(B, C, H, W)``, uint8 or float in 0..1."""
        ...

    def eval_transform(self, images: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` resized, cropped and normalized, ``(B, C, h, w)``, float."""
        ...


class ViewAugmentation(L.Callback):
    """Create the views of every training batch on its device, before every step and every other callback.

    In training ``policy(images)`` replaces the images of a batch by a list of views; in validation, sanity check, test
    and prediction ``policy.eval_transform(images)`` replaces them by one tensor, so that all preprocessing is in one
    place. The rest of the batch is unchanged, and the loader's own tensors are not modified. Batches may be a tensor, a
    tuple, list, NamedTuple, dict or dataclass as in `lightning_contrast.contracts`, or collections of them from a
    `CombinedLoader`. If there is one view, it replaces the images as a tensor and not as a list.

    A loader may also yield a list of views, such as two frames of a video. Each is then augmented by a draw of its own:
    view i by the i-th view of a policy that creates as many, and all of them by a policy that creates one.

    Images are uint8 in 0..255 or float in 0..1, or have the range of the policy's ``scale``. Of `augment.WholeImages` a
    `ViewPolicy` crops views at the shapes that the images have; other policies get the square pixels. Clips, series and
    other tensors ``(B, ...)`` are given to the policy without a check. Values of images are checked in every batch on
    the CPU, and in the first batch of a fit on an accelerator, where each check costs a synchronization.

    A checkpoint keeps the policy's ``input_spec`` under the key ``"input_spec"``: the preprocessing that users of the
    backbone have to apply.

    Args:
        policy: Creates the views, for example ``augment.simclr_views(224)``. A module is moved to the device.
        seed: Makes views a function of (seed, epoch, batch, rank) alone, >= 0, without changing the global generators.
            None: views are drawn from the global generators, and differ between ranks even after ``seed_everything``,
            unless a callback of the Trainer, such as `StepSeed`, has a ``provides_view_seed``.
        evaluate: False leaves the batches of validation, test and prediction unchanged.
        images: Where the images are: the key of a dict batch, the index into a tuple or list, or a function that
            returns a part of the batch. None follows the batch contract. The views replace them in the same place.

    Raises:
        TypeError: If the policy cannot be called or lacks a required ``eval_transform``, or ``seed`` is not a whole
            number.
        ValueError: If ``seed`` is below 0.
    """

    takes_whole_images: ClassVar[bool] = True
    """Read by data modules that can yield `augment.WholeImages`."""

    def __init__(
        self,
        policy: Policy | ViewPolicy,
        seed: int | None = None,
        evaluate: bool = True,
        *,
        images: ImageSource = None,
    ) -> None:
        if not callable(policy):
            hint = "Give for example `augment.simclr_views(32)`"
            fail("policy", "be callable with a batch of images", type(policy).__name__, hint, TypeError)
        if evaluate and not callable(getattr(policy, "eval_transform", None)):
            hint = "Define `eval_transform(images)`, or set `evaluate=False`"
            fail("policy", "have a method `eval_transform`", type(policy).__name__, hint, TypeError)
        if seed is not None:
            check_at_least("seed", seed, 0)
        check_place("images", images)
        self.policy, self.seed, self.evaluate, self.images = policy, seed, evaluate, images
        self._trainer: Any = None
        self._checked: set[bool] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Add the views to the strategy's transfer of batches to the device.

        Raises:
            TypeError: If a step takes `dataloader_iter`, which bypasses the transfer.
        """
        for name in _STEPS[stage]:
            step = getattr(pl_module, name, None)
            ours = self.evaluate or name == "training_step"
            if ours and step is not None and is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
                hint = f"Write `{name}(self, batch, batch_idx)`, or create the views in the step"
                fail(name, "take a batch, which ViewAugmentation transforms", "`dataloader_iter`", hint, TypeError)
        if isinstance(self.policy, nn.Module):
            self.policy.to(trainer.strategy.root_device)
        self._trainer = trainer
        self._checked.clear()
        BatchTransforms.add(trainer.strategy, self._transform)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the strategy's transfer."""
        self._remove(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the strategy's transfer: `teardown` is not called after an exception."""
        self._remove(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the preprocessing that the backbone expects."""
        spec = getattr(self.policy, "input_spec", None)
        if spec is not None:
            checkpoint[CHECKPOINT_KEY] = dict(spec)

    def _remove(self, trainer: Any) -> None:
        BatchTransforms.remove(trainer.strategy, self._transform)
        self._trainer = None

    def _transform(self, batch: Any) -> Any:
        """Create the views of a batch that was just moved to its device."""
        trainer = self._trainer
        training = bool(trainer.training)
        if not training and not self.evaluate:
            return batch
        seed = self._seed_of_batch(trainer) if training else None
        make = self._views if training else self._eval_images
        views = self._augment_views if training else lambda given: [self._eval_images(view) for view in given]
        loaders = trainer.train_dataloader if training else None
        with torch.no_grad(), seeded(seed, trainer.strategy.root_device):
            batch = map_batches(batch, lambda one: transform_images(one, make, views, self.images), loaders)
        self._checked.add(training)
        return trainer.precision_plugin.convert_input(batch)  # the views are new float tensors

    def _views(self, images: Tensor) -> Images:
        pixels = self._check(images.pixels if isinstance(images, WholeImages) else images, evaluating=False)
        if isinstance(images, WholeImages) and isinstance(self.policy, ViewPolicy):
            views = check_views(self.policy(WholeImages(pixels, images.sizes)), pixels)
        else:
            views = check_views(self.policy(pixels), pixels)
        return views if len(views) > 1 else views[0]

    def _augment_views(self, given: list[Tensor]) -> list[Tensor]:
        """Augment views that the loader yields, each by its own draw."""
        augmented = []
        for place, images in enumerate(given):
            views = self._views(images)
            if not isinstance(views, Tensor):
                hint = "Give a policy of as many views, or of one; or remove ViewAugmentation"
                require(len(views) == len(given), "policy", f"create {len(given)} views or one", len(views), hint)
                views = views[place]
            augmented.append(views)
        return augmented

    def _eval_images(self, images: Tensor) -> Tensor:
        if self._scaled():
            self._check(images.pixels if isinstance(images, WholeImages) else images, evaluating=True)
            return self.policy.eval_transform(images)
        images = center_squares(images) if isinstance(images, WholeImages) else images
        return self.policy.eval_transform(self._check(images, evaluating=True))

    def _scaled(self) -> bool:
        return getattr(self.policy, "scale", None) is not None

    def _check(self, images: Tensor, *, evaluating: bool) -> Tensor:
        values = images.device.type == "cpu" or (not evaluating) not in self._checked
        scale = getattr(self.policy, "scale", None)
        if images.ndim == 4 and values and scale is not None:
            check_scaled_values(images, scale)
        if images.ndim != 4 or scale is not None:
            return images  # clips, series, other ranges: the policy knows their format
        return check_images(images, values=values, evaluating=evaluating)

    def _seed_of_batch(self, trainer: Any) -> int | None:
        seed = self.seed
        if seed is None:
            given = (getattr(callback, "provides_view_seed", None) for callback in trainer.callbacks)
            seed = next((value for value in given if value is not None), None)
        if seed is None:
            return rank_seed()
        batch_idx = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # incremented after the transfer
        return derived_seed(seed, trainer.current_epoch, batch_idx, trainer.global_rank)

"""Measures what features have become blind to: their similarity under each single change of the images."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_word, fail, require
from lightning_contrast.callbacks.capture.dataloaders import SEED, check_source, like, training_loader
from lightning_contrast.callbacks.capture.feature_bank import can_share
from lightning_contrast.callbacks.capture.features import FeatureHook, warn_of_nan
from lightning_contrast.callbacks.capture.forward_pass import encode, extra_pass
from lightning_contrast.callbacks.invariance.perturbations import (
    Changes,
    changed,
    chosen_changes,
    fitting_changes,
    similarity,
)
from lightning_contrast.callbacks.invariance.report import Curves, draw_curves, in_words, mean_of
from lightning_contrast.callbacks.reporting import log_values, picture_of, publish
from lightning_contrast.contracts import TOLERANCE, replace_images, split_batch
from lightning_contrast.seeding import derived_seed, isolated

CHUNK = 256
"""Images of one forward pass, where they were given as a tensor."""


class InvarianceMonitor(L.Callback):
    """Changes fixed images in one way at a time, at several strengths, and measures how far their features move.

    A network learns to ignore what its views change: colour jitter costs colour, crops cost the place. Each value is
    (own - different) / (1 - different) of cosines of centred features, with ``own`` between an image and its changed
    copy and ``different`` between two plain images: 1 where the features are blind to the change, 0 where the copy is
    as far away as another image. Measured at the first validation of a fit, ``every_n_epochs`` epochs later
    and so on, and in the last epoch; in a run without validation at the end of the epoch.

    Logged: ``invariance/<change>``, the mean over its strengths, and ``invariance/<change>/<strength>``. The curves of
    the first and of the last measurement are drawn at the end of a fit, where matplotlib is installed, and the last
    one is told in words. ``docs/invariance.md`` explains how to read them.

    It works on any LightningModule, under `lightning` and `pytorch_lightning` and on every strategy, and leaves the run
    as it was, bit for bit: the passes are made in eval mode, and nothing is drawn from a global generator; each rank
    encodes all images. Images go through the Trainer's transfer, so the plain policy of a `ViewAugmentation` prepares
    them as it does those of validation. Images with NaN or infinite features are left out with a warning.

    Memory: the images, as their loader gives them. A checkpoint has the two curves. Cost: 38 passes over ``samples``
    images without gradient, for the changes of the default.

    Args:
        features: As for `OnlineLinearProbe`.
        images: A tensor (N, C, H, W), uint8 or float in 0..1; a loader over a set of known length; or a DataModule,
            whose training loader is taken. None: the run's first validation loader.
        changes: Names of changes, all by default: "brightness", "contrast", "saturation", "hue", "grayscale", "blur",
            "crop", "shift", "rotation", "flip" (those of colours for images of three channels only). Or own ones by
            name, each a function of (images in 0..1, strength) with its strengths, weakest first.
        samples: Images, at least 8, spread evenly over the set.
        every_n_epochs: Epochs from one measurement to the next.
        mean: What a loader's images were normalised with, a number for each channel; None: they lie in 0..1.
        std: As ``mean``; both or none.
        tokens: As for `OnlineLinearProbe`.
        name: First part of the names that are logged; must differ between monitors of a Trainer.
        png_dir: Folder of the picture, beside the loggers; None: see `ViewLogger`.

    Attributes:
        first: The curves of the first measurement, by the name of the change: (strength, similarity), weakest first.
        curves: Those of the last.
        summary: What they say in words.
    """

    def __init__(
        self,
        features: str = "backbone",
        *,
        images: Any = None,
        changes: Changes = None,
        samples: int = 128,
        every_n_epochs: int = 10,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        tokens: str = "mean",
        name: str = "invariance",
        png_dir: str | Path | None = None,
    ) -> None:
        check_at_least("samples", samples, 8)
        check_at_least("every_n_epochs", every_n_epochs, 1)
        require((mean is None) == (std is None), "mean", "be given with `std`", (mean, std), "Give both, or neither")
        require(std is None or min(std) > 0, "std", "be > 0", std, "Give the deviation of each channel")
        check_word("name", name)
        if isinstance(images, Tensor):
            hint = "Stack images of one size"
            require(images.ndim == 4 and len(images) >= 2, "images", "be (N, C, H, W)", tuple(images.shape), hint)
        elif images is not None:
            check_source("images", images)
        self.images, self.samples, self.every_n_epochs = images, samples, every_n_epochs
        self.changes, self.name, self.png_dir = chosen_changes(changes), name, png_dir
        self.mean, self.std = mean, std
        self.first: Curves = {}
        self.curves: Curves = {}
        self.summary = ""
        self._tap = FeatureHook(features, tokens)
        self._batches: list[Any] | None = None
        self._measured: int | None = None
        self._warned = False

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, so that a Trainer takes several."""
        return f"InvarianceMonitor[{self.name}]"

    # The hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin anew; the curves of a checkpoint are loaded after this."""
        self._batches = None
        if stage == "fit":
            self.first, self.curves, self.summary, self._measured, self._warned = {}, {}, "", None, False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layer: here it exists, wrapped as it will be, in every strategy."""
        self._tap.attach(pl_module)
        if self.images is None and not trainer.enable_validation:
            rank_zero_warn(f"`{self.name}` looks at validation images, and this run has none: give it `images=`.")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layer, also where nothing is trained."""
        self._tap.attach(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure where it is time."""
        if not trainer.sanity_checking and self._is_due(trainer):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure in a run without validation."""
        if not trainer.enable_validation and self.images is not None and self._is_due(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the first and the last curves and tell what they say."""
        if not self.curves:
            return
        self.summary = in_words(self.curves, self.first)
        rank_zero_info(f"{type(self).__name__} `{self.name}`: {self.summary}")
        if trainer.is_global_zero and find_spec("matplotlib") is not None:
            units = {name: change.unit for name, change in self.changes.items()}
            drawn = {"first measurement": self.first, f"epoch {self._measured}": self.curves}
            publish(trainer, f"{self.name}/curves", picture_of(draw_curves(drawn, units)), self.png_dir)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook away and give the memory back."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hook away: `teardown` is not called after an exception."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return the curves."""
        return {"first": self.first, "curves": self.curves, "measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.first, self.curves, self._measured = (state_dict[key] for key in ("first", "curves", "measured"))

    # A measurement.

    def _close(self) -> None:
        self._tap.detach()
        self._batches = None

    def _is_due(self, trainer: Any) -> bool:
        epoch = int(trainer.current_epoch)
        if trainer.state.fn != "fit":
            return True
        last = trainer.max_epochs is not None and epoch + 1 == trainer.max_epochs
        before = self._measured
        return before is None or epoch - before >= self.every_n_epochs or (last and epoch != before)

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        """Measure all changes, on every rank alike, and log them."""
        device = trainer.strategy.root_device
        with isolated(derived_seed(SEED), device):
            if self._batches is None:
                self._batches = self._read(trainer)
                for batch in self._batches:
                    self._check_values(batch)
            channels = _images_of(self._batches[0]).shape[1]
            changes = fitting_changes(self.changes, channels)
            curves: Curves = {}
            with extra_pass(trainer, pl_module, [self._tap]):
                plain = self._encode(trainer, pl_module, None, 0.0)
                for name, change in changes.items():
                    curves[name] = []
                    for strength in change.strengths:
                        value = self._compare(plain, self._encode(trainer, pl_module, change, strength))
                        if value is not None:
                            curves[name].append((strength, value))
        self.curves = {name: curve for name, curve in curves.items() if curve}
        self.first = self.first or self.curves
        self._measured = int(trainer.current_epoch)
        values = {f"{self.name}/{name}": mean_of(curve) for name, curve in self.curves.items()}
        for name, curve in self.curves.items():
            values |= {f"{self.name}/{name}/{strength:g}": value for strength, value in curve}
        log_values(trainer, pl_module, values, on_epoch=True)

    def _encode(self, trainer: Any, pl_module: Any, change: Any, strength: float) -> Tensor:
        """Return the features (N, F) of all images, changed or as they are."""
        found = []
        for batch in self._batches or []:
            images = _images_of(batch).to(trainer.strategy.root_device)
            if change is not None:
                images = self._from_pixels(changed(self._to_pixels(images), change, strength), images)
            given = images if isinstance(batch, Tensor) else replace_images(batch, images)
            features, _ = encode(trainer, pl_module, [self._tap], given)
            found.append(features[0])
        return torch.cat(found)

    def _compare(self, plain: Tensor, other: Tensor) -> float | None:
        """Return the similarity over images with finite features, None where there are fewer than two."""
        finite = plain.isfinite().all(dim=1) & other.isfinite().all(dim=1)
        self._warned = self._warned or warn_of_nan(self, self._tap.features, finite)
        plain, other = plain[finite], other[finite]
        return float(similarity(plain, other)) if len(plain) >= 2 else None

    def _to_pixels(self, images: Tensor) -> Tensor:
        """Return images in 0..1, float32, from how the loader gives them."""
        if images.dtype == torch.uint8:
            return images.float() / 255
        mean, std = self._statistics(images.device)
        return images.float() * std + mean

    def _from_pixels(self, pixels: Tensor, given: Tensor) -> Tensor:
        """Return images as the loader would give them."""
        if given.dtype == torch.uint8:
            return (pixels * 255).round().to(torch.uint8)
        mean, std = self._statistics(pixels.device)
        return ((pixels - mean) / std).to(given.dtype)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what the loader normalises with, (1, C, 1, 1) each."""
        mean, std = ((0.0,), (1.0,)) if self.mean is None or self.std is None else (self.mean, self.std)
        shape = (1, -1, 1, 1)
        return torch.tensor(list(mean), device=device).view(shape), torch.tensor(list(std), device=device).view(shape)

    def _check_values(self, batch: Any) -> None:
        low, high = (float(bound) for bound in torch.aminmax(self._to_pixels(_images_of(batch))))
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            hint = "Give the `mean` and `std` that the loader normalises with, or `images=` in 0..1"
            fail("images", "lie in 0..1", (low, high), hint)

    def _read(self, trainer: Any) -> list[Any]:
        """Return the batches of the fixed images, the same on every rank."""
        if isinstance(self.images, Tensor):
            return list(torch.split(self.images[_spread(len(self.images), self.samples)], CHUNK))
        loader = trainer.val_dataloaders if self.images is None else training_loader("images", self.images, trainer)
        while isinstance(loader, list | tuple | dict):
            loader = next(iter(loader.values() if isinstance(loader, dict) else loader), None)
        if not can_share(loader) or len(loader.dataset) < 2:
            rule = "be a tensor, or a DataLoader over a set of known length, of two images or more"
            fail("images", rule, type(loader).__name__, "Give `images=`, a tensor (N, C, H, W)", TypeError)
        return list(like(loader, _spread(len(loader.dataset), self.samples), drop_last=False))


def _spread(total: int, samples: int) -> list[int]:
    """Return at most ``samples`` rows of a set, spread evenly over it."""
    count = min(total, samples)
    return [place * total // count for place in range(count)]


def _images_of(batch: Any) -> Tensor:
    images, _ = split_batch(batch)
    return images if isinstance(images, Tensor) else images[0]

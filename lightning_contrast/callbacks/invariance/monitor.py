"""Invariance of features to single image perturbations."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_word, fail, require
from lightning_contrast.augment.images import PixelRange, check_scale, rescale
from lightning_contrast.callbacks.capture.dataloaders import check_source, like, training_loader
from lightning_contrast.callbacks.capture.features import FeatureHook, warn_of_nan
from lightning_contrast.callbacks.capture.forward_pass import encode, extra_pass
from lightning_contrast.callbacks.capture.labels import (
    Source,
    UnreadableBatchError,
    check_place,
    find_pictures,
    pixel_range_of,
    warn_unreadable,
)
from lightning_contrast.callbacks.capture.sampling import SEED, drawn_rows, is_map_style
from lightning_contrast.callbacks.invariance.perturbations import (
    Changes,
    changed,
    chosen_changes,
    fitting_changes,
    similarity,
)
from lightning_contrast.callbacks.invariance.report import Curves, draw_curves, mean_of, summarize
from lightning_contrast.callbacks.reporting import log_values, picture_of, publish
from lightning_contrast.contracts import TOLERANCE, replace_images
from lightning_contrast.seeding import derived_seed, isolated

CHUNK = 256
"""Number of images of one forward pass for images given as a tensor."""


class InvarianceMonitor(L.Callback):
    """Measure how invariant features are to single image perturbations at several strengths.

    A network becomes invariant to what its views change: color jitter removes color, crops remove location. Each value
    is (own - different) / (1 - different) of cosine similarities of centered features, where ``own`` is the similarity
    of an image and its perturbed copy and ``different`` that of two unperturbed images: 1 means that the perturbation
    does not change the features, 0 that the copy is as far away as another image. Measured at the first validation of a
    fit, then every ``every_n_epochs`` epochs, and in the last epoch; in runs without validation at the end of the
    epoch.

    Logged: ``invariance/<perturbation>``, the mean over strengths, and ``invariance/<perturbation>/<strength>``. At the
    end of a fit, the curves of the first and the last measurement are drawn (requires matplotlib) and a summary of the
    last one is printed. For the interpretation, see ``docs/invariance.md``.

    Needs no module of this package; for `lightning` and `pytorch_lightning`, DDP, FSDP1 and FSDP2; training stays
    bit-identical: features are computed in eval mode without drawing from a global random generator. Each rank encodes
    all images. Images pass through the batch transfer of the Trainer, so the evaluation transform of a
    `ViewAugmentation` applies as in validation. Images with non-finite features are excluded with a warning. If a
    loader's float images leave 0..1 (normalized images without ``mean`` and ``std``), the callback warns once and logs
    nothing.

    Memory: the images as yielded by their loader. A checkpoint stores the two sets of curves. Overhead: 38 forward
    passes over ``samples`` images without gradient, for the default perturbations.

    Args:
        features: As for `OnlineLinearProbe`.
        images: Images to use, uint8, float in 0..1 or in ``scale``, ``(N, C, H, W)``, N >= 2. Or where they are in the
            batches of a loader: the key of a dict batch, the index into a tuple or list, or a function that returns a
            part of the batch; None follows the batch contract. If a batch has none, the callback warns once and logs
            nothing.
        dataloader: Loader over a dataset of known length, or a DataModule whose training loader is used. None, without
            ``images``: the first validation loader.
        changes: Names of perturbations: "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "crop",
            "shift", "rotation", "flip" (those of color for images of three channels only); None for all. Or a dict from
            names to functions of (images in 0..1, strength) with their strengths, weakest first.
        samples: Maximum number of images, >= 8, spread evenly over the dataset.
        every_n_epochs: Number of epochs between measurements, >= 1.
        mean: Mean of each channel, if the loader yields normalized images.
        std: Standard deviation of each channel, > 0; given together with ``mean``.
        scale: The values of the images that become 0 and 1, such as (0, 65535), as view policies have it. None takes
            that of the policy of the Trainer's `ViewAugmentation`; without one, images are uint8 or float in 0..1.
        tokens: As for `OnlineLinearProbe`.
        name: Prefix of the logged names; must be unique among the `InvarianceMonitor` callbacks of a Trainer.
        png_dir: Folder for a PNG file of the curves, in addition to the loggers; None: as for `ViewLogger`.

    Attributes:
        first: Curves of the first measurement, (strength, similarity) pairs by perturbation, weakest first.
        curves: Curves of the last measurement.
        summary: Summary of the last measurement.

    Raises:
        ValueError: If an argument is out of its range, values of ``images`` leave 0..1 after ``mean`` and ``std`` are
            reverted, or both ``images`` and ``dataloader`` are given.
    """

    def __init__(
        self,
        features: str = "backbone",
        *,
        images: Tensor | Source = None,
        dataloader: Any = None,
        changes: Changes = None,
        samples: int = 128,
        every_n_epochs: int = 10,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: PixelRange = None,
        tokens: str = "mean",
        name: str = "invariance",
        png_dir: str | Path | None = None,
    ) -> None:
        check_at_least("samples", samples, 8)
        check_at_least("every_n_epochs", every_n_epochs, 1)
        require((mean is None) == (std is None), "mean", "be given with `std`", (mean, std), "Give both, or neither")
        require(std is None or min(std) > 0, "std", "be > 0", std, "Give the standard deviation of each channel")
        check_scale(scale)
        hint = "Images with a `scale` are not normalized yet"
        require(scale is None or mean is None, "scale", "be None with `mean` and `std`", scale, hint)
        check_word("name", name)
        if not isinstance(images, Tensor):
            check_place("images", images)
        else:
            hint = "Stack images of one size"
            require(images.ndim == 4 and len(images) >= 2, "images", "be (N, C, H, W)", tuple(images.shape), hint)
            require(dataloader is None, "images", "be given without `dataloader`", "both", "Give one of them")
        if dataloader is not None:
            check_source("dataloader", dataloader)
        self.images, self.dataloader = images, dataloader
        self._source: Source = None if isinstance(images, Tensor) else images
        self.samples, self.every_n_epochs = samples, every_n_epochs
        self.changes, self.name, self.png_dir = chosen_changes(changes), name, png_dir
        self.mean, self.std, self.scale = mean, std, scale
        self._range = scale
        self.first: Curves = {}
        self.curves: Curves = {}
        self.summary = ""
        self._hook = FeatureHook(features, tokens)
        self._batches: list[Any] | None = None
        self._measured: int | None = None
        self._warned = self._unreadable = False
        if isinstance(images, Tensor):
            for batch in self._read(None):
                self._check_values(batch, ValueError)

    @property
    def state_key(self) -> str:
        """Key in a checkpoint's ``"callbacks"``, unique per name."""
        return f"InvarianceMonitor[{self.name}]"

    # Hooks, in the order in which the Trainer calls them.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Reset the curves (a checkpoint's are loaded later)."""
        self._batches = None
        if stage == "fit":
            self.first, self.curves, self.summary, self._measured, self._warned = {}, {}, "", None, False
            self._unreadable = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the feature hook; layers exist in their final, wrapped form only from here on."""
        self._hook.attach(pl_module)
        if not self._has_images and not trainer.enable_validation:
            rank_zero_warn(
                f"InvarianceMonitor `{self.name}` has no images: this run has no validation data. Give `images=` or "
                "`dataloader=`."
            )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the feature hook in runs without training."""
        self._hook.attach(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure if due."""
        if not trainer.sanity_checking and self._is_due(trainer):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure if due in runs without validation."""
        if not trainer.enable_validation and self._has_images and self._is_due(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the summary and draw the first and the last curves."""
        if not self.curves:
            return
        self.summary = summarize(self.curves, self.first)
        rank_zero_info(f"{type(self).__name__} `{self.name}`: {self.summary}")
        if trainer.is_global_zero and find_spec("matplotlib") is not None:
            units = {name: change.unit for name, change in self.changes.items()}
            drawn = {"first measurement": self.first, f"epoch {self._measured}": self.curves}
            publish(trainer, f"{self.name}/curves", picture_of(draw_curves(drawn, units)), self.png_dir)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the feature hook and release the images."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the feature hook; `teardown` is not called after an exception."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return the curves and the epoch of the last measurement."""
        return {"first": self.first, "curves": self.curves, "measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves and the epoch of the last measurement."""
        self.first, self.curves, self._measured = (state_dict[key] for key in ("first", "curves", "measured"))

    # Measurement.

    @property
    def _has_images(self) -> bool:
        return isinstance(self.images, Tensor) or self.dataloader is not None

    def _close(self) -> None:
        self._hook.detach()
        self._batches = None

    def _is_due(self, trainer: Any) -> bool:
        epoch = int(trainer.current_epoch)
        if self._unreadable:
            return False
        if trainer.state.fn != "fit":
            return True
        last = trainer.max_epochs is not None and epoch + 1 == trainer.max_epochs
        before = self._measured
        return before is None or epoch - before >= self.every_n_epochs or (last and epoch != before)

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        """Measure and log all perturbations, with equal results on all ranks."""
        device = trainer.strategy.root_device
        with isolated(derived_seed(SEED), device):
            self._range = self.scale or (pixel_range_of(trainer) if self.mean is None else None)
            if self._batches is None and not self._open(trainer):
                return
            channels = self._images_of((self._batches or [])[0]).shape[1]
            changes = fitting_changes(self.changes, channels)
            curves: Curves = {}
            with extra_pass(trainer, pl_module, [self._hook]):
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

    def _open(self, trainer: Any) -> bool:
        """Read and check the images; return False, after a warning, if a batch has none."""
        try:
            batches = self._read(trainer)
            for batch in batches:
                self._check_values(batch, UnreadableBatchError)
        except UnreadableBatchError as error:
            self._unreadable = True
            warn_unreadable(self, error)
            return False
        self._batches = batches
        return True

    def _encode(self, trainer: Any, pl_module: Any, change: Any, strength: float) -> Tensor:
        """Return the features of all images, perturbed unless ``change`` is None, ``(N, F)``."""
        found = []
        for batch in self._batches or []:
            images = self._images_of(batch).to(trainer.strategy.root_device)
            if change is not None:
                images = self._from_pixels(changed(self._to_pixels(images), change, strength), images)
            given = images if isinstance(batch, Tensor) else replace_images(batch, images, self._source)
            features, _ = encode(trainer, pl_module, [self._hook], given, self._source)
            found.append(features[0])
        return torch.cat(found)

    def _compare(self, plain: Tensor, other: Tensor) -> float | None:
        """Return the similarity over images with finite features, None if there are fewer than two."""
        finite = plain.isfinite().all(dim=1) & other.isfinite().all(dim=1)
        self._warned = self._warned or warn_of_nan(self, self._hook.features, finite)
        plain, other = plain[finite], other[finite]
        return float(similarity(plain, other)) if len(plain) >= 2 else None

    def _to_pixels(self, images: Tensor) -> Tensor:
        """Return images of the loader as float32 in 0..1, ``(B, C, H, W)``."""
        if self._range is not None:
            return rescale(images, self._range)
        if images.dtype == torch.uint8:
            return images.float() / 255
        mean, std = self._statistics(images.device)
        return images.float() * std + mean

    def _from_pixels(self, pixels: Tensor, given: Tensor) -> Tensor:
        """Return float32 images in 0..1 in the format of the loader, ``(B, C, H, W)``."""
        if self._range is not None:
            low, high = self._range
            values = pixels * (high - low) + low
            return (values if given.is_floating_point() else values.round()).to(given.dtype)
        if given.dtype == torch.uint8:
            return (pixels * 255).round().to(torch.uint8)
        mean, std = self._statistics(pixels.device)
        return ((pixels - mean) / std).to(given.dtype)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation used by the loader, ``(1, C, 1, 1)`` each."""
        mean, std = ((0.0,), (1.0,)) if self.mean is None or self.std is None else (self.mean, self.std)
        shape = (1, -1, 1, 1)
        return torch.tensor(list(mean), device=device).view(shape), torch.tensor(list(std), device=device).view(shape)

    def _check_values(self, batch: Any, error: type[Exception]) -> None:
        low, high = (float(bound) for bound in torch.aminmax(self._to_pixels(self._images_of(batch))))
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            hint = "Give the `mean` and `std` used by the loader, the `scale` of its values, or `images=` in 0..1"
            fail("images", "be in 0..1", (low, high), hint, error)

    def _images_of(self, batch: Any) -> Tensor:
        return find_pictures(batch, None if isinstance(batch, Tensor) else self._source)[0]

    def _read(self, trainer: Any) -> list[Any]:
        """Return batches of the fixed images, equal on all ranks."""
        if isinstance(self.images, Tensor):
            return list(torch.split(self.images[_spread(len(self.images), self.samples)], CHUNK))
        own = self.dataloader
        loader = trainer.val_dataloaders if own is None else training_loader("dataloader", own, trainer)
        while isinstance(loader, list | tuple | dict):
            loader = next(iter(loader.values() if isinstance(loader, dict) else loader), None)
        if not is_map_style(loader) or len(loader.dataset) < 2:
            rule = "be a DataLoader over a dataset of known length with at least two images"
            fail(
                "dataloader", rule, type(loader).__name__, "Give `images=`, a tensor (N, C, H, W)", UnreadableBatchError
            )
        rows = drawn_rows(loader)
        return list(like(loader, [rows[i] for i in _spread(len(rows), self.samples)], drop_last=False))


def _spread(total: int, samples: int) -> list[int]:
    """Return at most ``samples`` indices, evenly spread over a dataset of ``total`` images."""
    count = min(total, samples)
    return [place * total // count for place in range(count)]

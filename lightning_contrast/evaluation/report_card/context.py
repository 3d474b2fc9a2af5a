"""What the parts of a report read: models, features, images and options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_contrast._checks import fail, require
from lightning_contrast.augment.images import as_float
from lightning_contrast.callbacks.capture.sampling import drawn_rows
from lightning_contrast.contracts import check_images, split_batch
from lightning_contrast.evaluation.feature_pass.cache import FeatureSet, features_of
from lightning_contrast.evaluation.feature_pass.subjects import Subject
from lightning_contrast.evaluation.protocols.inputs import Split, split
from lightning_contrast.evaluation.protocols.linear import ProbeResult
from lightning_contrast.evaluation.protocols.logistic import logistic_probe
from lightning_contrast.metrics.zero_shot import eval_mode

_BATCH = 256
_COMPARED = 4  # images that are preprocessed as uint8 and as floats
_SAME = 0.1  # of the distance of two images: a resize may round uint8
_ROUNDING = 0.01  # of the norm, of features in which images hardly differ


@dataclass
class Context:
    """Everything that a part reads.

    Attributes:
        subjects: The models by name, the reference first.
        train: Features of the training images by model.
        test: Features of the test images by model.
        loader: Loader of the test images, in order.
        class_names: Names of the classes, or None.
        seed: Seed of all draws.
        options: Options of the parts.
        outcomes: What the parts before found, by part and model.
        memory: What parts keep for the next model.
        datamodule: The DataModule, whose methods may say more about its images; see `drawing.DECLARED`.
        train_loader: Loader of the training images.
        transfer: Other DataModules by name.
        folder: Folder of the features.
    """

    subjects: dict[str, Subject]
    train: dict[str, FeatureSet]
    test: dict[str, FeatureSet]
    loader: Any
    class_names: list[str] | None
    seed: int
    options: dict[str, Any]
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    datamodule: Any = None
    train_loader: Any = None
    transfer: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path("features")

    @property
    def test_split(self) -> str:
        """Name of the split of the test images: "test", or "val" if the DataModule has no test loader."""
        from lightning.pytorch.utilities.model_helpers import is_overridden

        return "test" if is_overridden("test_dataloader", self.datamodule) else "val"

    def labeled(self, model: str) -> Split:
        """Return labeled features of the training and test images.

        Args:
            model: Name of the model.

        Raises:
            ValueError: If there are no labels, or only one class.
        """
        train, test = self.train[model], self.test[model]
        if train.labels is None or test.labels is None:
            fail("datamodule", "yield labels for this part", "none", "Choose parts without labels by `parts=`")
        return split(train.features, train.labels, test.features, test.labels)

    def classifier(self, model: str) -> ProbeResult:
        """Return the logits ``(M, C)`` of the logistic regression that several parts judge: standardized, C = 0.1.

        Args:
            model: Name of the model.
        """
        key = f"classifier {model}"
        if key not in self.memory:
            given = self.labeled(model)
            self.memory[key] = logistic_probe(*given.train, *given.test, c=0.1, standardize=True)
        found: ProbeResult = self.memory[key]
        return found

    def images(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Return test images at equal distances, ``(n, C, H, W)`` as the loader has them, and their labels ``(n,)``.

        Args:
            number: Images at most.
        """
        key = f"images {number}"
        if key not in self.memory:
            rows = drawn_rows(self.loader)
            number = min(number, len(rows))
            chosen = [rows[place * len(rows) // number] for place in range(number)]
            self.memory[key] = read_rows(self.loader, chosen)
        found: tuple[Tensor, Tensor | None] = self.memory[key]
        return found

    def unit_images(self, model: str, number: int) -> tuple[Tensor, Tensor | None]:
        """Return `images` as floats in 0..1, ``(n, C, H, W)``, for parts that change them, and their labels ``(n,)``.

        Args:
            model: Name of the model that will get them.
            number: Images at most.

        Raises:
            ValueError: If they have another range, or the model expects one.
            TypeError: If they are neither uint8 nor floats.
        """
        images, labels = self.images(number)
        return self.unit_range(model, images), labels

    def unit_range(self, model: str, images: Tensor) -> Tensor:
        """Return images ``(n, C, H, W)`` as floats in 0..1, for parts that change them.

        Args:
            model: Name of the model that will get them.
            images: As the loader has them.

        Raises:
            ValueError: If they have another range, the model expects one, or its preprocessing takes floats in 0..1 for
                other images than uint8.
            TypeError: If they are neither uint8 nor floats.
        """
        hint = "Leave this part out by `parts=`, or the views of geometry by options={'view_images': 0}"
        scale = (self.subjects[model].input_spec or {}).get("scale")
        require(scale is None, "models", "take images in 0..1 for this part", f"a scale of {scale}", hint)
        found = as_float(check_images(images, values=True, evaluating=True))
        key = f"takes floats {model}"
        if images.dtype == torch.uint8 and key not in self.memory:
            expected, got = (self.encode(model, given[:_COMPARED]).double() for given in (images, found))
            usual = (expected - expected.roll(1, 0)).norm() + _ROUNDING * expected.norm()  # between images
            ratio = float((got - expected).norm() / usual.clamp(min=torch.finfo(torch.float64).tiny))
            hint = "Give a `preprocess` that begins with `augment.images.as_float`, or leave this part out by `parts=`"
            text = "map uint8 images and the same as floats in 0..1 to the same input, for parts that change images"
            require(
                ratio < _SAME, "preprocess", text, f"features that differ by {ratio:.2g} of two images' distance", hint
            )
            self.memory[key] = True
        return found

    def pictures(self, model: str) -> tuple[Tensor, Tensor]:
        """Return the images ``(n, C, H, W)`` of the figures, and their features ``(n, F)``.

        Args:
            model: Name of the model.
        """
        images, _ = self.images(int(self.options["pictures"]))
        key = f"pictures {model}"
        if key not in self.memory:
            self.memory[key] = self.encode(model, images)
        return images, self.memory[key]

    def inputs(self, model: str, images: Tensor) -> Tensor:
        """Return images ``(n, C, H, W)`` as the network of a model takes them, ``(n, C, h, w)``, on its device.

        Args:
            model: Name of the model.
            images: As the loader has them.
        """
        subject = self.subjects[model]
        parameter = next(subject.module.parameters(), None)
        return subject.preprocess(images if parameter is None else images.to(parameter.device))

    def encode(self, model: str, images: Tensor) -> Tensor:
        """Return features ``(n, F)`` of images ``(n, C, H, W)`` with the preprocessing of the model.

        Args:
            model: Name of the model.
            images: As the loader has them.
        """
        subject = self.subjects[model]
        with eval_mode(subject.module):
            return torch.cat([features_of(subject, part) for part in torch.split(images, _BATCH)])


def read_rows(loader: Any, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Return images ``(n, C, H, W)`` as a loader has them, and their labels ``(n,)`` if it has some.

    Args:
        loader: A DataLoader over a dataset whose rows are read by index.
        rows: Rows of the dataset.

    Raises:
        ValueError: If its batches hold views.
    """
    fetch = getattr(loader.dataset, "__getitems__", None)
    items = fetch(list(rows)) if callable(fetch) else [loader.dataset[row] for row in rows]
    images, labels = split_batch(loader.collate_fn(items))
    if not isinstance(images, Tensor):
        fail("datamodule", "yield one tensor of images per batch", "views", "Give images without views")
    return images, labels


def find_loaders(datamodule: Any) -> tuple[Any, Any]:
    """Return the training and the test loader of a DataModule; the validation loader if there is no test loader.

    Args:
        datamodule: A LightningDataModule.

    Raises:
        TypeError: If it is something else.
        ValueError: If it has several or no loaders for a purpose.
    """
    hint = "Give a LightningDataModule with `train_dataloader` and `test_dataloader`"
    if not isinstance(datamodule, L.LightningDataModule):
        fail("datamodule", "be a LightningDataModule", type(datamodule).__name__, hint, TypeError)
    from lightning.pytorch.utilities.model_helpers import is_overridden

    datamodule.prepare_data()
    datamodule.setup("fit")
    train = datamodule.train_dataloader()
    if is_overridden("test_dataloader", datamodule):
        datamodule.setup("test")
        test = datamodule.test_dataloader()
    elif is_overridden("val_dataloader", datamodule):
        test = datamodule.val_dataloader()
    else:
        fail("datamodule", "have test or validation images", type(datamodule).__name__, hint)
    for name, loader in (("train_dataloader", train), ("test_dataloader", test)):
        if not _is_loader(loader):
            fail("datamodule", f"have one loader as {name}", type(loader).__name__, hint)
    return train, test


def _is_loader(loader: Any) -> bool:
    return isinstance(loader, torch.utils.data.DataLoader)


def about_data(datamodule: Any, sets: Mapping[str, FeatureSet]) -> dict[str, Any]:
    """Return what is known about the data, for the report.

    Args:
        datamodule: The DataModule.
        sets: "train" and "test" features of one model.
    """
    found: dict[str, Any] = {"name": getattr(datamodule, "dataset_name", type(datamodule).__name__), "classes": None}
    for name, of in sets.items():
        found[f"{name}_images"] = len(of.features)
        if of.labels is not None and not of.labels.is_floating_point() and of.labels.ndim == 1:
            found[f"{name}_labeled"] = int((of.labels >= 0).sum())
            found["classes"] = max(found["classes"] or 0, 1 + int(of.labels.max()))
    return found


def writable(folder: str | Path) -> Path:
    """Return the folder after checking that files can be written to it.

    Args:
        folder: The folder; missing ones are created.

    Raises:
        OSError: If it cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        probe = target / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"Cannot write to `output` {target}: {error.strerror or error}") from error
    return target

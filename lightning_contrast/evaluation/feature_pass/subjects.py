"""What is evaluated: a module, a file of weights or a name, together with the input that it expects."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_contrast._checks import fail
from lightning_contrast.augment import ViewPolicy
from lightning_contrast.augment.images import as_float
from lightning_contrast.checkpoints import load_checkpoint
from lightning_contrast.exported import INPUT_SPEC, load_teacher

_FILES = (".pt", ".pth", ".ckpt")
Preprocess = Callable[[Tensor], Tensor]


class Subject(NamedTuple):
    """A network and the input that it expects.

    Attributes:
        module: Maps images ``(B, C, h, w)`` to features ``(B, F)``.
        preprocess: Maps the images of a loader, ``(B, C, H, W)``, to the input of the module.
        input_spec: Size, mean and std of the input; None if they are not known, and images are only scaled to 0..1.
        source: Where the weights come from, in words.
    """

    module: nn.Module
    preprocess: Preprocess
    input_spec: dict[str, Any] | None
    source: str


def load_subject(model: str | Path | nn.Module | Subject, preprocess: Preprocess | None = None) -> Subject:
    """Return the network of a module, a file or a name, with the preprocessing that its weights expect.

    Args:
        model: A module; the path of a file by `export_backbone` (".pt") or of a checkpoint (".ckpt") of a method whose
            backbone was given by name; or the name of a timm model, whose published weights timm downloads.
        preprocess: Maps images ``(B, C, H, W)`` of a loader to the input. None: resize, center crop and normalization
            by the ``input_spec`` of the module or file, or of timm; scaling to 0..1 if there is none.

    Raises:
        TypeError: If ``model`` is none of these.
        ValueError: If a name is unknown or has no published weights, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """
    if isinstance(model, Subject):
        return model if preprocess is None else model._replace(preprocess=preprocess)
    if isinstance(model, nn.Module):
        return _subject(model, _spec_of(model), f"module {type(model).__name__}", preprocess)
    if not isinstance(model, str | Path):
        hint = "Give a module, the path of a checkpoint, or a name of timm"
        fail("model", "be a module, a path or a name", type(model).__name__, hint, TypeError)
    if Path(model).suffix in _FILES:
        network = load_teacher(model).module
        saved = load_checkpoint(model, map_location="meta")
        spec = saved.get(INPUT_SPEC) if isinstance(saved, Mapping) else None
        return _subject(network, spec, f"file {Path(model).name}", preprocess)
    network = load_teacher(str(model)).module
    config = getattr(network, "pretrained_cfg", None) or {}
    spec = None
    if config.get("mean") is not None and config.get("input_size") is not None:
        spec = {"size": config["input_size"][-1], "mean": list(config["mean"]), "std": list(config["std"])}
    return _subject(network, spec, f"timm's {model}", preprocess)


def spec_transform(spec: Mapping[str, Any]) -> Preprocess:
    """Return the transform of evaluation for images ``(B, C, H, W)``: resize, center crop and normalization.

    Args:
        spec: Size, mean and std of the input; mean and std None for images that are only scaled to 0..1.
    """
    mean, std = spec["mean"], spec["std"]
    channels = 3 if mean is None else len(mean)
    policy = ViewPolicy([nn.Identity()], size=int(spec["size"]), channels=channels, mean=mean, std=std)
    return policy.eval_transform


def _subject(network: nn.Module, spec: Mapping[str, Any] | None, source: str, preprocess: Preprocess | None) -> Subject:
    transform = preprocess or (as_float if spec is None else spec_transform(spec))
    return Subject(network, transform, None if spec is None else dict(spec), source)


def _spec_of(module: nn.Module) -> Mapping[str, Any] | None:
    """Return the specification that a module carries, or that of the views of its Trainer."""
    spec = getattr(module, INPUT_SPEC, None)
    if isinstance(spec, Mapping):
        return spec
    trainer = getattr(module, "_trainer", None)  # `trainer` raises without one
    found = (getattr(getattr(callback, "policy", None), INPUT_SPEC, None) for callback in _callbacks(trainer))
    return next((spec for spec in found if isinstance(spec, Mapping)), None)


def _callbacks(trainer: Any) -> list[Any]:
    return list(getattr(trainer, "callbacks", None) or ())

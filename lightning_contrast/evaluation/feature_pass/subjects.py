"""What is evaluated: a module, a file of weights or a name, together with the input that it expects."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast import methods
from lightning_contrast._checks import fail, require
from lightning_contrast.augment import ViewPolicy
from lightning_contrast.augment.images import as_float
from lightning_contrast.checkpoints import load_checkpoint
from lightning_contrast.exported import INPUT_SPEC, load_backbone, load_teacher
from lightning_contrast.nn.auxiliary_batchnorm import without_auxiliary

__all__ = ["Preprocess", "Subject", "load_backbone", "load_subject", "spec_transform"]

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
        model: A module; the path of a file by `export.export` (".pt") or of a checkpoint (".ckpt") of a method of this
            package whose backbone was given by name; or the name of a timm model, whose published weights timm
            downloads.
        preprocess: Maps images ``(B, C, H, W)`` of a loader to the input. None: the evaluation transform of the views
            of the module's Trainer; resize, center crop and normalization by the ``input_spec`` of the module or file;
            timm's transform of a name; scaling to 0..1 if there is none.

    Raises:
        TypeError: If ``model`` is none of these.
        ValueError: If a name is unknown or has no published weights, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """
    if isinstance(model, Subject):
        return model if preprocess is None else model._replace(preprocess=preprocess)
    if isinstance(model, nn.Module):
        source, policy = f"module {type(model).__name__}", _policy_of(model)
        if policy is not None:
            return Subject(model, preprocess or policy.eval_transform, dict(policy.input_spec), source)
        return _subject(model, getattr(model, INPUT_SPEC, None), source, preprocess)
    if not isinstance(model, str | Path):
        hint = "Give a module, the path of a checkpoint, or a name of timm"
        fail("model", "be a module, a path or a name", type(model).__name__, hint, TypeError)
    if Path(model).suffix in _FILES:
        saved = load_checkpoint(model, map_location="meta")
        network = _network_of(Path(model), saved)
        spec = saved.get(INPUT_SPEC) if isinstance(saved, Mapping) else None
        return _subject(network, spec, f"file {Path(model).name}", preprocess)
    hint = "Give a checkpoint (.ckpt), a .pt file of `export.export`, or a name of timm"
    require(Path(model).suffix != ".onnx" and not Path(model).is_file(), "model", "hold weights", str(model), hint)
    try:
        network = load_teacher(str(model)).module
    except OSError as error:
        hint = f"Check the network, or give a file or a module; timm.create_model({str(model)!r}) has random weights"
        text = "be a name whose weights timm can download"
        fail("model", text, f"{model}: {type(error).__name__}", hint)
    config = getattr(network, "pretrained_cfg", None) or {}
    source = f"timm's {model}"
    if config.get("mean") is None or config.get("input_size") is None:
        return _subject(network, None, source, preprocess)
    spec = {"size": config["input_size"][-1], "mean": list(config["mean"]), "std": list(config["std"])}
    if config.get("interpolation", "bilinear") != "bilinear":
        spec["interpolation"] = "bicubic"
    return Subject(network, preprocess or spec_transform(spec, crop_pct=config.get("crop_pct") or 1.0), spec, source)


def spec_transform(spec: Mapping[str, Any], *, crop_pct: float = 1.0) -> Preprocess:
    """Return the transform of evaluation for images ``(B, C, H, W)``: resize, center crop and normalization.

    Args:
        spec: An ``input_spec``, see `ViewPolicy.input_spec`: size, mean and std, and what else a domain needs.
        crop_pct: Share of the shorter side that the center crop keeps, in (0, 1]; below 1 only for a square size.
    """
    policy = ViewPolicy.from_input_spec(spec)
    size, mode = policy.height, policy.interpolation
    edge = max(size, round(size / crop_pct))
    if edge == size:
        return policy.eval_transform

    def transform(images: Tensor) -> Tensor:
        pixels = as_float(images)
        height, width = pixels.shape[-2:]
        shorter = min(height, width)
        extent = [max(edge, int(edge * side / shorter)) for side in (height, width)]
        if shorter != edge:
            pixels = F.interpolate(pixels, extent, mode=mode, antialias=True).clamp_(0, 1)
        top, left = ((side - size) // 2 for side in extent)
        return policy.eval_transform(pixels[..., top : top + size, left : left + size])

    return transform


def _network_of(path: Path, saved: Any) -> nn.Module:
    """Return the network of a file whose content is given without weights."""
    try:
        return load_teacher(path).module
    except ValueError:  # not of a network that its name builds: a masked method changes it, CPC replaces its BatchNorm
        given = saved.get("hyper_parameters") if isinstance(saved, Mapping) else None
        if given is None:
            raise
        found = _backbone_of_method(path, dict(given))
        if found is None:
            text = "be a checkpoint of a method of this package whose backbone was given by name"
            hint = "Give the module, or export its backbone by `export.export`"
            fail("model", text, f"{path}, backbone {given.get('backbone')!r}", hint)
        return found


def _backbone_of_method(path: Path, given: dict[str, Any]) -> nn.Module | None:
    """Return the backbone of the method of this package that a checkpoint with these hyperparameters is of, or None."""
    written_as = str(given.pop("_class_path", "")).rpartition(".")[2]
    arguments = {name: value for name, value in given.items() if not name.startswith("_")}
    kwargs = {key: value for key, value in (arguments.get("backbone_kwargs") or {}).items() if key != "pretrained"}
    arguments |= {"backbone_kwargs": kwargs} if "backbone_kwargs" in arguments else {}
    weights = without_auxiliary(load_checkpoint(path)["state_dict"])
    package: Any = methods
    for name in [written_as] if written_as in package.__all__ else package.__all__:
        kind = getattr(package, name)
        if not (inspect.isclass(kind) and issubclass(kind, methods.SelfSupervisedModule)):
            continue
        with torch.random.fork_rng(devices=[]), contextlib.suppress(TypeError, ValueError, RuntimeError):
            method = kind(**arguments)
            method.load_state_dict(weights)
            return method.backbone
    return None


def _subject(network: nn.Module, spec: Mapping[str, Any] | None, source: str, preprocess: Preprocess | None) -> Subject:
    transform = preprocess or (as_float if spec is None else spec_transform(spec))
    return Subject(network, transform, None if spec is None else dict(spec), source)


def _policy_of(module: nn.Module) -> Any:
    """Return the view policy of the module's Trainer, or None."""
    callbacks = getattr(getattr(module, "_trainer", None), "callbacks", None) or ()  # `trainer` raises without one
    policies = (getattr(callback, "policy", None) for callback in callbacks)
    return next((policy for policy in policies if isinstance(policy, ViewPolicy)), None)

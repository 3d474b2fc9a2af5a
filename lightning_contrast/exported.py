"""Networks in files: exported backbones, which are checked by the features of fixed images, and teachers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_dict, fail, require
from lightning_contrast.augment.images import check_size
from lightning_contrast.checkpoints import load_checkpoint
from lightning_contrast.nn.auxiliary_batchnorm import without_auxiliary
from lightning_contrast.nn.backbones import (
    ARCHITECTURE,
    BUILT_AS,
    PREFIX,
    SMALL_CONVNET,
    build_backbone,
    read_feature_dim,
    strip_prefix,
)
from lightning_contrast.nn.feature_output import FeatureOutput
from lightning_contrast.nn.frozen_teacher import FrozenTeacher
from lightning_contrast.nn.patch_grid import replace_batchnorm
from lightning_contrast.nn.small_vit import SMALL_VIT
from lightning_contrast.nn.tubelets import VIDEO_VITS, build_tubelet_backbone
from lightning_contrast.nn.video import CLIP_NAMES, build_clip_backbone

INPUT_SPEC = "input_spec"
"""Key of the preprocessing of images in exported files and in the metadata of ONNX graphs."""
_INT4 = "int4"
_TOLERANCE = 0.01  # of the largest feature: reduced precision passes, another stem does not
_FILES = (".pt", ".pth", ".ckpt")
_OWN = (SMALL_CONVNET, SMALL_VIT)  # networks without published weights
_DOWNLOADED = ("hf-hub:", "hf_hub:", "local-dir:")


def load_backbone(path: str | Path, backbone: nn.Module | None = None) -> nn.Module:
    """Return the backbone of a file that `export.export` wrote as "state_dict" or "int4", in eval mode.

    The network is built as it was for the run: by name, with its arguments and its stem. Its features of fixed images
    are compared with those of the exported backbone. ``network.input_spec`` says how images are prepared, by
    `augment.ViewPolicy.from_input_spec`.

        network = lc.export.load_backbone("backbone.pt")
        features = network(images)  # (B, F)

    Args:
        path: Path of the file, read with ``weights_only=True``.
        backbone: The network to load the weights into, for a backbone that was given to the method as a module, or with
            arguments that a file cannot hold.

    Returns:
        The network, on the CPU, from images ``(B, C, h, w)`` to features ``(B, F)``.

    Raises:
        ValueError: If the file is damaged or not an exported backbone, ``backbone`` is missing, the weights do not fit,
            or the features differ.
        FileNotFoundError: If the file does not exist.
    """
    saved = load_checkpoint(path)
    hint = "Give a file that `export.export` wrote; its weights alone do not say what was built"
    if not isinstance(saved, Mapping) or not saved.keys() >= {"state_dict", INPUT_SPEC, ARCHITECTURE, "features"}:
        fail("path", "be an exported backbone", str(path), hint)
    architecture, features = saved[ARCHITECTURE], saved["features"]
    if backbone is None:
        hint = "The file does not hold how the network was built: give `backbone=`, a network built in the same way"
        require(architecture["name"] is not None, "backbone", "be given for this file", None, hint)
        with torch.random.fork_rng(devices=[]):
            backbone = _rebuilt(architecture, features.shape[1])
    try:
        backbone.load_state_dict(strip_prefix(saved["state_dict"]) | _unpacked(saved.get(_INT4, {})))
    except RuntimeError as error:
        fail("backbone", "fit the weights of the file", type(backbone).__name__, str(error).rstrip("."))
    FeatureOutput.attach(backbone, features.shape[1], architecture["tokens"])
    found = _fixed_features(backbone, saved[INPUT_SPEC])
    if not _agree(found, features):
        hint = "It has the same weights, but another stem or other arguments"
        fail("backbone", "compute the features of the exported network", type(backbone).__name__, hint)
    backbone.eval()
    object.__setattr__(backbone, INPUT_SPEC, dict(saved[INPUT_SPEC]))
    return backbone


def load_teacher(
    teacher: str | Path | nn.Module,
    *,
    teacher_dim: int | None = None,
    teacher_kwargs: Mapping[str, Any] | None = None,
) -> FrozenTeacher:
    """Return a frozen teacher of images ``(B, C, H, W)``.

    Args:
        teacher: A name, as for `nn.build_backbone`, whose published weights timm downloads; the path of a file by
            `export.export` (".pt") or of a checkpoint (".ckpt") of a method whose backbone was given by name, of
            which the backbone is taken; or a module, which is used as it is.
        teacher_dim: Width D of the features ``(B, D)``; None reads it from the network.
        teacher_kwargs: Further arguments of the network that a name builds, such as ``pretrained=False``.

    Raises:
        ValueError: If the name is unknown or has no weights, the file does not fit, or the width cannot be read.
        TypeError: If ``teacher`` is none of these, or ``teacher_kwargs`` no dict.
        FileNotFoundError: If the file does not exist.
    """
    if not isinstance(teacher, str | Path | nn.Module):
        hint = "Give a name of timm, the path of a file, or a module"
        fail("teacher", "be a name, a path or a module", type(teacher).__name__, hint, TypeError)
    if isinstance(teacher, str) and Path(teacher).suffix not in _FILES:
        return _named_teacher(teacher, teacher_dim, check_dict("teacher_kwargs", teacher_kwargs))
    if teacher_kwargs:
        hint = "They are arguments of the network that a name builds"
        fail("teacher_kwargs", "be None where `teacher` is no name", dict(teacher_kwargs), hint)
    if isinstance(teacher, nn.Module):
        width = getattr(teacher, "feature_dim", None) if teacher_dim is None else teacher_dim
        return _frozen(teacher, width)
    network = _network_of(Path(teacher))
    _check_width(network, teacher_dim)
    return _frozen(network, teacher_dim)


def _named_teacher(teacher: str, teacher_dim: int | None, kwargs: dict[str, Any]) -> FrozenTeacher:
    """Return a network by its name, with its published weights unless ``pretrained=False``."""
    if kwargs.pop("pretrained", True):
        import timm

        hint = 'Give a file or a module, or teacher_kwargs={"pretrained": False} for random weights'
        known = not timm.is_model(teacher) or timm.models.is_model_pretrained(teacher)
        require(known and teacher not in _OWN, "teacher", "have published weights", teacher, hint)
        kwargs["pretrained"] = True
    with torch.random.fork_rng(devices=[]):
        made = _frozen(teacher, teacher_dim, kwargs)
    _check_width(made.module, teacher_dim)
    return made


def _frozen(network: str | nn.Module, width: int | None, kwargs: Mapping[str, Any] | None = None) -> FrozenTeacher:
    """Return a network as a teacher; errors say that it is the teacher."""
    try:
        network, width = build_backbone(network, feature_dim=width, backbone_kwargs=kwargs)
    except ValueError as error:
        raise ValueError(f"{error} Here `backbone` is the teacher, and `feature_dim` is `teacher_dim`.") from error
    FeatureOutput.attach(network, width, None, is_teacher=True)
    return FrozenTeacher(network, width)


def _check_width(network: nn.Module, teacher_dim: int | None) -> None:
    """Raise a ValueError if a network without classifier is known to have features of another width."""
    try:
        width = read_feature_dim(network)
    except ValueError:  # it has a classifier, or does not say: its first features are checked
        return
    hint = "Leave it out: it is read from the teacher"
    require(teacher_dim in (None, width), "teacher_dim", f"be {width}, the width of the teacher", teacher_dim, hint)


def _network_of(path: Path) -> nn.Module:
    """Return the network of an exported file, or the backbone of a checkpoint of a method."""
    saved = load_checkpoint(path)
    if not isinstance(saved, Mapping) or "hyper_parameters" not in saved:
        return load_backbone(path)
    given = saved["hyper_parameters"]
    name, hint = given.get("backbone"), "Export it by `export.export`, or give the teacher as a module"
    if not isinstance(name, str) or " " in name:
        fail("teacher", "be a checkpoint with the name of its backbone", name, hint)
    options = {key: given[key] for key in ("small_images", "feature_dim", "tokens") if key in given}
    kwargs = {key: value for key, value in (given.get("backbone_kwargs") or {}).items() if key != "pretrained"}
    with torch.random.fork_rng(devices=[]):
        network = build_backbone(name, backbone_kwargs=kwargs, **options).module
    prefix = "backbone."
    saved_weights = without_auxiliary(saved["state_dict"])
    weights = {key.removeprefix(prefix): v for key, v in saved_weights.items() if key.startswith(prefix)}
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        fail("teacher", f"be a checkpoint whose backbone is {name!r} alone", str(path), hint)
    return network


def pack_weights(backbone: nn.Module, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file for `load_backbone`.

    Args:
        backbone: The network.
        spec: The ``input_spec`` of its images.

    Raises:
        ValueError: If the network does not take images of this size.
    """
    built = getattr(backbone, BUILT_AS, {"name": None, "small_images": False, "backbone_kwargs": {}, "tokens": None})
    arguments = {key: value for key, value in built["backbone_kwargs"].items() if key != "pretrained"}
    architecture = {**built, "backbone_kwargs": arguments}
    try:
        json.dumps(arguments)
    except TypeError:  # a class or a function, which a file for `weights_only=True` cannot hold
        architecture = {**built, "name": None, "backbone_kwargs": {}}
    try:
        features = _fixed_features(backbone, spec)
    except (RuntimeError, AssertionError, ValueError) as error:
        rule = "be the input of the backbone"
        fail(INPUT_SPEC, rule, dict(spec), f"The backbone raises {str(error).strip().splitlines()[0].rstrip('.')}")
    prefix = PREFIX if _misread(built | {"backbone_kwargs": arguments}, backbone, spec, features) else ""
    own = without_auxiliary(backbone.state_dict())
    weights = {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
    return {"state_dict": weights, INPUT_SPEC: dict(spec), ARCHITECTURE: architecture, "features": features}


def add_int4(saved: Mapping[str, Any], levels: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of a file with some weights in 4 bits; the others get names that no network accepts.

    Args:
        saved: Result of `pack_weights`.
        levels: Per weight "packed" (uint8 ``(out, in / 2)``), "scale" (``(out, in / group_size)``) and "group_size".
    """
    kept = {name: value for name, value in strip_prefix(saved["state_dict"]).items() if name not in levels}
    return {**saved, "state_dict": {PREFIX + name: value for name, value in kept.items()}, _INT4: dict(levels)}


def _unpacked(levels: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the weights ``(out, in)`` of levels by `add_int4`, the first of two in the low bits, each plus 8."""
    found = {}
    for name, given in levels.items():
        packed = given["packed"]
        whole = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).float() - 8
        found[name] = whole * given["scale"].repeat_interleave(given["group_size"], dim=1)
    return found


def count_channels(network: nn.Module, spec: Mapping[str, Any]) -> int:
    """Return the number of channels of the images, from the mean or from the first convolution."""
    if spec["mean"] is not None and len(spec["mean"]) > 1:
        return len(spec["mean"])
    convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if convolution is None else convolution.in_channels


def _rebuilt(architecture: Mapping[str, Any], feature_dim: int) -> nn.Module:
    """Return the network of images or clips that the entry of a file describes, with new weights."""
    name, options = architecture["name"], _options(architecture)
    if name in VIDEO_VITS:
        network = build_tubelet_backbone(name, **options).module
    elif name in CLIP_NAMES:
        network = build_clip_backbone(name, **options).module
    else:
        network = build_backbone(name, feature_dim=feature_dim, **options).module
    return replace_batchnorm(network) if architecture.get("layer_norm") else network


def _options(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return {name: architecture[name] for name in ("small_images", "backbone_kwargs", "tokens")}


@torch.no_grad()
def _fixed_features(network: nn.Module, spec: Mapping[str, Any]) -> Tensor:
    """Return the features of two fixed images in eval mode, float32 ``(2, F)``, on the CPU; modes are restored."""
    parameter = next(network.parameters(), torch.zeros(()))
    shape = (2, count_channels(network, spec), *check_size(spec["size"]))
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    modes = {module: module.training for module in network.modules()}
    for module in modes:
        module.training = False
    try:
        features: Tensor = network(images)
        return features.float().cpu()
    finally:
        for module, mode in modes.items():
            module.training = mode


def _agree(found: Tensor, expected: Tensor) -> bool:
    scale = max(float(expected.abs().max()), 1e-6)
    return found.shape == expected.shape and bool(((found - expected).abs() <= _TOLERANCE * scale).all())


def _misread(built: Mapping[str, Any], backbone: nn.Module, spec: Mapping[str, Any], features: Tensor) -> bool:
    """Return whether the network of the name alone accepts the weights and computes other features."""
    name, other = built["name"], built["small_images"] or built["tokens"] or bool(built["backbone_kwargs"])
    if name is None or not other or name.startswith(_DOWNLOADED):
        return bool(other)
    try:
        with torch.random.fork_rng(devices=[]):
            plain = build_backbone(name).module
        plain.load_state_dict(without_auxiliary(backbone.state_dict()))
        return not _agree(_fixed_features(plain, spec), features)
    except (RuntimeError, AssertionError, ValueError, TypeError):  # it does not take the weights, or these images
        return False

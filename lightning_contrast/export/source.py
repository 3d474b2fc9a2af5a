"""What is exported: the network, the specification of its images, and a copy that runs in float32 on the CPU."""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_contrast._checks import fail, require
from lightning_contrast.augment.bands import append_indices
from lightning_contrast.augment.images import check_input_spec, rescale
from lightning_contrast.exported import INPUT_SPEC
from lightning_contrast.nn import MaskedViT
from lightning_contrast.nn.frozen_teacher import weights_digest
from lightning_contrast.sharding import is_fsdp1_shard


def backbone_of(model: object) -> nn.Module:
    """Return the network to export: the ``backbone`` of a method, or the module itself.

    Raises:
        TypeError: If the model is not a module.
        ValueError: If it is sharded.
    """
    if not isinstance(model, nn.Module):
        fail("model", "be an nn.Module", type(model).__name__, "Give a method, or its `backbone`", TypeError)
    model = cast("nn.Module", getattr(model, "_orig_mod", model))  # of a compiled module
    backbone = getattr(model, "backbone", model)
    backbone = getattr(backbone, "_orig_mod", backbone)
    if not isinstance(backbone, nn.Module):
        fail("model", "have a module as `backbone`", type(backbone).__name__, "Give the network itself", TypeError)
    check_whole(backbone)
    return cast("nn.Module", backbone.vit) if isinstance(backbone, MaskedViT) else backbone


def check_whole(model: nn.Module) -> None:
    """Refuse to export a sharded module."""
    if any(isinstance(weight, DTensor) or is_fsdp1_shard(weight) for weight in model.parameters()):
        hint = "Load a full checkpoint into a module without a Trainer, and export that"
        fail("model", "have full weights", "a module sharded by FSDP", hint)


def input_of(model: Any, input_spec: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the ``input_spec``: as given, else that of the view policy of the model's Trainer.

    Args:
        model: The module; if it has no Trainer, the specification of ``model.input_spec`` counts.
        input_spec: See `ViewPolicy.input_spec`.

    Raises:
        ValueError: If the specification is missing or incomplete.
    """
    model = getattr(model, "_orig_mod", model)
    callbacks = getattr(getattr(model, "_trainer", None), "callbacks", [])
    policies = (getattr(callback, "policy", None) for callback in callbacks)
    policy = next((policy for policy in policies if getattr(policy, INPUT_SPEC, None) is not None), None)
    if input_spec is None:
        input_spec = getattr(model if policy is None else policy, INPUT_SPEC, None)
    return check_input_spec(input_spec)


def pixel_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``input_spec`` of a network that normalizes images itself: they are resized, and keep their range."""
    return {key: spec[key] for key in ("size", "scale", "interpolation") if key in spec} | {"mean": None, "std": None}


def model_digest(network: nn.Module, format: str, calibration: Tensor | None, tolerance: float) -> str:
    """Return the metadata "model_digest": other weights, formats and, for int8, calibrations have another one.

    Args:
        network: The network whose weights are written.
        format: Of the file.
        calibration: Inputs ``(N, ...)`` of the calibration for int8.
        tolerance: Of int8, on which the operators in float depend.
    """
    found = f"{weights_digest(network):016x}-{format}"
    if calibration is None:
        return found
    content = hashlib.blake2b(f"{found} {tolerance} uint8 activations".encode(), digest_size=8)
    content.update(calibration.contiguous().numpy().data)
    return f"{content.hexdigest()}-{format}"


def preprocessing(spec: Mapping[str, Any], *, inside: bool) -> dict[str, Any]:
    """Return the metadata "preprocessing", of which every entry is given.

    Args:
        spec: The ``input_spec``.
        inside: Whether the graph scales and normalizes.
    """
    given = {name: spec.get(name) for name in ("size", "mean", "std", "scale")}
    return given | {"interpolation": spec.get("interpolation", "bilinear"), "inside": inside}


def float_copy(network: nn.Module) -> nn.Module:
    """Return a copy of a network in float32, on the CPU, in eval mode and contiguous."""
    return copy.deepcopy(network).cpu().float().eval().to(memory_format=torch.contiguous_format)


class PixelInput(nn.Module):
    """A network with its preprocessing, apart from the resizing: uint8 images to features.

    Args:
        network: Maps normalized images ``(B, C, h, w)`` to features ``(B, F)``.
        spec: The ``input_spec`` of its images.

    Raises:
        ValueError: If the values of the images do not fit into uint8.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        low, high = spec.get("scale") or (0.0, 255.0)
        hint = "Set `preprocess=False`, and prepare the images by the `input_spec`"
        require(low >= 0 and high <= 255, "preprocess", "be False for values beyond uint8", (low, high), hint)
        self.scale, self.window = (low, high), spec.get("window")
        self.indices = [(first, second) for first, second in spec.get("indices", [])]
        self.is_normalized = spec["mean"] is not None
        if self.is_normalized:
            self.register_buffer("mean", torch.tensor(spec["mean"]).view(1, -1, 1, 1))
            self.register_buffer("std", torch.tensor(spec["std"]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``(B, F)`` of uint8 images ``(B, C, h, w)`` of the network's size."""
        pixels = rescale(images, self.scale)
        if self.window is not None:
            pixels = rescale(pixels, self.window)
        pixels = append_indices(pixels, self.indices)
        if self.is_normalized:
            pixels = (pixels - self.mean) / self.std
        features: Tensor = self.network(pixels)
        return features

"""A backbone on its own: its weights, or an ONNX graph, together with what its images have to be."""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_contrast._checks import check_at_least, check_choice, fail
from lightning_contrast.nn import MaskedViT
from lightning_contrast.sharding import is_fsdp1_shard

ExportFormat: TypeAlias = Literal["state_dict", "onnx"]

INPUT_SPEC = "input_spec"
"""Key of a state dict file, and name of an ONNX graph's metadata, under which the size, mean and std are kept."""
_TOLERANCE = 1e-4
_FORMATS = ("state_dict", "onnx")


def export_backbone(
    model: nn.Module,
    path: str | Path,
    *,
    format: ExportFormat = "state_dict",
    input_spec: Mapping[str, Any] | None = None,
) -> Path:
    """Write a backbone to a file, for use without this package.

    "state_dict" is a file for ``torch.load(path, weights_only=True)`` with ``{"state_dict", "input_spec"}``; the
    weights load strictly into a network built with the same name and arguments:

        saved = torch.load(path, weights_only=True)
        timm.create_model("resnet50", num_classes=0).load_state_dict(saved["state_dict"])

    "onnx" is a graph from ``images`` (B, C, size, size), float32 and normalised with the mean and std, to ``features``
    (B, F), for any B, in eval mode; the ``input_spec`` is JSON in its metadata. The written graph is run once in
    onnxruntime and compared with the backbone. It needs the extra: ``pip install 'lightning_contrast[export]'``.

    Source of the graph: `torch.onnx.export`. The model itself is not changed, whatever its mode and device.

    Args:
        model: A method of this package, of which the ``backbone`` is written (of masked vision transformers the timm
            network in it); or any network, which is written as it is. Heads, and the part of SimCLR v2's head that its
            ``forward`` may include, are left out. DINO evaluates its teacher: pass ``model.momentum_backbone``.
        path: File to write; folders that do not exist are made.
        format: "state_dict" or "onnx".
        input_spec: What the images have to be: ``{"size", "mean", "std"}``, mean and std None where they are only
            scaled to 0..1. None: that of the `ViewAugmentation` of the model's Trainer. A checkpoint of a run with
            such a callback has it under "input_spec".

    Returns:
        The path.

    Raises:
        ValueError: If the format is unknown, there is no ``input_spec`` or not a whole one, or the model is sharded.
        TypeError: If the model is no module.
        ModuleNotFoundError: If the extra is not installed.
        RuntimeError: If the graph gives other features than the backbone.
    """
    check_choice("format", format, _FORMATS)
    if not isinstance(model, nn.Module):
        fail("model", "be an nn.Module", type(model).__name__, "Give a method, or its `backbone`", TypeError)
    spec = _checked(input_spec if input_spec is not None else _spec_of_trainer(model))
    backbone = _backbone_of(model)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "onnx":
        _write_onnx(backbone, path, spec)
    else:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
        torch.save({"state_dict": weights, INPUT_SPEC: spec}, path)
    return path


def _spec_of_trainer(model: nn.Module) -> Any:
    """Return the ``input_spec`` of a policy among the callbacks of the model's Trainer, or None."""
    callbacks = getattr(getattr(model, "_trainer", None), "callbacks", [])
    specs = (getattr(getattr(callback, "policy", None), INPUT_SPEC, None) for callback in callbacks)
    return next((spec for spec in specs if spec is not None), None)


def _checked(spec: Any) -> dict[str, Any]:
    """Return the spec as a dict of plain numbers."""
    hint = 'Give {"size": ..., "mean": ..., "std": ...}: a checkpoint of a run with `ViewAugmentation` holds it'
    if not isinstance(spec, Mapping) or spec.keys() != {"size", "mean", "std"}:
        fail("input_spec", "hold the size, mean and std of the images", spec, hint)
    check_at_least("size", spec["size"], 1)
    lists = {key: None if spec[key] is None else [float(value) for value in spec[key]] for key in ("mean", "std")}
    return {"size": int(spec["size"]), **lists}


def _backbone_of(model: nn.Module) -> nn.Module:
    """Return the network to write."""
    model = cast("nn.Module", getattr(model, "_orig_mod", model))  # of a compiled module
    backbone = getattr(model, "backbone", model)
    backbone = getattr(backbone, "_orig_mod", backbone)
    if not isinstance(backbone, nn.Module):
        fail("model", "have a module as `backbone`", type(backbone).__name__, "Give the network itself", TypeError)
    if any(isinstance(weight, DTensor) or is_fsdp1_shard(weight) for weight in backbone.parameters()):
        hint = "Load a full checkpoint into a module without a Trainer, and export that"
        fail("model", "hold whole weights", "a module that FSDP has sharded", hint)
    return cast("nn.Module", backbone.vit) if isinstance(backbone, MaskedViT) else backbone


def _write_onnx(backbone: nn.Module, path: Path, spec: dict[str, Any]) -> None:
    """Write the graph, and compare what it gives with what the backbone gives."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        hint = "pip install 'lightning_contrast[export]'"
        raise ModuleNotFoundError(f"ONNX needs onnx, onnxscript and onnxruntime: {hint}.") from error
    network = copy.deepcopy(backbone).cpu().float().eval().to(memory_format=torch.contiguous_format)
    images = torch.rand(2, _channels(network, spec), spec["size"], spec["size"])
    with _silence("torch.onnx", "onnxscript", "onnx_ir"):
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            optimize=False,  # constant folding takes far longer and onnxruntime does it again
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    program.model.metadata_props[INPUT_SPEC] = json.dumps(spec)
    program.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    more = torch.cat([images, images.flip(0)[:1]])  # a batch of another size
    (given,) = session.run(None, {"images": more.numpy()})
    with torch.no_grad():
        expected: Tensor = network(more)
    difference = float((torch.from_numpy(given) - expected).abs().max())
    if given.shape != tuple(expected.shape) or not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"The ONNX graph gives features that differ from the backbone's by up to {difference:g}.")


def _channels(network: nn.Module, spec: dict[str, Any]) -> int:
    """Return the channels of the images: as many as there are means, or as the first convolution takes."""
    if spec["mean"] is not None and len(spec["mean"]) > 1:
        return len(spec["mean"])
    convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if convolution is None else convolution.in_channels


@contextmanager
def _silence(*names: str) -> Iterator[None]:
    """Keep the progress of an exporter to itself."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

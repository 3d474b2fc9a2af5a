"""Export of a backbone as weights or an ONNX graph, with the specification of its input."""

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
from lightning_contrast.evaluation.exported import INPUT_SPEC, count_channels, pack_weights
from lightning_contrast.nn import MaskedViT
from lightning_contrast.sharding import is_fsdp1_shard

ExportFormat: TypeAlias = Literal["state_dict", "onnx"]

_TOLERANCE = 1e-4
_FORMATS = ("state_dict", "onnx")


def export_backbone(
    model: nn.Module,
    path: str | Path,
    *,
    format: ExportFormat = "state_dict",
    input_spec: Mapping[str, Any] | None = None,
) -> Path:
    """Export a backbone to a file.

    "state_dict" writes a file for `load_backbone`, which builds the network again. It can also be read without this
    package, by ``torch.load(path, weights_only=True)``: a dict with "state_dict", "input_spec", the "architecture" that
    was built, and "features" by which a loaded network is checked. The weights load strictly into a network with the
    same name and arguments:

        saved = torch.load(path, weights_only=True)
        timm.create_model("resnet50", num_classes=0).load_state_dict(saved["state_dict"])

    If the network of that name would accept the weights and compute other features, as without the stem of
    ``small_images=True``, the keys begin with ``"needs_load_backbone."``, so that this fails.

    "onnx" writes a graph from ``images`` (B, C, size, size), float32 and normalized with the mean and std, to
    ``features`` (B, F), for any B, in eval mode; the ``input_spec`` is JSON in its metadata. The graph is run once in
    onnxruntime and compared with the backbone. Needs the extra: ``pip install 'lightning_contrast[export]'``.

    Source of the graph: `torch.onnx.export`. The model is not modified.

    Args:
        model: A method of this package, whose ``backbone`` is exported (for masked vision transformers the timm
            network), or any network. Heads, including the part of SimCLR v2's head that its ``forward`` may include,
            are not exported. For the teacher of DINO, as in the paper, pass ``model.momentum_backbone``.
        path: Path of the file; missing folders are created.
        format: "state_dict" or "onnx".
        input_spec: Specification of the images: ``{"size", "mean", "std"}``, mean and std None for images that are only
            scaled to 0..1. None uses that of the `ViewAugmentation` of the model's Trainer. Checkpoints of a run with
            this callback contain it under "input_spec".

    Returns:
        The path.

    Raises:
        ValueError: If the format is unknown, ``input_spec`` is missing, incomplete or not an input of the backbone, or
            the model is sharded.
        TypeError: If the model is not a module.
        ModuleNotFoundError: If the extra is not installed.
        RuntimeError: If the features of the graph differ from those of the backbone.
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
        torch.save(pack_weights(backbone, spec), path)
    return path


def _spec_of_trainer(model: nn.Module) -> Any:
    """Return the ``input_spec`` of a policy among the callbacks of the model's Trainer, or None."""
    callbacks = getattr(getattr(model, "_trainer", None), "callbacks", [])
    specs = (getattr(getattr(callback, "policy", None), INPUT_SPEC, None) for callback in callbacks)
    return next((spec for spec in specs if spec is not None), None)


def _checked(spec: Any) -> dict[str, Any]:
    """Return the spec as a dict of plain numbers."""
    hint = 'Give {"size": ..., "mean": ..., "std": ...}: checkpoints of a run with `ViewAugmentation` contain it'
    if not isinstance(spec, Mapping) or spec.keys() != {"size", "mean", "std"}:
        fail("input_spec", "hold the size, mean and std of the images", spec, hint)
    check_at_least("size", spec["size"], 1)
    lists = {key: None if spec[key] is None else [float(value) for value in spec[key]] for key in ("mean", "std")}
    return {"size": int(spec["size"]), **lists}


def _backbone_of(model: nn.Module) -> nn.Module:
    """Return the network to export."""
    model = cast("nn.Module", getattr(model, "_orig_mod", model))  # of a compiled module
    backbone = getattr(model, "backbone", model)
    backbone = getattr(backbone, "_orig_mod", backbone)
    if not isinstance(backbone, nn.Module):
        fail("model", "have a module as `backbone`", type(backbone).__name__, "Give the network itself", TypeError)
    if any(isinstance(weight, DTensor) or is_fsdp1_shard(weight) for weight in backbone.parameters()):
        hint = "Load a full checkpoint into a module without a Trainer, and export that"
        fail("model", "have full weights", "a module sharded by FSDP", hint)
    return cast("nn.Module", backbone.vit) if isinstance(backbone, MaskedViT) else backbone


def _write_onnx(backbone: nn.Module, path: Path, spec: dict[str, Any]) -> None:
    """Write the graph and compare its features with those of the backbone."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        hint = "pip install 'lightning_contrast[export]'"
        raise ModuleNotFoundError(f"ONNX needs onnx, onnxscript and onnxruntime: {hint}.") from error
    network = copy.deepcopy(backbone).cpu().float().eval().to(memory_format=torch.contiguous_format)
    images = torch.rand(2, count_channels(network, spec), spec["size"], spec["size"])
    with _silence("torch.onnx", "onnxscript", "onnx_ir"):
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            optimize=False,  # constant folding is slow, and onnxruntime repeats it
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
        raise RuntimeError(f"The features of the ONNX graph differ from those of the backbone by up to {difference:g}.")


@contextmanager
def _silence(*names: str) -> Iterator[None]:
    """Silence the messages of loggers below ERROR."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

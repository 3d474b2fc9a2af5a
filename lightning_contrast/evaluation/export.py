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

from lightning_contrast._checks import check_choice, fail
from lightning_contrast.augment.images import check_input_spec, check_size
from lightning_contrast.exported import INPUT_SPEC, count_channels, load_backbone, pack_weights
from lightning_contrast.nn import MaskedViT, TextTransformer
from lightning_contrast.nn.tokenizer_spec import tokenizer_spec
from lightning_contrast.sharding import is_fsdp1_shard

__all__ = ["ExportFormat", "export_backbone", "export_towers", "load_backbone"]

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

    "onnx" writes a graph from ``images`` (B, C, h, w), float32 and normalized with the mean and std, to
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
            scaled to 0..1, and where they differ "scale", "window" and "indices" (see `ViewPolicy.input_spec`). None
            uses that of the `ViewAugmentation` of the model's Trainer. Checkpoints of a run with this callback contain
            it under "input_spec". `augment.ViewPolicy.from_input_spec` prepares images by it.

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
    spec = check_input_spec(input_spec if input_spec is not None else _spec_of_trainer(model))
    backbone = _backbone_of(model)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "onnx":
        images = torch.rand(2, count_channels(backbone, spec), *check_size(spec["size"]))
        _write_graph(backbone, images, path, ("images", "features"), {INPUT_SPEC: json.dumps(spec)})
    else:
        torch.save(pack_weights(backbone, spec), path)
    return path


def _spec_of_trainer(model: nn.Module) -> Any:
    """Return the ``input_spec`` of a policy among the callbacks of the model's Trainer, or None."""
    callbacks = getattr(getattr(model, "_trainer", None), "callbacks", [])
    specs = (getattr(getattr(callback, "policy", None), INPUT_SPEC, None) for callback in callbacks)
    return next((spec for spec in specs if spec is not None), None)


def _backbone_of(model: nn.Module) -> nn.Module:
    """Return the network to export."""
    model = cast("nn.Module", getattr(model, "_orig_mod", model))  # of a compiled module
    backbone = getattr(model, "backbone", model)
    backbone = getattr(backbone, "_orig_mod", backbone)
    if not isinstance(backbone, nn.Module):
        fail("model", "have a module as `backbone`", type(backbone).__name__, "Give the network itself", TypeError)
    _check_whole(backbone)
    return cast("nn.Module", backbone.vit) if isinstance(backbone, MaskedViT) else backbone


def _check_whole(model: nn.Module) -> None:
    """Refuse to export a sharded module."""
    if any(isinstance(weight, DTensor) or is_fsdp1_shard(weight) for weight in model.parameters()):
        hint = "Load a full checkpoint into a module without a Trainer, and export that"
        fail("model", "have full weights", "a module sharded by FSDP", hint)


def export_towers(
    model: nn.Module, folder: str | Path, *, input_spec: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Export the two encoders of an image-text model as ONNX graphs.

    ``image.onnx`` maps ``images`` (B, C, h, w), float32 and normalized with the mean and std, to ``embeddings``
    (B, D) of unit length, as ``model.encode_image`` does; ``text.onnx`` maps ``tokens`` (B, L), int64, to
    ``embeddings`` (B, D), as ``model.encode_text`` does with tokens. B is free, and for `nn.TextTransformer` also L up
    to its context length; other text towers take the context length. The tokenizer is not part of the graph: if it is
    one of this package, its kind and arguments are JSON in the metadata of ``text.onnx``. Each graph is run once in
    onnxruntime and compared with the model. Needs the extra: ``pip install 'lightning_contrast[export]'``.

    Args:
        model: A `CLIP` or `SigLIP`; it is not modified.
        folder: Folder of the files; it is created.
        input_spec: As in `export_backbone`; kept as JSON in the metadata of ``image.onnx``.

    Returns:
        The paths of ``image.onnx`` and ``text.onnx``.

    Raises:
        TypeError: If the model is no image-text model, or its text tower has no ``context_length`` or ``vocab_size``.
        ValueError: If ``input_spec`` is missing or incomplete, or the model is sharded.
        ModuleNotFoundError: If the extra is not installed.
        RuntimeError: If the embeddings of a graph differ from those of the model.
    """
    model = cast("nn.Module", getattr(model, "_orig_mod", model))
    parts = [getattr(model, f"{kind}_projection", None) for kind in ("image", "text")]
    towers = [getattr(model, "backbone", None), getattr(model, "text_backbone", None)]
    if not all(isinstance(part, nn.Module) for part in (*parts, *towers)):
        fail("model", "be an image-text model", type(model).__name__, "Give a `CLIP` or `SigLIP`", TypeError)
    length, vocabulary = (_size_of(towers[1], name) for name in ("context_length", "vocab_size"))
    spec = check_input_spec(input_spec if input_spec is not None else _spec_of_trainer(model))
    _check_whole(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    image, text = (_Encoder(tower, part) for tower, part in zip(towers, parts, strict=True))  # type: ignore[arg-type]
    images = torch.rand(2, count_channels(image, spec), *check_size(spec["size"]))
    _write_graph(image, images, folder / "image.onnx", ("images", "embeddings"), {INPUT_SPEC: json.dumps(spec)})
    tokens = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    facts = {"context_length": str(length), "tokenizer": json.dumps(tokenizer_spec(getattr(model, "tokenizer", None)))}
    _write_graph(text, tokens, folder / "text.onnx", ("tokens", "embeddings"), facts)
    return folder / "image.onnx", folder / "text.onnx"


def _size_of(tower: Any, name: str) -> int:
    """Return ``context_length`` or ``vocab_size`` of a text tower, from which an example of tokens is made."""
    size = getattr(tower, name, None)
    if not isinstance(size, int):
        hint = f"Set `{name}` on the module, as `nn.TextTransformer` has it"
        fail("text_backbone", f"have an int `{name}`", type(tower).__name__, hint, TypeError)
    return size


class _Encoder(nn.Module):
    """A tower and its projection, to unit rows (B, D)."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward(self, given: Tensor) -> Tensor:
        """Return the embeddings (B, D) of images (B, C, H, W) or tokens (B, L)."""
        return nn.functional.normalize(self.projection(self.tower(given)), dim=1)


def _write_graph(
    network: nn.Module, example: Tensor, path: Path, names: tuple[str, str], metadata: Mapping[str, str]
) -> None:
    """Write the graph of a network for any batch size, and compare its output for the example with the network's."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        hint = "pip install 'lightning_contrast[export]'"
        raise ModuleNotFoundError(f"ONNX needs onnx, onnxscript and onnxruntime: {hint}.") from error
    network = copy.deepcopy(network).cpu().float().eval().to(memory_format=torch.contiguous_format)
    dynamic = {0: torch.export.Dim("batch")}
    if not example.is_floating_point() and any(isinstance(m, TextTransformer) for m in network.modules()):
        dynamic[1] = torch.export.Dim("length", min=3, max=example.shape[1])
    with _silence("torch.onnx", "onnxscript", "onnx_ir"):
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            optimize=False,  # constant folding is slow, and onnxruntime repeats it
            verbose=False,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_shapes=(dynamic,),
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    more = torch.cat([example, example.flip(0)[:1]])  # a batch of another size
    (given,) = session.run(None, {names[0]: more.numpy()})
    with torch.no_grad():
        expected: Tensor = network(more)
    difference = float((torch.from_numpy(given) - expected).abs().max())
    if given.shape != tuple(expected.shape) or not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"The {names[1]} of the ONNX graph differ from those of the model by up to {difference:g}.")


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

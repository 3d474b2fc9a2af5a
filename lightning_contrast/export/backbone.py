"""Export of a backbone in one of several formats, each of which is read again and compared with the network."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast._version import __version__
from lightning_contrast.checkpoints import load_checkpoint
from lightning_contrast.export import graphs, int4, int8, timm_folder
from lightning_contrast.export.parity import (
    EXACT,
    ParityReport,
    Runner,
    as_json,
    check_parity,
    check_tolerance,
    compare,
    run_all,
)
from lightning_contrast.export.pruning import check_share, prune_channels
from lightning_contrast.export.samples import Samples, read_samples
from lightning_contrast.export.source import PixelInput, backbone_of, float_copy, input_of, model_digest, preprocessing
from lightning_contrast.exported import INPUT_SPEC, add_int4, count_channels, load_backbone, pack_weights
from lightning_contrast.nn.auxiliary_batchnorm import remove_auxiliary_batchnorm
from lightning_contrast.nn.backbones import ARCHITECTURE

__all__ = ["ExportFormat", "export", "load_backbone"]

ExportFormat: TypeAlias = Literal["state_dict", "timm", "onnx", "torch_export", "onnx-int8", "int4"]

LOSSY = 0.01
"""Default tolerance of int8, int4 and pruning."""
_FORMATS = ("state_dict", "timm", "onnx", "torch_export", "onnx-int8", "int4")
_GRAPHS = ("onnx", "torch_export", "onnx-int8")
_SMALLEST = 8  # calibration images, and as many others for the comparison


class Written(NamedTuple):
    """A file or folder and how it is run."""

    runner: Runner
    quantized: list[str]
    left_in_float: dict[str, float]


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: ExportFormat = "state_dict",
    input_spec: Mapping[str, Any] | None = None,
    preprocess: bool = False,
    data: Any = None,
    images: int = 512,
    calibration_images: int = 128,
    prune: float = 0.0,
    group_size: int = 32,
    tolerance: float | None = None,
) -> Path:
    """Export a backbone, read it again and compare its features with those of the network.

    - "state_dict": a file for `load_backbone`, which builds the network again. Without this package it is a dict with
      "state_dict", "input_spec", the "architecture" that was built, and "features" by which a loaded network is
      checked. The weights load strictly into timm's network of the same name and arguments without a classifier, by
      ``network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])``, and into torchvision's ResNet
      whose ``fc`` is `torch.nn.Identity`. If the network of that name would accept the weights and compute other
      features, as without the stem of ``small_images=True``, the keys begin with ``"needs_load_backbone."``, so that
      this fails.
    - "timm": a folder for ``timm.create_model("local-dir:PATH", pretrained=True)``, with configuration, safetensors,
      preprocessing and a model card.
    - "onnx": a graph from ``images`` (B, C, h, w) to ``features`` (B, F), for any B. Its metadata are strings:
      "input_spec" and "preprocessing" (JSON: size, mean, std, scale, interpolation, ``inside``), "embedding_dim",
      "model_digest", "format" and "package_version".
    - "torch_export": a program for `torch.export.load`, for any B, with the same metadata in "metadata.json" of
      ``extra_files``.
    - "onnx-int8": the graph with static int8 weights (per channel) and uint8 activations, calibrated on ``data``;
      operators that int8 would change too much stay in float and are named in the report.
    - "int4": the file of "state_dict" with the weights of linear layers in 4 bits, for `load_backbone`, which computes
      in float.

    A JSON report is written next to the file (``PATH.parity.json``, in a folder ``parity.json``), see `read_report`.
    Nothing is written if the features differ by more than ``tolerance``. The model is not modified. ONNX and int4 need
    the extra: ``pip install 'lightning_contrast[export]'``.

    Source: `torch.onnx.export`, `torch.export`, onnxruntime's ``quantize_static``, torchao.

    Args:
        model: A method of this package, whose ``backbone`` is exported (for masked vision transformers the timm
            network), or any network. Heads, including the part of SimCLR v2's head that its ``forward`` may include,
            are not exported. For the teacher of DINO, as in the paper, pass ``model.momentum_backbone``.
        path: Path of the file, of the folder for "timm"; missing folders are created.
        format: See above.
        input_spec: Specification of the images: ``{"size", "mean", "std"}``, mean and std None for images that are only
            scaled to 0..1, and where they differ "scale", "window", "indices" and "interpolation" (see
            `ViewPolicy.input_spec`). None uses that of the `ViewAugmentation` of the model's Trainer, or the model's
            own. Checkpoints of a run with this callback contain it under "input_spec".
            `augment.ViewPolicy.from_input_spec` prepares images by it.
        preprocess: Put scaling and normalization into the graph, which then takes uint8 images (B, C, h, w); they still
            have to be resized. For "onnx", "torch_export" and "onnx-int8".
        data: Images for the comparison, and for "onnx-int8" (required) the calibration: a DataModule (its validation
            images, else its training images), a loader without views, or images (N, C, H, W). Labels add k-NN before
            and after. None compares 16 images of random pixels.
        images: Largest number of images that are compared, >= 1.
        calibration_images: Number of images of the calibration, >= 1. They are drawn at random and not compared; of
            fewer data, half are.
        prune: Share of the channels of each layer that `prune_channels` sets to 0 in a copy first, in [0, 1).
        group_size: Weights that share a scale in "int4": 32, 64, 128 or 256.
        tolerance: Largest fall of the first percentile of the cosines, and of the k-NN accuracy (one query is allowed
            in any case), in 0..1; for formats in float without pruning also the largest difference of a feature, as a
            share of the largest. None is 1e-4 for these and 0.01 for int8, int4 and pruning.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is unknown or out of range, ``path`` is a folder where a file is written or the
            reverse, ``input_spec`` is missing, incomplete or not an input of the backbone, the model is sharded, or the
            format cannot hold the network.
        TypeError: If the model is not a module, or ``data`` no images.
        ModuleNotFoundError: If the extra is not installed.
        RuntimeError: If the features of the file differ from those of the backbone.

    Example:
        >>> network = lc.nn.build_backbone("small_convnet").module
        >>> spec = {"size": 32, "mean": None, "std": None}
        >>> export(network, "net.onnx", format="onnx", input_spec=spec)  # doctest: +SKIP
        PosixPath('net.onnx')
    """
    _check(format, preprocess, data, images, calibration_images, prune)
    backbone = backbone_of(model)
    spec = input_of(model, input_spec)
    path = Path(path)
    fits = not path.exists() or path.is_dir() == (format == "timm")
    kind = "a folder" if format == "timm" else "a file"
    require(fits, "path", f"be {kind} for format={format!r}", str(path), "Choose another path")
    lossy = format in ("onnx-int8", "int4") or prune > 0
    bound = check_tolerance(tolerance, LOSSY if lossy else EXACT)
    if format in ("onnx", "onnx-int8"):
        graphs.require_onnx()
    channels = count_channels(backbone, spec)
    before = float_copy(backbone)
    source = backbone if prune == 0 else prune_channels(backbone, prune)
    count = images + (calibration_images if format == "onnx-int8" else 0)
    options: dict[str, Any] = {"channels": channels, "count": count, "pixels": preprocess}
    compared = read_samples(data, spec, **options)
    calibration = None
    if format == "onnx-int8":
        calibration, compared = split_calibration(compared, calibration_images)
    reference: nn.Module = PixelInput(before, spec).eval() if preprocess else before
    expected = _features(reference, compared.inputs, spec)

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        folder = Path(name)
        target = folder / "result" / path.name
        target.parent.mkdir()
        network = float_copy(source)
        if format in _GRAPHS:
            runnable: nn.Module = PixelInput(network, spec).eval() if preprocess else network
            metadata = as_json(
                {
                    INPUT_SPEC: spec,
                    "preprocessing": preprocessing(spec, inside=preprocess),
                    "embedding_dim": expected.shape[1],
                    "model_digest": model_digest(source, format, calibration and calibration.inputs, bound),
                    "format": format,
                    "package_version": __version__,
                }
            )
            written = write_graph(
                runnable, target, format, ("images", "features"), metadata, compared.inputs[:2], calibration, bound
            )
        elif format == "timm":
            target.mkdir()
            timm_folder.write_folder(source, target, spec, channels)
            written = Written(timm_folder.load_folder(target), [], {})
        else:
            written, network = _write_weights(source, target, spec, group_size if format == "int4" else None)
        report = compare(
            format,
            reference,
            written.runner,
            compared,
            tolerance=bound,
            network=before,
            written=network,
            size=size_of(target),
            quantized=written.quantized,
            left_in_float=written.left_in_float,
            expected=expected,
        )
        check_parity(report, exact=not lossy)
        if format == "timm":
            timm_folder.write_card(target, report, {"pruned channels": prune} if prune else {})
        publish(target, path, report)
    return path


def _check(format: str, preprocess: bool, data: Any, images: int, calibration_images: int, prune: float) -> None:
    check_choice("format", format, _FORMATS)
    check_share("prune", prune)
    check_at_least("images", images, 1)
    check_at_least("calibration_images", calibration_images, 1)
    hint = "Weights hold no preprocessing; choose 'onnx', 'torch_export' or 'onnx-int8'"
    require(format in _GRAPHS or not preprocess, "preprocess", f"be False for format={format!r}", preprocess, hint)
    hint = "Give a DataModule, a loader or images (N, C, H, W), by which the ranges are measured"
    require(format != "onnx-int8" or data is not None, "data", "be given for format='onnx-int8'", None, hint)


def _features(network: nn.Module, inputs: Tensor, spec: Mapping[str, Any]) -> Tensor:
    """Return the features ``(N, F)`` of the network, or say why the images are not its input."""
    try:
        found = run_all(network, inputs)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        fail(INPUT_SPEC, "be the input of the backbone", dict(spec), f"The backbone raises {reason}")
    require(found.ndim == 2, "model", "return features (B, F)", tuple(found.shape), "Wrap it, or give its `backbone`")
    return found


def split_calibration(samples: Samples, count: int) -> tuple[Samples, Samples]:
    """Return ``count`` samples for the calibration, of fewer than twice as many half of them, and all others.

    Raises:
        ValueError: If there are fewer than 16 samples.
    """
    total = len(samples.inputs)
    hint = "8 images calibrate and 8 others are compared, at least"
    require(total >= 2 * _SMALLEST, "data", f"hold at least {2 * _SMALLEST} images", total, hint)
    return samples.split(min(count, total // 2))


def write_graph(
    network: nn.Module,
    target: Path,
    format: str,
    names: tuple[str, str],
    metadata: Mapping[str, str],
    example: Tensor,
    calibration: Samples | None,
    tolerance: float,
) -> Written:
    """Write a graph of a network that takes ``(B, ...)``.

    Args:
        network: Float network in eval mode, on the CPU.
        target: Path of the file.
        format: "onnx", "onnx-int8" or "torch_export".
        names: Names of the input and of the output.
        metadata: Strings for the file.
        example: An input, ``(1, ...)`` or ``(2, ...)``.
        calibration: Inputs of the calibration for "onnx-int8".
        tolerance: Bound of the search for int8 operators.
    """
    example = torch.cat([example, example])[:2]
    if format == "torch_export":
        graphs.write_program(network, example, target, metadata)
        return Written(graphs.program_runner(target), [], {})
    folder = target.parents[1]
    first = target if calibration is None else folder / "float.onnx"
    graphs.write_onnx(network, example, first, names)
    found = int8.Quantized([], {})
    if calibration is not None:
        found = int8.quantize(first, target, calibration.inputs, folder=folder, tolerance=tolerance)
    graphs.add_metadata(target, metadata)
    return Written(graphs.onnx_runner(target), found.kinds, found.left_in_float)


def _write_weights(
    source: nn.Module, target: Path, spec: Mapping[str, Any], group_size: int | None
) -> tuple[Written, nn.Module]:
    """Write a file of `load_backbone`; return it as it is loaded, and the network whose weights it holds."""
    levels: dict[str, dict[str, Any]] = {}
    if group_size is not None:
        source, levels = int4.round_to_int4(source, group_size)
    saved = pack_weights(source, spec)
    torch.save(add_int4(saved, levels) if levels else saved, target)
    built_by_name = load_checkpoint(target)[ARCHITECTURE]["name"] is not None
    blank = None
    if not built_by_name:
        blank = copy.deepcopy(source)
        remove_auxiliary_batchnorm(blank)  # files do not hold it
        with torch.no_grad():
            for parameter in blank.parameters():
                parameter.zero_()
    loaded = load_backbone(target, blank).float().cpu().eval()
    return Written(loaded, [name.removesuffix(".weight") for name in levels], {}), source


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def publish(target: Path, path: Path, report: ParityReport) -> None:
    """Move a finished file or folder to its place, write its report and log it.

    Args:
        target: The file or folder, on the same disk.
        path: Its place; an older file, or files of the same names in an older folder, are replaced.
        report: The report.
    """
    report.save(target)
    move: Callable[[Path, Path], Any] = Path.replace
    if target.is_dir():
        path.mkdir(exist_ok=True)
        for file in target.iterdir():
            move(file, path / file.name)
    else:
        for file in target.parent.iterdir():
            move(file, path.with_name(file.name))
    rank_zero_info(f"Exported {path}: p1 cosine {report.cosine_p1:.6f} on {report.source}; `read_report` has the rest.")

"""Export of the two encoders of an image-text model."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast._version import __version__
from lightning_contrast.export import graphs
from lightning_contrast.export.backbone import LOSSY, publish, size_of, split_calibration, write_graph
from lightning_contrast.export.parity import EXACT, ParityReport, as_json, check_parity, check_tolerance, compare
from lightning_contrast.export.samples import Samples, read_samples
from lightning_contrast.export.source import check_whole, float_copy, input_of, model_digest, preprocessing
from lightning_contrast.exported import INPUT_SPEC, count_channels
from lightning_contrast.nn.tokenizer_spec import tokenizer_spec

_RANDOM_TEXTS = 16


def export_towers(
    model: nn.Module,
    folder: str | Path,
    *,
    format: Literal["onnx", "onnx-int8"] = "onnx",
    input_spec: Mapping[str, Any] | None = None,
    data: Any = None,
    images: int = 512,
    calibration_images: int = 128,
    tolerance: float | None = None,
) -> tuple[Path, Path]:
    """Export the two encoders of an image-text model as ONNX graphs, each with its parity report.

    ``image.onnx`` maps ``images`` (B, C, h, w), float32 and normalized with the mean and std, to ``embeddings``
    (B, D) of unit length, as ``model.encode_image`` does; ``text.onnx`` maps ``tokens`` (B, L), int64, to
    ``embeddings`` (B, D), as ``model.encode_text`` does with tokens. B is free, and for `nn.TextTransformer` also L up
    to its context length; other text towers take the context length. The tokenizer is not part of the graph. The
    metadata are those of `export`, of ``text.onnx`` "context_length" and "tokenizer" (kind and arguments of one of this
    package, else null) instead of the preprocessing; "model_digest" is the same in both, since only embeddings of one
    pair are compared. Nothing is written if one of the two differs by
    more than the tolerance. Needs the extra: ``pip install 'lightning_contrast[export]'``.

    Args:
        model: A `CLIP` or `SigLIP`; it is not modified.
        folder: Folder of the files; it is created.
        format: "onnx", or "onnx-int8" as in `export`.
        input_spec: As in `export`.
        data: Pairs for the comparison and the calibration: a DataModule or a loader of (images, texts), or with
            "image" and "text". None compares random pixels and tokens.
        images: As in `export`; the same number of texts.
        calibration_images: As in `export`; the same number of texts.
        tolerance: As in `export`, for each tower.

    Returns:
        The paths of ``image.onnx`` and ``text.onnx``.

    Raises:
        TypeError: If the model is no image-text model, or its text tower has no ``context_length`` or ``vocab_size``.
        ValueError: If ``input_spec`` is missing or incomplete, the model is sharded, or data for int8 are missing.
        ModuleNotFoundError: If the extra is not installed.
        RuntimeError: If the embeddings of a graph differ from those of the model.
    """
    check_choice("format", format, ("onnx", "onnx-int8"))
    check_at_least("images", images, 1)
    check_at_least("calibration_images", calibration_images, 1)
    hint = "Give a DataModule or a loader of (images, texts), by which the ranges are measured"
    require(format == "onnx" or data is not None, "data", "be given for format='onnx-int8'", None, hint)
    model = cast("nn.Module", getattr(model, "_orig_mod", model))
    parts = [getattr(model, f"{kind}_projection", None) for kind in ("image", "text")]
    towers = [getattr(model, "backbone", None), getattr(model, "text_backbone", None)]
    if not all(isinstance(part, nn.Module) for part in (*parts, *towers)):
        fail("model", "be an image-text model", type(model).__name__, "Give a `CLIP` or `SigLIP`", TypeError)
    length, vocabulary = (_size_of(towers[1], name) for name in ("context_length", "vocab_size"))
    spec = input_of(model, input_spec)
    check_whole(model)
    bound = check_tolerance(tolerance, EXACT if format == "onnx" else LOSSY)
    graphs.require_onnx()
    encoders = [float_copy(_Encoder(*pair)) for pair in zip(towers, parts, strict=True)]  # type: ignore[arg-type]
    count = images + (calibration_images if format == "onnx-int8" else 0)
    channels = count_channels(encoders[0], spec)
    pairs = read_samples(data, spec, channels=channels, count=count)
    calibrating = split_calibration(pairs, calibration_images)[0].inputs if format == "onnx-int8" else None
    common = {
        "model_digest": model_digest(nn.ModuleList(encoders), format, calibrating, bound),
        "format": format,
        "package_version": __version__,
    }
    tokenizer = tokenizer_spec(getattr(model, "tokenizer", None))
    metadata: list[dict[str, Any]] = [
        {INPUT_SPEC: spec, "preprocessing": preprocessing(spec, inside=False)},
        {"context_length": length, "tokenizer": tokenizer},
    ]
    given = [pairs, _tokens(model, pairs, length, vocabulary)]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "image.onnx", folder / "text.onnx")
    with tempfile.TemporaryDirectory(prefix=".towers.", dir=folder) as name:
        done: list[tuple[Path, Path, ParityReport]] = []
        for path, encoder, samples, own in zip(paths, encoders, given, metadata, strict=True):
            target = Path(name) / path.stem / "result" / path.name
            target.parent.mkdir(parents=True)
            calibration, compared = None, samples
            if format == "onnx-int8":
                calibration, compared = split_calibration(samples, calibration_images)
            names = ("images" if path is paths[0] else "tokens", "embeddings")
            with torch.no_grad():
                width = encoder(compared.inputs[:1]).shape[1]
            texts = as_json(own | common | {"embedding_dim": width})
            written = write_graph(encoder, target, format, names, texts, compared.inputs[:2], calibration, bound)
            report = compare(
                format,
                encoder,
                written.runner,
                compared,
                tolerance=bound,
                network=encoder,
                written=encoder,
                size=size_of(target),
                quantized=written.quantized,
                left_in_float=written.left_in_float,
            )
            check_parity(report, exact=format == "onnx")
            done.append((target, path, report))
        for target, path, report in done:
            publish(target, path, report)
    return paths


def _tokens(model: Any, pairs: Samples, length: int, vocabulary: int) -> Samples:
    """Return the tokens ``(N, L)`` of the texts of the data, padded with 0 to the context length, or random ones."""
    if pairs.texts is None:
        hint = "Give a loader of (images, texts)"
        require(pairs.source.endswith("random pixels"), "data", "have texts", pairs.source, hint)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, vocabulary, (_RANDOM_TEXTS, length), generator=generator)
        return Samples(tokens, None, f"{_RANDOM_TEXTS} texts of random tokens")
    tokens = (pairs.texts if isinstance(pairs.texts, Tensor) else model.tokenizer(pairs.texts)).cpu()
    tokens = nn.functional.pad(tokens, (0, length - tokens.shape[1]))
    return Samples(tokens, None, pairs.source.replace("images", "texts", 1))


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

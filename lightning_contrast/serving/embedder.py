"""Models from files as functions from images and texts to vectors, with digests of the model and its preprocessing."""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_captions, fail, require
from lightning_contrast.augment import ViewPolicy
from lightning_contrast.augment.images import check_input_spec
from lightning_contrast.evaluation import load_subject
from lightning_contrast.export.source import pixel_spec
from lightning_contrast.exported import INPUT_SPEC, count_channels
from lightning_contrast.metrics.zero_shot import eval_mode
from lightning_contrast.nn.byte_tokenizer import Tokenizer
from lightning_contrast.nn.frozen_teacher import weights_digest
from lightning_contrast.nn.tokenizer_spec import build_tokenizer, tokenizer_spec

Vectors = NDArray[np.float32]
_EXTRA = "pip install 'lightning_contrast[serve]'"
_KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}  # of an input
_GRAPH, _TEXT_GRAPH = "image.onnx", "text.onnx"


class Embedder:
    """Map images and texts to vectors, one row each, as the model outputs them.

    Args:
        run: Maps prepared images (B, C, h, w), float32, to vectors (B, D).
        input_spec: Specification of the images, see `ViewPolicy.input_spec`.
        model_digest: Digest of the weights.
        channels: Channels of the images if the mean is None: 3, or 1 for gray images.
        encode_texts: Maps B texts to vectors (B, D); None for a model without a text tower.
        takes_pixels: Whether the model scales and normalizes the images itself: it is given uint8 images (B, C, h, w).

    Attributes:
        dim: D.
        size: Height and width of the prepared images, in pixels.
        input_spec: As given.
        model_digest: As given, a hexadecimal number.
        preprocessing_digest: Digest of the specification.
        has_texts: Whether there is a text tower.

    Raises:
        ValueError: If the model does not take 8-bit RGB or gray images prepared in this way, or its output is not one
            finite vector per image.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Vectors],
        input_spec: Any,
        *,
        model_digest: str,
        channels: int = 3,
        encode_texts: Callable[[list[str]], Vectors] | None = None,
        takes_pixels: bool = False,
    ) -> None:
        self.input_spec = check_input_spec(input_spec)
        done_here = pixel_spec(self.input_spec) if takes_pixels else self.input_spec
        policy = ViewPolicy.from_input_spec(done_here, channels=channels)
        hint = "Pictures have 3 channels, or 1 for gray ones"
        require(policy.channels in (1, 3), "model", "take images of 3 channels or 1", policy.channels, hint)
        self._policy, self._run, self._encode_texts = policy, run, encode_texts
        self.size = (policy.height, policy.width)
        self.model_digest = model_digest
        self._takes_pixels = takes_pixels
        facts = [self.input_spec, policy.channels, takes_pixels]
        self.preprocessing_digest = _digest(json.dumps(facts).encode())
        self.has_texts = encode_texts is not None
        dots = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
        self.dim = 0
        self.dim = self.embed_images([dots, dots.flip(2)]).shape[1]
        if encode_texts is not None:
            width = self.embed_texts(["a"]).shape[1]
            require(width == self.dim, "model", "have one width of both towers", (self.dim, width), "Export it again")

    def prepare(self, pixels: Tensor) -> Tensor:
        """Return an image (3, H, W), uint8, as the model takes it: (C, h, w), float32 or, of pixels, uint8."""
        given = pixels[None]
        if self._policy.channels == 1:
            weights = torch.tensor([0.299, 0.587, 0.114])  # of luma, as Pillow's "L"
            given = (given.float() * weights.view(3, 1, 1)).sum(1, keepdim=True).round().to(torch.uint8)
        found = self._policy.eval_transform(given)[0]
        if not self._takes_pixels:
            return found
        low, high = self._policy.scale or (0.0, 255.0)
        return (found * (high - low) + low).round().to(torch.uint8)

    def embed_prepared(self, images: Sequence[Tensor]) -> Vectors:
        """Return the vectors (B, D), float32, of B images (C, h, w) that were prepared.

        Raises:
            ValueError: If the model's output is not one finite vector per image.
        """
        found = np.asarray(self._run(torch.stack(list(images))), dtype=np.float32)
        ok = found.ndim == 2 and len(found) == len(images) and found.shape[1] == (self.dim or found.shape[1])
        hint = "Export a backbone that maps images (B, C, h, w) to features (B, D)"
        require(ok, "model", "output one vector per image", found.shape, hint)
        hint = "Check the weights of the model"
        require(bool(np.isfinite(found).all()), "model", "output finite vectors", "NaN or infinity", hint)
        return found

    def embed_images(self, images: Sequence[Tensor]) -> Vectors:
        """Return the vectors (B, D), float32, of B images (3, H, W), uint8, of any sizes."""
        return self.embed_prepared([self.prepare(image) for image in images])

    def embed_texts(self, texts: list[str]) -> Vectors:
        """Return the vectors (B, D), float32, of B texts.

        Raises:
            ValueError: If the model has no text tower or a text is empty.
            TypeError: If the texts are not a list of str.
        """
        if self._encode_texts is None:
            hint = "Give the folder of `export_towers`, or an image-text module"
            fail("model", "have a text tower for texts", "a model of images alone", hint)
        return np.asarray(self._encode_texts(check_captions(texts)), dtype=np.float32)


def open_embedder(
    model: "str | Path | nn.Module | Embedder",
    *,
    tokenizer: Tokenizer | None = None,
    input_spec: Any = None,
    threads: int | None = None,
) -> Embedder:
    """Return the `Embedder` of a model.

    ONNX graphs run in ONNX Runtime on the CPU: ``pip install 'lightning_contrast[serve]'``. Files of weights are read
    with ``weights_only=True``; nothing is unpickled.

    Args:
        model: An ONNX graph (".onnx") by `export.export`, with the ``input_spec`` in its metadata; a folder by
            `export_towers`, or its ``image.onnx``, for images and texts; an exported backbone (".pt") or a checkpoint
            (".ckpt") of a method whose backbone was given by name; a module; or an `Embedder`, which is returned.
        tokenizer: Function of a list of B str that returns int64 tokens (B, L), for the graph of a text tower; None is
            the one that its file names. Any other model has its own. A tokenizer of this package is part of the digest
            of the model by its settings, another one by its name alone.
        input_spec: Specification of the images, for a module or a file without it.
        threads: Threads of ONNX Runtime in an operator, >= 1; None for one per core.

    Raises:
        ValueError: If the file is not such a model, its ``input_spec`` or its tokenizer is unknown, a tokenizer is
            given for anything but the graph of a text tower, ``threads`` is out of its range, or the model does not map
            8-bit images to vectors.
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If ONNX Runtime is needed and not installed.
        TypeError: If ``model`` is none of these.
    """
    if threads is not None:
        check_at_least("threads", threads, 1)
    if isinstance(model, Embedder):
        _check_no_tokenizer(tokenizer, "an Embedder")
        return model
    if isinstance(model, nn.Module):
        _check_no_tokenizer(tokenizer, "a module")
        return _of_module(model, input_spec, weights_digest(model))
    if not isinstance(model, str | Path):
        fail("model", "be a path or a module", type(model).__name__, "Give the path of an ONNX graph", TypeError)
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(f"There is no model {path}.")
    graph = path / _GRAPH if path.is_dir() else path
    if not path.is_dir() and path.suffix in (".pt", ".pth", ".ckpt"):
        _check_no_tokenizer(tokenizer, f"a {path.suffix} file")
        subject = load_subject(path)
        return _of_module(subject.module, input_spec or subject.input_spec, weights_digest(subject.module))
    hint = "Give an .onnx file of `export.export`, a folder of `export_towers`, or a .pt or .ckpt file"
    require(graph.suffix == ".onnx" and graph.is_file(), "model", "be a model file", str(path), hint)
    return _of_graph(graph, tokenizer, input_spec, threads)


def _check_no_tokenizer(tokenizer: Tokenizer | None, model: str) -> None:
    hint = "Give a tokenizer for the graph of a text tower alone; a module has its own"
    require(tokenizer is None, "tokenizer", f"be None for {model}", tokenizer, hint)


def _of_module(module: nn.Module, spec: Any, weights: int) -> Embedder:
    """Return the embedder of a module: an image-text one with both towers, of any other its output."""
    subject = load_subject(module)
    spec = subject.input_spec if spec is None else spec
    hint = "Give `input_spec=`, or a file that holds it"
    require(spec is not None, "model", "have a known `input_spec`", subject.source, hint)
    encode: Any = getattr(module, "encode_image", module)
    encode_text: Any = getattr(module, "encode_text", None)
    device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
    lock = threading.Lock()  # the mode of the module is that of all threads

    def run(images: Tensor) -> Vectors:
        """Return the vectors (B, D) of images (B, C, h, w)."""
        with lock, eval_mode(module), torch.no_grad():
            return encode(images.to(device)).float().cpu().numpy()  # type: ignore[no-any-return]

    def run_texts(texts: list[str]) -> Vectors:
        with lock, eval_mode(module), torch.no_grad():
            return encode_text(texts).float().cpu().numpy()  # type: ignore[no-any-return]

    return Embedder(
        run,
        spec,
        model_digest=_digest(f"{weights} {type(module).__qualname__} {module!r}".encode()),
        channels=count_channels(module, check_input_spec(spec)),
        encode_texts=None if encode_text is None else run_texts,
    )


def _of_graph(path: Path, tokenizer: Tokenizer | None, spec: Any, threads: int | None) -> Embedder:
    """Return the embedder of an ONNX graph and of the text tower in its folder."""
    session = _open_session(path, threads)
    metadata = session.get_modelmeta().custom_metadata_map
    if spec is None:
        hint = "Export it by `export.export`, or give `input_spec=`"
        require(INPUT_SPEC in metadata, "model", f"have the metadata {INPUT_SPEC!r}", str(path), hint)
        spec = _read_json(metadata[INPUT_SPEC], INPUT_SPEC)
    given = session.get_inputs()[0]
    kind = _KINDS.get(given.type)
    hint = "Export a backbone, which takes floats or uint8"
    require(kind is not None and len(given.shape) == 4, "model", "take images (B, C, h, w)", given.type, hint)
    channels = given.shape[1] if isinstance(given.shape[1], int) else 3
    files, reads = [path], "None"
    encode_texts = None
    if path.name == _GRAPH and (text_path := path.parent / _TEXT_GRAPH).is_file():
        text_session = _open_session(text_path, threads)
        read = _saved_tokenizer(text_session, text_path) if tokenizer is None else tokenizer
        files, reads = [path, text_path], _tokenizer_facts(read)
        encode_texts = _text_encoder(text_session, read)
    else:
        _check_no_tokenizer(tokenizer, "a graph without a text tower")

    def run(images: Tensor) -> Vectors:
        return session.run(None, {given.name: images.numpy().astype(kind, copy=False)})[0]  # type: ignore[no-any-return]

    return Embedder(
        run,
        spec,
        model_digest=_digest(*(file_digest(file) for file in files), reads.encode()),
        channels=channels,
        encode_texts=encode_texts,
        takes_pixels=kind is np.uint8,
    )


def _saved_tokenizer(session: Any, path: Path) -> Tokenizer:
    """Return the tokenizer that the file of a text tower names."""
    saved = _read_json(session.get_modelmeta().custom_metadata_map.get("tokenizer", "null"), "tokenizer")
    hint = f"{path} does not name one: give the tokenizer of the training"
    require(isinstance(saved, dict), "tokenizer", "be given for this text tower", None, hint)
    return build_tokenizer(saved)


def _tokenizer_facts(tokenizer: Tokenizer) -> str:
    """Return what is known of a tokenizer: its settings, or the name of a function or a class."""
    spec = tokenizer_spec(tokenizer)
    if spec is not None:
        return json.dumps(spec, sort_keys=True)
    named: Any = tokenizer if hasattr(tokenizer, "__qualname__") else type(tokenizer)
    return f"{named.__module__}.{named.__qualname__}"


def _text_encoder(session: Any, read: Tokenizer) -> Callable[[list[str]], Vectors]:
    """Return the function from texts to vectors (B, D) of the graph of a text tower."""
    given = session.get_inputs()[0]
    length = given.shape[1]

    def encode(texts: list[str]) -> Vectors:
        tokens = read(texts)
        if isinstance(length, int):  # a tower of a fixed context length
            tokens = nn.functional.pad(tokens[:, :length], (0, max(0, length - tokens.shape[1])))
        return session.run(None, {given.name: tokens.numpy()})[0]  # type: ignore[no-any-return]

    return encode


def _open_session(path: Path, threads: int | None) -> Any:
    """Return the session of ONNX Runtime of a graph."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ModuleNotFoundError(f"ONNX graphs run in onnxruntime: {_EXTRA}.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        raise ValueError(f"`model` must be an ONNX graph, got {str(path)!r}. {str(error).splitlines()[0]}") from error


def file_digest(path: Path) -> bytes:
    """Return the digest of a file, with that of ONNX weights in a file of their own (".onnx.data")."""
    found = hashlib.blake2b(digest_size=16)
    for part in (path, path.with_name(f"{path.name}.data")):
        if part == path or part.is_file():
            with part.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.digest()


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _read_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        fail(name, "be JSON in the metadata of the model", text[:80], "Export it again")

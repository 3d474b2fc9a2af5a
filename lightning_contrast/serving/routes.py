"""Routes of the similarity service."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, File, Form, UploadFile
from numpy.typing import NDArray
from prometheus_client import Gauge, Histogram
from pydantic import BaseModel, Field

from lightning_contrast.serving.batching import Batcher, FullError
from lightning_contrast.serving.embedder import Embedder
from lightning_contrast.serving.http import (
    ERRORS,
    RequestError,
    check_texts,
    in_time,
    new_app,
    read_uploads,
    refused,
)
from lightning_contrast.serving.limits import Limits
from lightning_contrast.serving.pictures import RefusedImageError, decode_image

Image = Annotated[UploadFile, File(description="An image file: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM")]
Images = Annotated[list[UploadFile], File(description="Image files", min_length=1)]
Vector = NDArray[np.float32]
_DESCRIPTION = "Embeddings of images and cosine similarities of pairs. Images are sent as multipart forms."


class Embedding(BaseModel):
    """One vector."""

    embedding: list[float] = Field(description="The model's output, not normalized")
    model: str = Field(description="Digest of the model")


class Embeddings(BaseModel):
    """One vector per image or text, in their order."""

    embeddings: list[list[float]] = Field(description="The model's outputs, not normalized")
    model: str = Field(description="Digest of the model")


class Similarity(BaseModel):
    """The cosine of two vectors."""

    cosine: float = Field(ge=-1, le=1)
    model: str = Field(description="Digest of the model")


class Texts(BaseModel):
    """Texts to embed."""

    texts: list[str] = Field(min_length=1, description="Texts; the tokenizer cuts those beyond the model's context")


class ModelFacts(BaseModel):
    """The model and what it accepts."""

    model: str = Field(description="Digest of the model")
    preprocessing: str = Field(description="Digest of the preprocessing")
    dim: int = Field(description="Length of a vector")
    size: list[int] = Field(description="Height and width of the prepared images, in pixels")
    texts: bool = Field(description="Whether texts have vectors too")
    limits: dict[str, float]


def build_app(embedder: Embedder, limits: Limits, *, max_batch: int, max_delay: float) -> FastAPI:
    """Return the application of a similarity service, see `create_app`.

    Args:
        embedder: The model.
        limits: Limits of requests.
        max_batch: Largest batch of the model.
        max_delay: Time that an image waits for others, in seconds.
    """

    def prepare(data: bytes) -> Any:
        return embedder.prepare(decode_image(data, size=embedder.size, max_pixels=limits.max_pixels))

    def note(size: int, seconds: float) -> None:
        sizes.observe(size)
        durations.observe(seconds)

    batching: dict[str, Any] = {"max_batch": max_batch, "max_delay": max_delay}
    batching["max_waiting"] = max(limits.max_waiting, limits.max_images)  # those of a request are taken together
    image_queue: Batcher[bytes, Any] = Batcher(prepare, embedder.embed_prepared, on_batch=note, **batching)
    batching["max_waiting"] = max(limits.max_waiting, limits.max_texts)
    text_queue: Batcher[str, str] = Batcher(str, lambda batch: embedder.embed_texts(list(batch)), **batching)

    def stop() -> None:
        image_queue.close()
        text_queue.close()

    app, registry = new_app("Similarity service", _DESCRIPTION, limits, on_stop=stop)
    buckets = [2**power for power in range(9)]
    sizes = Histogram("batch_size", "Images of a batch of the model", buckets=buckets, registry=registry)
    durations = Histogram("batch_seconds", "Time of the model for a batch", registry=registry)
    gauge = Gauge("images_at_work", "Images that are decoded, wait or run", registry=registry)
    gauge.set_function(lambda: image_queue.at_work)

    async def vectors(files: Sequence[UploadFile], fields: Sequence[str]) -> list[Vector]:
        contents = await read_uploads(files, limits, fields[0])
        found = await in_time(asyncio.ensure_future(_results(image_queue, contents)), limits)
        return _checked(found, fields)

    async def text_vectors(given: Sequence[str], field: str) -> list[Vector]:
        words = check_texts(given, limits, field)
        found = await in_time(asyncio.ensure_future(_results(text_queue, words)), limits)
        return _checked(found, [field])

    @app.get("/model", summary="The model and the limits", operation_id="model")
    async def model() -> ModelFacts:
        return ModelFacts(
            model=embedder.model_digest,
            preprocessing=embedder.preprocessing_digest,
            dim=embedder.dim,
            size=list(embedder.size),
            texts=embedder.has_texts,
            limits=vars(limits),
        )

    @app.post("/embed", summary="The vector of one image", responses=ERRORS, operation_id="embed")
    async def embed(image: Image) -> Embedding:
        (vector,) = await vectors([image], ["image"])
        return Embedding(embedding=vector.tolist(), model=embedder.model_digest)

    @app.post("/embed/batch", summary="The vectors of several images", responses=ERRORS, operation_id="embed_batch")
    async def embed_batch(images: Images) -> Embeddings:
        found = await vectors(images, [f"images.{place}" for place in range(len(images))])
        return Embeddings(embeddings=[vector.tolist() for vector in found], model=embedder.model_digest)

    @app.post("/similarity", summary="The cosine of two images", responses=ERRORS, operation_id="similarity")
    async def similarity(first: Image, second: Image) -> Similarity:
        pair = await vectors([first, second], ["first", "second"])
        return Similarity(cosine=cosine(*pair), model=embedder.model_digest)

    if embedder.has_texts:

        @app.post("/embed/text", summary="The vectors of texts", responses=ERRORS, operation_id="embed_text")
        async def embed_text(given: Texts) -> Embeddings:
            found = await text_vectors(given.texts, "texts")
            return Embeddings(embeddings=[vector.tolist() for vector in found], model=embedder.model_digest)

        @app.post(
            "/similarity/text", summary="The cosine of an image and a text", responses=ERRORS, operation_id="text_pair"
        )
        async def similarity_to_text(image: Image, text: Annotated[str, Form()]) -> Similarity:
            (words,) = await text_vectors([text], "text")
            (picture,) = await vectors([image], ["image"])
            return Similarity(cosine=cosine(picture, words), model=embedder.model_digest)

    return app


def cosine(first: Vector, second: Vector) -> float:
    """Return the cosine of two vectors (D,), in -1..1.

    Raises:
        RequestError: If one of them is 0, whose cosine is not defined.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    if length == 0:
        raise RequestError(422, "zero_vector", "The model's output for one of the two is 0: its cosine is not defined.")
    return float(np.clip(a @ b / length, -1, 1))


async def _results(batcher: Batcher[Any, Any], items: Sequence[Any]) -> list[Any]:
    """Return the results or refusals of items; if the caller is cancelled, those that did not begin are too."""
    futures: list[Future[Any]] = batcher.submit(items)
    try:
        return await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    finally:
        for future in futures:
            future.cancel()


def _checked(found: Sequence[Any], fields: Sequence[str]) -> list[Vector]:
    """Return the vectors (D,) among the results, or raise the first error."""
    for place, value in enumerate(found):
        if isinstance(value, RefusedImageError):
            raise refused(value, fields[min(place, len(fields) - 1)])
        if isinstance(value, FullError):
            raise RequestError(503, "busy", str(value))
        if isinstance(value, BaseException):
            raise value
    return list(found)

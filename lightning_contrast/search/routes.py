"""Routes of the search page."""

import asyncio
import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI, File, Form, UploadFile
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse, Response
from PIL import Image
from pydantic import BaseModel, Field

from lightning_contrast.search.index import FILE_PIXELS, ImageIndex, content_digest
from lightning_contrast.search.store import quoted
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

_PAGE = Path(__file__).parent / "templates" / "search.html"
_EDGE = 320  # longest side of a small picture, in pixels
_MOST = 100
_DIGEST = "^[0-9a-f]{32}$"
_NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: ERRORS[400] | {"description": "No image of the index has this digest"}
}
_DESCRIPTION = "Search a folder of images by words or images."
Digest = Annotated[str, InPath(pattern=_DIGEST, description="Digest of the content of an image of the index")]


class Found(BaseModel):
    """An image that was found."""

    path: str = Field(description="Path relative to the folder of the index")
    score: float = Field(ge=-1, le=1, description="Cosine to the query")
    digest: str = Field(description="Digest of the content, the address of the small picture")
    width: int
    height: int


class Hits(BaseModel):
    """The images with the highest cosine, highest first."""

    hits: list[Found]


class IndexFacts(BaseModel):
    """What can be searched."""

    images: int
    texts: bool = Field(description="Whether words can be searched")
    folders: dict[str, int] = Field(description="Number of images by folder")


def build_search_app(index: ImageIndex, limits: Limits) -> FastAPI:
    """Return the application of a search page, see `create_search_app`.

    Args:
        index: The index.
        limits: Limits of requests.
    """
    model = index.model_for("the page")
    has_texts = model.has_texts
    page = _PAGE.read_text(encoding="utf-8")
    app, _ = new_app("Image search", _DESCRIPTION, limits)
    slots = asyncio.Semaphore(8)  # searches and pictures in threads at a time

    async def in_thread(work: Any, *arguments: Any) -> Any:
        async def run() -> Any:
            async with slots:
                return await asyncio.to_thread(work, *arguments)

        try:
            return await in_time(asyncio.ensure_future(run()), limits)
        except RefusedImageError as error:
            raise refused(error, "image") from error
        except ValueError as error:  # of a query whose vector is 0
            raise RequestError(422, "invalid_query", str(error)) from error

    def of_upload(data: bytes) -> torch.Tensor:
        return decode_image(data, size=model.size, max_pixels=limits.max_pixels)

    def find(query: Any, k: int, folder: str | None) -> list[Found]:
        where = None if folder is None else f"folder = {quoted(folder)}"
        hits = index.search(query, k, where=where)
        return [
            Found(path=hit.path, score=hit.score, digest=hit.digest, width=hit.width, height=hit.height) for hit in hits
        ]

    def picture(digest: str) -> bytes:
        image = Image.fromarray(_image_of(index, digest).permute(1, 2, 0).numpy())
        image.thumbnail((_EDGE, _EDGE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        return file.getvalue()

    @app.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(page, headers=_security(page))

    @app.get("/index", summary="What can be searched", operation_id="facts")
    async def facts() -> IndexFacts:
        folders, images = await in_thread(lambda: (index.folders(), len(index)))
        return IndexFacts(images=images, texts=has_texts, folders=folders)

    @app.get(
        "/images/{digest}",
        summary="A small picture of an image of the index",
        response_class=Response,
        responses=ERRORS | _NOT_FOUND | {200: {"content": {"image/jpeg": {}}}},
        operation_id="image",
    )
    async def image(digest: Digest) -> Response:
        data = await in_thread(picture, digest)
        kept = {"cache-control": "private, max-age=86400, immutable", "x-content-type-options": "nosniff"}
        return Response(data, media_type="image/jpeg", headers=kept)

    @app.post("/search", summary="Search by words or an image", responses=ERRORS | _NOT_FOUND, operation_id="search")
    async def search(
        words: Annotated[str | None, Form(description="Words, of a model with a text tower")] = None,
        image: Annotated[UploadFile | None, File(description="An image file")] = None,
        digest: Annotated[str | None, Form(pattern=_DIGEST, description="Of an image of the index")] = None,
        folder: Annotated[
            str | None, Form(max_length=4096, description='Only images of this folder; the top is "."')
        ] = None,
        k: Annotated[int, Form(ge=1, le=_MOST, description="Number of hits")] = 24,
    ) -> Hits:
        if sum(query is not None for query in (words, image, digest)) != 1:
            raise RequestError(422, "one_query", "Give one of words, an image and a digest.")
        query: Any
        if image is not None:
            (data,) = await read_uploads([image], limits, "image")
            query = await in_thread(of_upload, data)
        elif words is not None:
            if not has_texts:
                raise RequestError(422, "no_texts", "The model of this index has no text tower.", "words")
            (query,) = check_texts([words], limits, "words")
        else:
            query = await in_thread(_image_of, index, digest)
        return Hits(hits=await in_thread(find, query, k, folder))

    return app


def _image_of(index: ImageIndex, digest: str) -> torch.Tensor:
    """Return the pixels (3, H, W), uint8, of the image of the index whose content has a digest."""
    path = index.path_of(digest)
    if path is None:
        raise RequestError(404, "not_found", "No image of the index has this digest.", "digest")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(404, "not_found", "The file is gone; update the index.", "digest") from error
    if content_digest(data) != digest:
        raise RequestError(404, "not_found", "The file has changed; update the index.", "digest")
    return decode_image(data, max_pixels=FILE_PIXELS)


def _security(page: str) -> dict[str, str]:
    """Return headers that let the browser run the page's own script and style only."""
    parts = {}
    for name in ("script", "style"):
        found = re.findall(rf"<{name}>(.*?)</{name}>", page, flags=re.S)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in found]
        parts[name] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {parts['script']}; style-src {parts['style']}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}

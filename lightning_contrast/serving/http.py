"""What the applications share: limits of bodies, structured errors, metrics, and uploads as pixels."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_contrast._version import __version__
from lightning_contrast.serving.batching import FullError
from lightning_contrast.serving.limits import Limits
from lightning_contrast.serving.pictures import RefusedImageError

Result = TypeVar("Result")
log = logging.getLogger("lightning_contrast.serving")

_STATUS = {"too_many_pixels": 413, "not_an_image": 415, "unsupported_pixels": 415}  # of refused images; others 422
_UNKNOWN = "(other)"  # the label of paths that are no route


class Problem(BaseModel):
    """What was wrong with a request."""

    code: str = Field(description="A word for programs")
    message: str = Field(description="A sentence for people")
    field: str | None = Field(None, description="The part of the request, if one is at fault")


class ErrorAnswer(BaseModel):
    """The body of every answer that is no success."""

    error: Problem


class Health(BaseModel):
    """The state of the service."""

    status: str


def _error(text: str) -> dict[str, Any]:
    return {"model": ErrorAnswer, "description": text}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: _error("The body cannot be parsed"),
    408: _error("The body did not arrive in time"),
    413: _error("The body or an image is too large"),
    415: _error("A file is not an image that can be read"),
    422: _error("A field is missing or has another type, or an image is damaged"),
    500: _error("An error of the service"),
    503: _error("Too many requests, or the answer took too long"),
}


class RequestError(HTTPException):
    """An answer that is no success.

    Args:
        status: Status of HTTP.
        code: A word for programs.
        message: A sentence for people.
        field: The part of the request that is at fault.
    """

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        headers = {"Retry-After": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
        super().__init__(status, message, headers)
        self.code, self.field = code, field


def refused(error: RefusedImageError, field: str) -> RequestError:
    """Return the answer for an image that was refused."""
    return RequestError(_STATUS.get(error.code, 422), error.code, str(error), field)


def new_app(
    title: str, description: str, limits: Limits, *, on_stop: Callable[[], object] = lambda: None
) -> tuple[FastAPI, CollectorRegistry]:
    """Return an application with limits, structured errors, ``/health`` and ``/metrics``, and its metrics.

    Args:
        title: Of the OpenAPI schema.
        description: Of the OpenAPI schema.
        limits: Limits of bodies and times.
        on_stop: Called once when the application stops, after the last request.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(on_stop)

    app = FastAPI(
        title=title, description=description, version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    registry = CollectorRegistry()
    app.add_middleware(RequestGuard, limits=limits, registry=registry)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_failure)

    @app.get("/health", summary="Whether the service runs")
    async def health() -> Health:
        return Health(status="ok")

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app, registry


class RequestGuard:
    """Middleware that limits bodies by size and time, and counts requests.

    Args:
        app: The application.
        limits: The limits.
        registry: Where the metrics are registered.
    """

    def __init__(self, app: ASGIApp, limits: Limits, registry: CollectorRegistry) -> None:
        self.app, self.limits = app, limits
        labels = ("path", "status")
        self.requests = Counter("http_requests", "Requests", labels, registry=registry)
        self.seconds = Histogram("http_request_seconds", "Time to the end of the answer", ("path",), registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        left: int | None = self.limits.max_body
        deadline = start + self.limits.seconds

        async def limited() -> Message:
            nonlocal left
            try:
                async with asyncio.timeout(max(0.0, deadline - time.perf_counter()) if left is not None else None):
                    message = await receive()
            except TimeoutError:
                text = f"The body did not arrive within {self.limits.seconds:g} s."
                raise RequestError(408, "body_too_slow", text) from None
            if message["type"] == "http.request" and left is not None:
                left -= len(message.get("body", b""))
                if left < 0:
                    raise too_large
                if not message.get("more_body", False):
                    left = None  # what follows is the end of the connection, for which there is no limit
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        text = f"The body has more than {self.limits.max_body} bytes."
        too_large = RequestError(413, "body_too_large", text)
        try:
            declared = dict(scope["headers"]).get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > self.limits.max_body:
                await _answer(too_large)(scope, receive, noted)
            else:
                await self.app(scope, limited, noted)
        finally:
            path = getattr(scope.get("route"), "path", _UNKNOWN)
            self.requests.labels(path, status).inc()
            self.seconds.labels(path).observe(time.perf_counter() - start)


async def read_uploads(files: Sequence[UploadFile], limits: Limits, field: str) -> list[bytes]:
    """Return the contents of uploaded files, after checking their number and sizes; their names are not used."""
    if len(files) > limits.max_images:
        text = f"{len(files)} images are more than {limits.max_images}."
        raise RequestError(413, "too_many_images", text, field)
    contents = []
    for file in files:
        data = await file.read(limits.max_bytes + 1)
        if len(data) > limits.max_bytes:
            raise RequestError(413, "file_too_large", f"An image has more than {limits.max_bytes} bytes.", field)
        contents.append(data)
    return contents


def check_texts(texts: Sequence[str], limits: Limits, field: str) -> list[str]:
    """Return texts, after checking their number and lengths."""
    if not 1 <= len(texts) <= limits.max_texts:
        text = f"Give 1 to {limits.max_texts} texts, not {len(texts)}."
        raise RequestError(422, "number_of_texts", text, field)
    for given in texts:
        if not given.strip() or len(given) > limits.max_characters:
            text = f"A text must have a visible character and at most {limits.max_characters} characters."
            raise RequestError(422, "length_of_text", text, field)
        if any("\ud800" <= character <= "\udfff" for character in given):
            raise RequestError(422, "not_unicode", "A text has half of a surrogate pair.", field)
    return list(texts)


async def in_time(work: "asyncio.Future[Result] | asyncio.Task[Result]", limits: Limits) -> Result:
    """Return the result of work, or answer with status 503 if it takes too long; it is cancelled then."""
    try:
        return await asyncio.wait_for(work, limits.seconds)
    except TimeoutError:
        text = f"The answer took more than {limits.seconds:g} s."
        raise RequestError(503, "too_slow", text) from None
    except FullError as error:
        raise RequestError(503, "busy", str(error)) from error


def _answer(error: RequestError) -> JSONResponse:
    return _json(error.status_code, error.code, error.detail, error.field, error.headers)


def _json(status: int, code: str, message: str, field: str | None = None, headers: Any = None) -> JSONResponse:
    content = ErrorAnswer(error=Problem(code=code, message=message, field=field))
    return JSONResponse(content.model_dump(), status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        return _answer(error)
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return _json(error.status_code, code, str(error.detail), headers=error.headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    return _json(422, "invalid_request", str(first["msg"]), ".".join(place) or None)


async def _on_failure(request: Request, error: Exception) -> Response:
    return _json(500, "internal_error", "The service failed to answer; its log has the reason.")

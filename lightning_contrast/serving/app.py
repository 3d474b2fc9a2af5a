"""The similarity service: create the application, and serve it."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.nn.byte_tokenizer import Tokenizer
from lightning_contrast.serving.embedder import Embedder, open_embedder
from lightning_contrast.serving.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

NEEDED = ("fastapi", "uvicorn", "multipart", "prometheus_client")
"""Modules of the extra, apart from that of the models."""
log = logging.getLogger("lightning_contrast.serving")


def create_app(
    model_path: str | Path | nn.Module | Embedder,
    *,
    limits: Limits | None = None,
    max_batch: int = 16,
    max_delay: float = 0.002,
    tokenizer: Tokenizer | None = None,
    threads: int | None = None,
) -> "FastAPI":
    """Return the FastAPI application of a similarity service. Needs ``pip install 'lightning_contrast[serve]'``.

    ``POST /similarity`` (files ``first`` and ``second``) answers with the cosine of two images, ``/embed`` (file
    ``image``) with the model's output for one, ``/embed/batch`` (files ``images``) for several; a model with a text
    tower also has ``/embed/text`` (JSON ``{"texts": [...]}``) and ``/similarity/text`` (``image``, ``text``).
    ``GET /model``, ``/health``, ``/metrics`` (Prometheus) and ``/openapi.json`` describe it.

    Images are decoded as by the data modules and prepared by the ``input_spec`` of the model; images of several
    requests run through the model together. Errors are ``{"error": {"code", "message", "field"}}``. Nothing of a
    request is written to a path that it names, and nothing is unpickled.

    Args:
        model_path: An ONNX graph by `export.export`, a folder by `export_towers`, or what else `open_embedder` takes.
        limits: Limits of requests; None for the defaults of `Limits`.
        max_batch: Largest batch of the model, >= 1.
        max_delay: Time that an image waits for others, in seconds, >= 0.
        tokenizer: See `open_embedder`.
        threads: See `open_embedder`.

    Raises:
        ValueError: If the model cannot be served, or a number is out of its range.
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If the extra is not installed.
    """
    check_at_least("max_batch", max_batch, 1)
    require_packages("serve", NEEDED)
    from lightning_contrast.serving.routes import build_app

    embedder = open_embedder(model_path, tokenizer=tokenizer, threads=threads)
    return build_app(embedder, limits or Limits(), max_batch=max_batch, max_delay=max_delay)


def serve(app: Any, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve an application until the process gets SIGINT or SIGTERM; requests at work are finished then.

    Args:
        app: The application.
        host: Address to listen on. The default is reached from this machine only; there is no authentication.
        port: Port, in 0..65535; 0 for a free one.

    Raises:
        ValueError: If the port is out of its range.
        ModuleNotFoundError: If uvicorn is not installed.
    """
    require(0 <= port <= 65535, "port", "lie in 0..65535", port, "Give the number of a port")
    require_packages("serve", ("uvicorn",))
    import uvicorn

    if not _is_loopback(host):
        log.warning("Listening on %s: other machines can reach this service, which has no authentication.", host)
    uvicorn.run(app, host=host, port=port, limit_concurrency=256, timeout_graceful_shutdown=30, server_header=False)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def require_packages(extra: str, modules: Sequence[str]) -> None:
    """Raise a ModuleNotFoundError that names the extra unless all of these modules are installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        hint = f"pip install 'lightning_contrast[{extra}]'"
        raise ModuleNotFoundError(f"This needs {', '.join(missing)}: {hint}.", name=missing[0])

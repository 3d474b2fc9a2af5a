"""The similarity service: create the application, and serve it."""

import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
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
        host: Address or name to listen on, "" for all addresses. The default is reached from this machine only; there
            is no authentication.
        port: Port, in 0..65535; 0 for a free one.

    Raises:
        ValueError: If the port is out of its range.
        OSError: If the port is taken, or the host is no address of this machine.
        ModuleNotFoundError: If uvicorn is not installed.
    """
    require(0 <= port <= 65535, "port", "lie in 0..65535", port, "Give the number of a port")
    require_packages("serve", ("uvicorn",))
    import uvicorn

    with _listen(host, port) as listener:
        config = uvicorn.Config(app, limit_concurrency=256, timeout_graceful_shutdown=30, server_header=False)
        address, port = listener.getsockname()[:2]
        if not ip_address(address).is_loopback:
            log.warning("Listening on %s: other machines can reach this service, which has no authentication.", address)
        shown = f"[{address}]" if ":" in address else address
        logging.getLogger("uvicorn.error").info("Listening on http://%s:%d (Ctrl+C to quit)", shown, port)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        OSError: If that is not possible; the message says what to change.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that is too long
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while ")[0]
        hint = "Give an address of this machine and a free port, such as 0 for any"
        raise OSError(f"Cannot listen on host {host!r}, port {port}: {reason}. {hint}.") from error


def require_packages(extra: str, modules: Sequence[str]) -> None:
    """Raise a ModuleNotFoundError that names the extra unless all of these modules are installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        hint = f"pip install 'lightning_contrast[{extra}]'"
        raise ModuleNotFoundError(f"This needs {', '.join(missing)}: {hint}.", name=missing[0])

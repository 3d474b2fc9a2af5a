"""The application for search in a browser."""

from typing import TYPE_CHECKING

from lightning_contrast.search.index import ImageIndex
from lightning_contrast.serving.app import NEEDED, require_packages
from lightning_contrast.serving.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI


def create_search_app(index: ImageIndex, *, limits: Limits | None = None) -> "FastAPI":
    """Return the FastAPI application of a search page: a box for words, a place to drop an image, a grid of hits.

    ``GET /`` is the page, ``POST /search`` the query by ``words``, an ``image`` file or the ``digest`` of an image of
    the index, and ``GET /images/DIGEST`` a small picture of such an image. It runs with `serving.serve`, and has
    the limits and errors of `serving.create_app`, ``/health``, and ``/metrics`` of the requests. Only files of the
    index can be read, by the digests of their contents. Needs ``pip install 'lightning_contrast[search]'``.

    Args:
        index: The index, opened with its model.
        limits: Limits of requests; None for the defaults of `serving.Limits`.

    Raises:
        ValueError: If the index was opened without a model.
        ModuleNotFoundError: If the extra is not installed.
    """
    require_packages("search", NEEDED)
    from lightning_contrast.search.routes import build_search_app

    return build_search_app(index, limits or Limits())

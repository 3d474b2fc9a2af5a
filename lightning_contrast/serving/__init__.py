"""Similarity service over HTTP, and the loader of models that it shares with image search."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Callbacks of the methods, and probes, monitors and loggers that need no module of this package."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

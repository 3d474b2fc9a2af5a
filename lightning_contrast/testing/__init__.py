"""Checks for any LightningModule, callback or loss: resume, kills, world size, transparency, host reads.

Each says in words what differs and where it first differs. Use small modules: every kit trains, and keeps copies.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

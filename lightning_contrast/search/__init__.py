"""Image search: a folder of images in a vector store, queried by images or words."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

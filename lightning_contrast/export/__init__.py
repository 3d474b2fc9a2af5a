"""A trained backbone in the form that the next tool reads, compared with the network that it was made of."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

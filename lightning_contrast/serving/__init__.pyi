from .app import create_app as create_app
from .app import serve as serve
from .embedder import Embedder as Embedder
from .embedder import open_embedder as open_embedder
from .limits import Limits as Limits
from .pictures import RefusedImageError as RefusedImageError
from .pictures import decode_image as decode_image

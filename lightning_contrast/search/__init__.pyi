from .app import create_search_app as create_search_app
from .index import Hit as Hit
from .index import ImageIndex as ImageIndex
from .index import IndexUpdate as IndexUpdate
from .near_duplicates import Duplicates as Duplicates
from .near_duplicates import group_duplicates as group_duplicates

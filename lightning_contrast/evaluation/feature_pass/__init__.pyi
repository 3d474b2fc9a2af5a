from .cache import FeatureSet as FeatureSet
from .cache import cached_features as cached_features
from .embedding import embed_dataset as embed_dataset
from .embedding import read_embeddings as read_embeddings
from .subjects import Subject as Subject
from .subjects import load_backbone as load_backbone
from .subjects import load_subject as load_subject

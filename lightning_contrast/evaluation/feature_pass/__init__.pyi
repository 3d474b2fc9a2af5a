from .cache import FeatureSet as FeatureSet
from .cache import cached_features as cached_features
from .subjects import Subject as Subject
from .subjects import load_subject as load_subject

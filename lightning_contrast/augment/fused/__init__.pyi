from .blur import FusedGaussianBlur as FusedGaussianBlur
from .color import FusedColorJitter as FusedColorJitter
from .crop import FusedResizedCrop as FusedResizedCrop
from .solarize import FusedSolarize as FusedSolarize
from .stain import FusedStainJitter as FusedStainJitter
from .turn import FusedTurn as FusedTurn

from .build import report as report
from .parts import PARTS as PARTS
from .parts import ReportPart as ReportPart
from .result import Outcome as Outcome
from .result import Report as Report

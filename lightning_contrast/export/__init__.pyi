from .backbone import ExportFormat as ExportFormat
from .backbone import export as export
from .backbone import load_backbone as load_backbone
from .parity import ParityReport as ParityReport
from .parity import read_report as read_report
from .pruning import prune_channels as prune_channels
from .towers import export_towers as export_towers

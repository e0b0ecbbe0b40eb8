"""Reports: what pruning did, as data, as a file and as text."""

from .report import SCHEMA_VERSION, SparsityReport
from .rows import BASE_ARGUMENTS, BaseCard, BlockReport, Change, LayerReport, PrunedBlock

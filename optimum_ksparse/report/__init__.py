"""Reports: what pruning did, as data, as a file and as text."""

from ..records import MERGE_REPORT_NAME, REPORT_NAME, RESULTS_NAME, TUNING_NAME
from .report import SCHEMA_VERSION, SparsityReport
from .rows import (
    BASE_ARGUMENTS,
    BaseCard,
    BlockReport,
    Change,
    LayerKind,
    LayerReport,
    MethodChoice,
    PrunedBlock,
    Trial,
)

__all__ = [
    "BASE_ARGUMENTS",
    "MERGE_REPORT_NAME",
    "REPORT_NAME",
    "RESULTS_NAME",
    "SCHEMA_VERSION",
    "TUNING_NAME",
    "BaseCard",
    "BlockReport",
    "Change",
    "LayerKind",
    "LayerReport",
    "MethodChoice",
    "PrunedBlock",
    "SparsityReport",
    "Trial",
]

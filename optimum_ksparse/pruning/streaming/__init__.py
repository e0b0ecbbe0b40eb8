"""Pruning a checkpoint block by block from disk to disk: its files, the blocks of a model that stay on the disk, the
workspace of a run, and the journal with which a run that was cut off goes on."""

from ...checkpoint.files import WeightFiles, changed_files, check_index, check_space, find_weight_files, sha256_of
from .blocks import DiskBlocks, open_checkpoint
from .journal import FinishedBlock, Journal, Snapshot
from .recovery import is_whole
from .workspace import OURS, Workspace

__all__ = [
    "OURS",
    "DiskBlocks",
    "FinishedBlock",
    "Journal",
    "Snapshot",
    "WeightFiles",
    "Workspace",
    "changed_files",
    "check_index",
    "check_space",
    "find_weight_files",
    "is_whole",
    "open_checkpoint",
    "sha256_of",
]

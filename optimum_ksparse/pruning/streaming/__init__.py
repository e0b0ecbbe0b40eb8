"""Pruning a checkpoint block by block from disk to disk: its files, the blocks of a model that stay on the disk, the
workspace of a run, and the journal with which a run that was cut off goes on."""

from .journal import Journal, is_whole
from .workspace import OURS, Workspace

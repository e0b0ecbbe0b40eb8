"""Dropping whole decoder blocks: which change the hidden states least, and a model without them that is an ordinary
smaller one."""

from .influence import measure_drop
from .removal import check_drop, drop_blocks

__all__ = ["check_drop", "drop_blocks", "measure_drop"]

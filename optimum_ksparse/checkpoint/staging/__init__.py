"""How files reach the disk: whole or not at all, one writer at a time, and never over what nobody said may go."""

from .disk import remove, save_tensors, sync, sync_tree, write_text
from .lock import claimed, locked
from .outputs import check_apart, check_output, check_places, drop_records, outdated
from .swap import publish, recover, staged

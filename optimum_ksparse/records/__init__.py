"""Records: JSON files of a checkpoint or of a run, read into dataclasses.

A record may come from anywhere. Each value is checked against the annotations of the dataclass that it becomes, which
may have limits (`Annotated[int, Between(0)]`), and what does not fit is a `ValueError` that names the file and the
field, as `layers[3].shape[1]`. Numbers are finite, and texts hold no control characters, so that they can be printed.
"""

from .build import build, build_fields
from .files import (
    HEAD_NAME,
    MASKS_NAME,
    MERGE_REPORT_NAME,
    REPORT_NAME,
    RESULTS_NAME,
    TUNING_NAME,
    UNWRITTEN,
    aligned,
    check_depth,
    differences,
    printable,
    read_json,
    read_record,
    to_json,
)
from .foreign import BITMASK, COMPRESSED_TENSORS, TWO_OF_FOUR, sparse_format
from .html import as_html
from .kinds import Amount, As, Between, Count, PatternText, Positive, RelativePath, Revision, Share, Version
from .sources import describe_source, is_repo_id, names_repository, recorded_repository

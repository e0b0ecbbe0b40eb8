"""How a sparse linear map is computed: the operators, the kernels behind them, and the choice among these.

`operators` is what the module calls, `fused` what layers of one input call; `candidates` the table of kernels;
`dispatch` measures and chooses. `triton` holds the Triton kernels; they are imported when they first run.
"""

from .candidates import GROUPS, KEPT_FORMS, KERNELS, Candidate, PackedWeight, Problem, has_kernels
from .dispatch import (
    BUCKETS,
    bucket,
    choose,
    choose_fused,
    forget,
    measure,
    measured,
    prepare,
)
from .fused import below_each_other, compute_fused, fused_linear
from .hardware import describe_device, why_no_kernels
from .library import library_form, shared_values
from .operators import apply, compute, decompress, gather, linear, runs_plainly
from .sample import sample_weights
from .strips import STRIP_TOKENS, why_not_strips
from .timing import rotations, time_calls

__all__ = [
    "BUCKETS",
    "GROUPS",
    "KEPT_FORMS",
    "KERNELS",
    "STRIP_TOKENS",
    "Candidate",
    "PackedWeight",
    "Problem",
    "apply",
    "below_each_other",
    "bucket",
    "choose",
    "choose_fused",
    "compute",
    "compute_fused",
    "decompress",
    "describe_device",
    "forget",
    "fused_linear",
    "gather",
    "has_kernels",
    "library_form",
    "linear",
    "measure",
    "measured",
    "prepare",
    "rotations",
    "runs_plainly",
    "sample_weights",
    "shared_values",
    "time_calls",
    "why_no_kernels",
    "why_not_strips",
]

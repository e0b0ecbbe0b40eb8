"""How a sparse linear map is computed: the operators, the kernels behind them, and the choice among these.

`operators` is what the module calls; `candidates` the table of kernels; `dispatch` measures and chooses. `gemv`, `dot`
and `dense` hold the Triton kernels, made of the byte permutations in `permute`; they are imported when they first run.
"""

from .candidates import GROUPS, KEPT_FORMS, KERNELS, Candidate, PackedWeight, Problem, has_kernels
from .dispatch import (
    BUCKETS,
    bucket,
    check_kernel,
    choose,
    choose_fused,
    forget,
    measure,
    measured,
    prepare,
    rule_of_thumb,
)
from .hardware import describe_device, why_no_kernels
from .library import library_form, shared_values, why_not_library
from .operators import apply, compute, decompress, gather, linear
from .sample import sample_weights
from .timing import rotations, time_calls

__all__ = [
    "BUCKETS",
    "GROUPS",
    "KEPT_FORMS",
    "KERNELS",
    "Candidate",
    "PackedWeight",
    "Problem",
    "apply",
    "bucket",
    "check_kernel",
    "choose",
    "choose_fused",
    "compute",
    "decompress",
    "describe_device",
    "forget",
    "gather",
    "has_kernels",
    "library_form",
    "linear",
    "measure",
    "measured",
    "prepare",
    "rotations",
    "rule_of_thumb",
    "sample_weights",
    "shared_values",
    "time_calls",
    "why_no_kernels",
    "why_not_library",
]

"""How a sparse linear map is computed: the operators, the kernels behind them, and the choice among these.

`operators` is what the module calls; `candidates` the table of kernels; `dispatch` measures and chooses. `products`
decides in which dtype dense products run on a CPU. `cpu` is the native code for CPUs; `triton` holds the Triton
kernels, which are imported when they first run.
"""

from .candidates import GROUPS, KERNELS, Candidate, PackedWeight, Problem, has_kernels
from .cpu import NativeWeight, most_dense_tokens, whole_mask, why_not_native
from .dispatch import BUCKETS, DENSE, bucket, choose, forget, measure, measured, prepare, time_dense, time_kernels
from .hardware import describe_device, why_no_kernels
from .library import library_form, shared_values
from .operators import apply, decompress, differentiable, gains_natively, linear, native_weight, runs_plainly
from .products import fast_products, mm, product_dtype
from .timing import sample_weights, time_calls

"""Products of packed weights on CPUs by native code: `source/` in C, `build` compiles it, `native` calls it."""

from .native import (
    DTYPES,
    NativeWeight,
    most_dense_tokens,
    multiplies_in,
    unit_name,
    whole_mask,
    why_not_native,
)

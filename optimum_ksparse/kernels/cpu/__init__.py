"""Products of packed weights on CPUs by native code: `source/` in C, `build` compiles it, `native` calls it."""

from .native import DTYPES, NativeWeight, multiplies_in, unit_name, why_not_native

__all__ = ["DTYPES", "NativeWeight", "multiplies_in", "unit_name", "why_not_native"]

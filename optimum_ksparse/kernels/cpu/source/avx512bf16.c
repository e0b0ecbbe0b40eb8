/* AVX-512 as `avx512.c` has it, and BF16: AMD since 2022 (Zen 4), Intel since 2023 (Sapphire Rapids). Another unit of the
 * same functions has `some` in tiles of AMX, which the latter has, too. */
#define UNIT avx512bf16
#include "avx512.c"

#ifdef HAS_AMX
#include "tiles.h"

const struct unit unit_avx512amx = {"avx512amx", 2, start, few, some_or_tiles, many, grad_input, expand_rows, widen};
#endif

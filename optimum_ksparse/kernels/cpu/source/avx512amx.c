/* AVX-512 and BF16 as `avx512bf16.c` has them, and AMX with bfloat16: Intel since 2023 (Sapphire Rapids). */
#define UNIT avx512amx
#define TILES
#include "ksparse.h"
#ifdef HAS_AMX
#include "avx512.c"
#endif

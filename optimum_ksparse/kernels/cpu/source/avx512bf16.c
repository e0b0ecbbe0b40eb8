/* AVX-512 as `avx512.c` has it, and BF16: AMD since 2022 (Zen 4), Intel since 2023 (Sapphire Rapids). */
#define UNIT avx512bf16
#include "avx512.c"
